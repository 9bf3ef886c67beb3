"""Controllers: each is its paper's equations, goes on where a stream was cut, one token at a time too, and is built
from a config."""

import pytest
import torch
from small_models import CONFIGS, close, in_pieces, named, slopes, streaming_law
from torch import nn

from metamem import build, load_config
from metamem.controllers import GRU, LSTM, Controller, FeedForward, GridLSTM, Transformer
from metamem.registry import MODULES
from metamem.state import tree_map

pytestmark = pytest.mark.usefixtures("float64")

CONTROLLERS = {
    "lstm": lambda: LSTM(4, 5),
    "lstm-bare": lambda: LSTM(4, 5, project=False),
    "lstm-stack": lambda: LSTM(4, 5, layers=3),
    "lstm-tokens": lambda: LSTM(4, 5, layers=3, schedule="tokens"),
    "lstm-wavefront": lambda: LSTM(4, 5, layers=3, schedule="wavefront"),
    "gru": lambda: GRU(4, 5),
    "gru-stack": lambda: GRU(4, layers=2, project=False),
    "grid": lambda: GridLSTM(4, 5, layers=3),
    "grid-tied-priority": lambda: GridLSTM(4, 3, layers=2, tied=True, priority=True, project=False),
    "transformer": lambda: Transformer(4, heads=2),
    "transformer-window": lambda: Transformer(4, heads=1, layers=1, window=3),
    "feed-forward": lambda: FeedForward(4, 5, layers=2),
}


@pytest.fixture(params=CONTROLLERS)
def controller(request):
    return CONTROLLERS[request.param]()


def tokens(batch=3, time=7):
    return torch.randn(batch, time, 4, requires_grad=True)


# What every controller keeps


def test_it_is_a_controller_of_the_widths_that_it_says(controller):
    assert isinstance(controller, Controller) and controller.dim_in == 4
    h, _ = controller(tokens())
    assert h.shape == (3, 7, controller.dim_out)


def test_any_split_of_a_sequence_is_the_sequence(controller):
    if isinstance(controller, Transformer) and controller.layers[0].attention.window is None:
        x = tokens()  # its cache is as long as what was read, so states of rows cannot be compared
        whole, state = controller(x)
        steepness = slopes(controller, x, whole, state)
        for cuts in ([1], [6], [2, 3], range(1, 7)):
            y, after = in_pieces(controller, x, cuts)
            close(named(y, after), named(whole, state))
            close(slopes(controller, x, y, after), steepness)
    else:
        streaming_law(controller, tokens())


def test_steps_are_the_sequence_in_values_and_gradients(controller):
    x = tokens()
    whole, state = controller(x)
    outputs, after = [], None
    for token in x.unbind(1):
        h, after = controller.step(token, after)
        outputs.append(h)
    stepped = torch.stack(outputs, 1)
    close(named(stepped, after), named(whole, state))
    close(slopes(controller, x, stepped, after), slopes(controller, x, whole, state))


def test_no_token_sees_a_later_one(controller):
    x = tokens(1).detach()
    changed = x.repeat(7, 1, 1)
    changed[range(7), range(7)] += torch.randn(7, 4)
    before, after = controller(x)[0], controller(changed)[0]
    for t in range(7):
        torch.testing.assert_close(after[t, :t], before[0, :t])
        assert not torch.allclose(after[t, t], before[0, t])


def test_rows_that_are_reset_begin_anew_and_the_others_go_on(controller):
    x, rows = tokens(), torch.tensor([True, False, True])
    _, state = controller(x[:, :4])
    y, _ = controller(x[:, 4:], controller.reset_state(state, rows))
    torch.testing.assert_close(y[rows], controller(x[rows, 4:])[0])
    torch.testing.assert_close(y[~rows], controller(x[~rows])[0][:, 4:])


def test_reading_nothing_changes_nothing(controller):
    x = tokens()
    _, state = controller(x)
    y, after = controller(x[:, :0], state)
    assert y.shape == (3, 0, controller.dim_out)
    close(named(y, after), named(y, state))


def test_a_state_that_is_given_is_left_as_it_was(controller):
    x = tokens().detach()
    _, state = controller(x)
    kept = tree_map(torch.clone, state)
    controller(x, state)
    controller.step(x[:, 0], state)
    close(named(x, state), named(x, kept))


# The LSTM


