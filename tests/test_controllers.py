"""Controllers: the LSTM is its equations, goes on where a stream was cut, and is built from a config."""

import pytest
import torch
from small_models import CONFIGS, streaming_law

from metamem import build, load_config
from metamem.controllers import LSTM
from metamem.registry import MODULES

pytestmark = pytest.mark.usefixtures("float64")


def naive(lstm, x):
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
    return x @ lstm.output.weight.T, h, c


@pytest.mark.parametrize("hidden, layers", [(None, 1), (5, 2)])
def test_an_lstm_is_its_equations_in_values_and_gradients(hidden, layers):
    lstm, x = LSTM(4, hidden, layers), torch.randn(3, 7, 4, requires_grad=True)
    (y, state), (expected, h, c) = lstm(x), naive(lstm, x)
    torch.testing.assert_close((y, state["hidden"][:, -1], state["cell"][:, -1]), (expected, h, c))
    of = [x, *lstm.parameters()]
    mine, plain = (torch.autograd.grad(out.square().sum(), of) for out in (y, expected))
    torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_lstm_keeps_the_streaming_law(layers):
    streaming_law(LSTM(4, 5, layers), torch.randn(3, 7, 4, requires_grad=True))


def test_an_lstm_reads_nothing_and_stays():
    lstm, x = LSTM(4), torch.randn(2, 3, 4)
    _, state = lstm(x)
    y, after = lstm(x[:, :0], state)
    assert y.shape == (2, 0, 4)
    assert torch.equal(after["cell"], state["cell"]) and torch.equal(after["hidden"], state["hidden"])


def test_an_lstm_is_a_module_kind_with_its_sizes_checked():
    assert isinstance(MODULES.build("lstm", {"dim": 4, "layers": 2}), LSTM)
    with pytest.raises(ValueError, match="dim, hidden and layers must be at least 1, not 4, 0, 1"):
        LSTM(4, 0)


def test_an_lstm_with_attention_adds_to_the_lstm_what_attention_finds_in_its_past(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(f"extends: [{CONFIGS}/memory/lstm_attention.yaml, {CONFIGS}/experiment/mnm_dictionary.yaml]\n")
    both = build(load_config(path, ["vars.dim=8"])).blocks.get_submodule("0").memory
    x = torch.randn(2, 7, 8)
    hidden, _ = both.controller(x)
    torch.testing.assert_close(both(x).y, hidden + both.attention(hidden)[0])
