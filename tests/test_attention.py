"""Causal attention: a full matrix of scores gives the same; the cache carries it over any cut."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from small_models import close, in_pieces, inner_level, named, recurrent, shaken, slopes, streaming_law
from torch.nn import functional

from metamem import InnerLoop, Session, inner_levels
from metamem.attention import Attention
from metamem.state import state_bytes

pytestmark = pytest.mark.usefixtures("float64")
DIM, HEADS = 8, 2
CUTS = st.sets(st.integers(1, 12), max_size=12)


def rotated(x):
    """Each pair of features (i, i + half) of the token at t turned by t · 10000^(−i/half)."""
    tokens, half = x.shape[1], x.shape[3] // 2
    angle = torch.arange(tokens)[:, None, None] * 10_000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(()), angle)
    return torch.cat([turned.real, turned.imag], -1)


def naive(attention, x):
    """softmax over the whole matrix of scores, a band of `window` tokens left in it, or without one the past; before
    it the persistent tokens, seen by all, with nothing rotated."""
    batch, tokens, dim = x.shape
    heads = dim // attention.heads
    projected = (x @ attention.project.weight.T).reshape(batch, tokens, 3, attention.heads, heads)
    q, k, v = projected.unbind(2)
    scores = torch.einsum("bthd,bshd->bhts", rotated(q), rotated(k)) / heads**0.5
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
    scores = scores.where((s <= t) & (t - (attention.window or tokens) < s), -torch.inf)
    if attention.persistent is not None:
        p = (attention.persistent @ attention.project.weight.T).reshape(-1, 3, attention.heads, heads)
        to_p = torch.einsum("bthd,nhd->bhtn", q, p[:, 1]) / heads**0.5
        scores, v = torch.cat([to_p, scores], -1), torch.cat([p[:, 2].expand(batch, -1, -1, -1), v], 1)
    attended = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    return attended.reshape(batch, tokens, dim) @ attention.output.weight.T


SIZES = [(4, 11), (4, 8), (8, 8), (16, 5), (5, 4), (1, 6), (3, 1), (7, 40), (None, 11), (None, 1)]


@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("window, tokens", SIZES)
def test_values_and_gradients_are_those_of_the_full_matrix(window, tokens, persistent):
    attention, x = Attention(DIM, HEADS, window, persistent), torch.randn(2, tokens, DIM, requires_grad=True)
    y, expected = attention(x)[0], naive(attention, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    weights, of = torch.randn_like(y), [x, *attention.parameters()]
    mine = torch.autograd.grad((weights * y).sum(), of)
    torch.testing.assert_close(mine, torch.autograd.grad((weights * expected).sum(), of), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window, persistent", [(1, 0), (3, 0), (6, 2), (20, 0)])  # 20: the cache never fills
def test_streaming_law(window, persistent):
    streaming_law(Attention(DIM, HEADS, window, persistent), torch.randn(3, 13, DIM, requires_grad=True))


@pytest.mark.parametrize("persistent", [0, 2])
def test_streaming_law_without_a_window(persistent):
    """The cache of a row that was reset keeps the places that another row fills: outputs are compared, not caches."""
    attention, x = Attention(DIM, HEADS, None, persistent), torch.randn(3, 13, DIM, requires_grad=True)
    y, state = attention(x)
    whole, steepness = named(y, state), slopes(attention, x, y, state)

    @settings(max_examples=20)
    @given(cuts=CUTS, at=st.integers(1, 12), rows=st.lists(st.booleans(), min_size=3, max_size=3))
    def law(cuts, at, rows):
        pieces = in_pieces(attention, x, cuts)
        close(named(*pieces), whole)
        close(slopes(attention, x, *pieces), steepness)
        chosen = torch.tensor(rows)
        state = attention.reset_state(in_pieces(attention, x[:, :at], {c for c in cuts if c < at})[1], chosen)
        assert state["keys"].shape[2] == (0 if all(rows) else at)
        late, state = in_pieces(attention, x[:, at:], {c - at for c in cuts if c > at}, state)
        torch.testing.assert_close(late[chosen], attention(x[chosen, at:])[0])
        torch.testing.assert_close(late[~chosen], y[~chosen, at:])
        assert state["count"].tolist() == [13 - at if reset else 13 for reset in rows]

    law()


@pytest.mark.parametrize("window, persistent", [(5, 0), (None, 0), (5, 2), (None, 2)])
def test_one_token_at_a_time_is_the_full_matrix(window, persistent):
    attention, x = Attention(DIM, HEADS, window, persistent), torch.randn(2, 17, DIM)
    torch.testing.assert_close(in_pieces(attention, x, range(1, 17))[0], naive(attention, x))


@pytest.mark.parametrize("window, persistent", [(6, 0), (None, 0), (6, 2), (None, 2)])
def test_rows_at_different_counts_each_see_their_own_past(window, persistent):
    attention, x = Attention(DIM, HEADS, window, persistent), torch.randn(3, 12, DIM)
    begins = [0, 4, 9]
    state, outputs = attention.init_state(3), []
    for t in range(12):
        state = attention.reset_state(state, torch.tensor([t == begin for begin in begins]))
        y, state = attention(x[:, t : t + 1], state)
        outputs.append(y)
    assert state["count"].tolist() == ([6, 6, 3] if window else [12, 8, 3])
    for row, begin in enumerate(begins):
        own = torch.cat(outputs, 1)[row, begin:]
        torch.testing.assert_close(own, naive(attention, x[row : row + 1, begin:])[0])


@pytest.mark.parametrize("window, persistent", [(4, 0), (None, 0), (4, 2), (None, 2)])
def test_a_token_reaches_itself_and_the_rest_of_its_window_only(window, persistent):
    attention, x = Attention(DIM, HEADS, window, persistent), torch.randn(1, 11, DIM)
    jacobian = torch.autograd.functional.jacobian(lambda x: attention(x)[0], x).abs().amax((0, 2, 3, 5))
    t, s = torch.arange(11)[:, None], torch.arange(11)
    assert torch.equal(jacobian > 1e-12, (s <= t) & (s > t - (window or 11)))


@pytest.mark.parametrize("persistent", [0, 2])
def test_a_stream_may_go_on_for_ever(persistent):
    attention, x = Attention(DIM, HEADS, 4, persistent), torch.randn(1, 600, DIM)
    with torch.no_grad():
        state = attention(x)[1]
        late = attention(x[:, :9], state)
        fresh_cache = attention(x[:, -4:])[1]  # all that a window of four can know
        close(named(*late), named(*attention(x[:, :9], fresh_cache)))
    assert state_bytes(state) == state_bytes(attention.init_state(1))


def test_without_a_window_the_cache_is_as_long_as_what_was_read():
    attention = Attention(DIM, HEADS, None)
    state = attention(torch.randn(2, 9, DIM))[1]
    assert state_bytes(state) == 2 * 9 * 2 * DIM * 8 + 2 * 8  # keys and values, and two counts
    assert attention.reset_state(state)["keys"].shape[2] == 0


@pytest.mark.parametrize("window", [4, None])
def test_an_empty_call_reads_nothing(window):
    attention = Attention(DIM, HEADS, window)
    state = attention(torch.randn(2, 3, DIM))[1]
    y, after = attention(torch.randn(2, 0, DIM), state)
    assert y.shape == (2, 0, DIM)
    assert all(torch.equal(after[key], state[key]) for key in state)


@pytest.mark.parametrize("window", [3, None])
def test_an_inner_level_that_moves_it_trains(window):
    """Its outer gradient is a second derivative, here against a difference quotient."""
    settings = f"window={'null' if window is None else window}"
    config = recurrent(
        inner_level(), f"network.modules.attention.{settings}", "hierarchy.groups.middle.match=attention.**"
    )
    model = shaken(config)
    loop, (inputs, targets) = InnerLoop(model, inner_levels(config, model)), torch.randint(7, (2, 2, 6))

    def loss():
        return functional.cross_entropy(loop.run(inputs, targets).y.mT, targets)

    weight = model.get_parameter("attention.project.weight")
    direction, step = torch.randn_like(weight), 1e-6
    (slope,) = torch.autograd.grad(loss(), weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        values.append(loss().item())
        with torch.no_grad():
            weight -= sign * step * direction
    expected = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((slope * direction).sum().item(), expected, rtol=1e-5, atol=1e-9)


def test_rows_of_a_network_with_a_grown_cache_are_reset():
    model, tokens = shaken(recurrent("", "network.modules.attention.window=null")), torch.randint(7, (2, 12))
    with torch.no_grad():
        state = model.reset_state(model(tokens[:, :5]).state, torch.tensor([True, False]))
        late = model(tokens[:, 5:], state).y
        torch.testing.assert_close(late[0], model(tokens[:1, 5:]).y[0])
        torch.testing.assert_close(late[1], model(tokens[1:]).y[0, 5:])


def test_a_session_with_a_grown_cache_is_saved_and_goes_on(tmp_path):
    config = recurrent(inner_level(), "network.modules.attention.window=null")
    model, tokens = shaken(config), torch.randint(7, (1, 16))
    session, other = Session(model, config), Session(model, config)
    session.observe(tokens[:, :10])
    session.save(tmp_path / "session")
    other.load(tmp_path / "session")
    assert torch.equal(session.observe(tokens[:, 10:]).losses, other.observe(tokens[:, 10:]).losses)


@pytest.mark.parametrize("window", [2, None])
def test_every_query_sees_the_persistent_tokens_however_late(window):
    """The last token of a long stream, whose window has long left the start, has a gradient to each of them."""
    attention = Attention(DIM, HEADS, window, persistent=3)
    y, _ = in_pieces(attention, torch.randn(1, 40, DIM), [13, 26])
    (gradient,) = torch.autograd.grad(y[0, -1].square().sum(), attention.persistent)
    assert (gradient.abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("window, persistent", [(3, 0), (3, 2), (None, 0), (None, 2)])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_low_precision_is_near_and_the_cache_keeps_its_type(window, persistent, autocast):
    attention, x = Attention(DIM, HEADS, window, persistent), torch.randn(2, 9, DIM)
    expected = attention(x)[0]
    low = attention.float() if autocast else attention.bfloat16()
    x = x.to(low.output.weight.dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = in_pieces(low, x, [2, 3])
    assert state["keys"].dtype == state["values"].dtype == low.output.weight.dtype
    torch.testing.assert_close(y.double(), expected, rtol=0.1, atol=0.05)
    y.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in (x, *low.parameters()))


def test_a_window_of_no_token_and_less_than_no_persistent_token_are_refused():
    with pytest.raises(ValueError, match="window must be at least 1, or null for all tokens, not 0"):
        Attention(DIM, HEADS, 0)
    with pytest.raises(ValueError, match="persistent must be a number of tokens, not -1"):
        Attention(DIM, HEADS, persistent=-1)


def test_an_odd_number_of_features_a_head_is_refused():
    for dim, heads in [(9, 2), (6, 2)]:
        with pytest.raises(ValueError, match=f"dim {dim} over {heads} heads"):
            Attention(dim, heads)