def naive_lstm(lstm, x):
    """i, f, o = σ(x W_x + h W_h + b), g = tanh(…), c ← f c + i g, h ← o tanh(c): layer by layer, token by token."""
    for layer in range(lstm.layers.num_layers):
        w_x, w_h, b_x, b_h = (
            getattr(lstm.layers, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h = c = x.new_zeros(x.shape[0], lstm.layers.hidden_size)
        outputs = []
        for t in range(x.shape[1]):
            i, f, g, o = (x[:, t] @ w_x.T + b_x + h @ w_h.T + b_h).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        x = torch.stack(outputs, 1)
    return lstm.output(x), h, c


@pytest.mark.parametrize("schedule", ["layers", "tokens", "wavefront"])
@pytest.mark.parametrize("hidden, layers", [(None, 1), (5, 2), (3, 4)])
def test_an_lstm_is_its_equations_in_values_and_gradients(hidden, layers, schedule):
    lstm, x = LSTM(4, hidden, layers, schedule=schedule), tokens()
    (y, state), (expected, h, c) = lstm(x), naive_lstm(lstm, x)
    torch.testing.assert_close((y, state["hidden"][:, -1], state["cell"][:, -1]), (expected, h, c))
    of = [x, *lstm.parameters()]
    mine, plain = (torch.autograd.grad(out.square().sum(), of) for out in (y, expected))
    torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("schedule", ["layers", "tokens", "wavefront"])
@pytest.mark.parametrize("time", [1, 2, 9])  # shorter than the stack is deep, too
def test_all_schedules_of_a_stack_are_torchs_lstm_with_the_same_weights(schedule, time):
    theirs = nn.LSTM(4, 5, num_layers=3, batch_first=True)
    mine = LSTM(4, 5, layers=3, schedule=schedule, project=False)
    mine.layers.load_state_dict(theirs.state_dict())
    x, h, c = torch.randn(2, time, 4), torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    expected, (h_after, c_after) = theirs(x, (h, c))
    y, state = mine(x, {"hidden": h.transpose(0, 1), "cell": c.transpose(0, 1)})
    found = y, state["hidden"].transpose(0, 1), state["cell"].transpose(0, 1)
    torch.testing.assert_close(found, (expected, h_after, c_after), rtol=1e-12, atol=1e-13)


# The others


@pytest.mark.parametrize("layers", [1, 2])
def test_a_gru_is_its_equations(layers):
    gru, x = GRU(4, 5, layers), tokens()
    y = x
    for layer in range(layers):
        w_x, w_h, b_x, b_h = (
            getattr(gru.layers, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h, outputs = x.new_zeros(3, 5), []
        for t in range(x.shape[1]):
            (r_x, z_x, n_x), (r_h, z_h, n_h) = (y[:, t] @ w_x.T + b_x).chunk(3, -1), (h @ w_h.T + b_h).chunk(3, -1)
            r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
            h = (1 - z) * (n_x + r * n_h).tanh() + z * h
            outputs.append(h)
        y = torch.stack(outputs, 1)
    found, state = gru(x)
    torch.testing.assert_close((found, state["hidden"][:, -1]), (y @ gru.output.weight.T, h))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("priority", [False, True])
def test_a_grid_lstm_is_its_equations(tied, priority):
    """Each dimension by an LSTM of its own on the same H, written out gate by gate."""
    grid, x = GridLSTM(4, 5, layers=3, tied=tied, priority=priority), tokens()

    def lstm(both, m, weight, bias):
        i, f, o, g = (both @ weight.T + bias).split(5, -1)
        m = f.sigmoid() * m + i.sigmoid() * g.tanh()
        return (o.sigmoid() * m).tanh(), m

    along_time = [(x.new_zeros(3, 5), x.new_zeros(3, 5)) for _ in range(3)]
    outputs = []
    for t in range(x.shape[1]):
        projected = x[:, t] @ grid.input.weight.T + grid.input.bias
        h, m = projected[:, :5], projected[:, 5:]
        for layer in range(3):
            block = grid.blocks[0 if tied else layer]
            h_time, m_time = along_time[layer]
            along_time[layer] = lstm(torch.cat([h, h_time], 1), m_time, block.weight[:20], block.bias[:20])
            seen = torch.cat([h, along_time[layer][0] if priority else h_time], 1)
            h, m = lstm(seen, m, block.weight[20:], block.bias[20:])
        outputs.append(h @ grid.output.weight.T)
    y, state = grid(x)
    torch.testing.assert_close(y, torch.stack(outputs, 1))
    torch.testing.assert_close(state["cell"], torch.stack([m for _, m in along_time], 1))
    assert len(grid.blocks) == (1 if tied else 3)


@pytest.mark.parametrize("window", [None, 3])
def test_a_transformer_is_attention_and_mlp_around_norms(window):
    """Attention as one masked softmax over the whole sequence, head by head, its rotary positions written out."""
    controller = Transformer(4, heads=2, layers=2, window=window)
    for parameter in controller.parameters():
        nn.init.normal_(parameter)
    x = y = tokens()

    def turned(heads):
        angle = torch.arange(7.0)  # dim 2 a head: one frequency
        a, b = heads.unbind(-1)
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    distance = torch.arange(7)[:, None] - torch.arange(7)
    hidden = (distance < 0) | (distance >= (window or 7))
    for layer in controller.layers:
        normed = nn.functional.rms_norm(y, (4,), layer.norm_attention.weight, 1e-6)
        parts = (normed @ layer.attention.project.weight.T).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        queries, keys, values = turned(parts[0]), turned(parts[1]), parts[2]
        weights = (queries @ keys.mT / 2**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        y = y + (weights @ values).transpose(1, 2).flatten(2) @ layer.attention.output.weight.T
        normed = nn.functional.rms_norm(y, (4,), layer.norm_mlp.weight, 1e-6)
        y = y + nn.functional.gelu(normed @ layer.mlp.up.weight.T) @ layer.mlp.down.weight.T
    expected = nn.functional.rms_norm(y, (4,), controller.norm.weight, 1e-6)
    torch.testing.assert_close(controller(x)[0], expected)


def test_a_feed_forward_controller_has_no_past():
    controller, x = FeedForward(4, 5, layers=2), tokens()
    first, second = controller.layers
    expected = torch.tanh(torch.tanh(x @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    y, state = controller(x)
    torch.testing.assert_close(y, expected)
    assert state == {} == controller.init_state(3)
    assert not torch.allclose(FeedForward(4, activation="relu")(x)[0], FeedForward(4)(x)[0])


# In a config


@pytest.mark.parametrize(
    ("kind", "options", "made"),
    [
        ("lstm", {"dim": 4, "layers": 2, "schedule": "wavefront"}, LSTM),
        ("gru", {"dim": 4, "hidden": 3}, GRU),
        ("grid_lstm", {"dim": 4, "tied": True, "priority": True}, GridLSTM),
        ("transformer", {"dim": 4, "heads": 2, "window": 8}, Transformer),
        ("feed_forward", {"dim": 4, "activation": "relu"}, FeedForward),
    ],
)
def test_a_controller_is_a_module_kind(kind, options, made):
    assert isinstance(MODULES.build(kind, options), made)


@pytest.mark.parametrize("make", [LSTM, GRU, GridLSTM, FeedForward])
def test_sizes_are_checked(make):
    with pytest.raises(ValueError, match="dim, hidden and layers must be at least 1, not 4, 0, 1"):
        make(4, 0, layers=1)
    with pytest.raises(ValueError, match=r"must be at least 1, not 4, (4|None), 0"):
        make(4, layers=0)


def test_a_transformer_needs_a_layer():
    with pytest.raises(ValueError, match="layers must be at least 1, not 0"):
        Transformer(4, layers=0)


def test_a_stack_gives_the_same_in_pieces_whatever_its_schedule():
    x, made = tokens(), {}
    for schedule in ("layers", "tokens", "wavefront"):
        torch.manual_seed(3)
        made[schedule] = named(*in_pieces(LSTM(4, 5, 3, schedule=schedule), x, [2, 3]))
    close(made["tokens"], made["layers"])
    close(made["wavefront"], made["layers"])


def test_an_lstm_with_attention_adds_to_the_lstm_what_attention_finds_in_its_past(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(f"extends: [{CONFIGS}/memory/lstm_attention.yaml, {CONFIGS}/experiment/mnm_dictionary.yaml]\n")
    both = build(load_config(path, ["vars.dim=8"])).blocks.get_submodule("0").memory
    x = torch.randn(2, 7, 8)
    hidden, _ = both.controller(x)
    torch.testing.assert_close(both(x).y, hidden + both.attention(hidden)[0])
