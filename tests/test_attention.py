"""Sliding-window attention: a full matrix of scores gives the same; the cache carries it over any cut."""

import pytest
import torch
from small_models import close, in_pieces, named, streaming_law

from metamem.attention import Attention
from metamem.state import state_bytes

pytestmark = pytest.mark.usefixtures("float64")
DIM, HEADS = 8, 2


def rotated(x):
    """Each pair of features (i, i + half) of the token at t turned by t · 10000^(−i/half)."""
    tokens, half = x.shape[1], x.shape[3] // 2
    angle = torch.arange(tokens)[:, None, None] * 10_000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(()), angle)
    return torch.cat([turned.real, turned.imag], -1)


def naive(attention, x):
    """softmax over the whole matrix of scores, a band of `window` tokens left in it."""
    batch, tokens, dim = x.shape
    heads = dim // attention.heads
    projected = (x @ attention.project.weight.T).reshape(batch, tokens, 3, attention.heads, heads)
    q, k, v = projected.unbind(2)
    scores = torch.einsum("bthd,bshd->bhts", rotated(q), rotated(k)) / heads**0.5
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
    scores = scores.where((s <= t) & (t - attention.window < s), -torch.inf)
    attended = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    return attended.reshape(batch, tokens, dim) @ attention.output.weight.T


@pytest.mark.parametrize("window, tokens", [(4, 11), (4, 8), (8, 8), (16, 5), (5, 4), (1, 6), (3, 1), (7, 40)])
def test_values_and_gradients_are_those_of_the_full_matrix(window, tokens):
    attention, x = Attention(DIM, HEADS, window), torch.randn(2, tokens, DIM, requires_grad=True)
    y, expected = attention(x)[0], naive(attention, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    weights, of = torch.randn_like(y), [x, *attention.parameters()]
    mine = torch.autograd.grad((weights * y).sum(), of)
    torch.testing.assert_close(mine, torch.autograd.grad((weights * expected).sum(), of), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [1, 3, 6, 20])  # 20: longer than the stream, the cache never fills
def test_streaming_law(window):
    streaming_law(Attention(DIM, HEADS, window), torch.randn(3, 13, DIM, requires_grad=True))


def test_one_token_at_a_time_is_the_full_matrix():
    attention, x = Attention(DIM, HEADS, 5), torch.randn(2, 17, DIM)
    torch.testing.assert_close(in_pieces(attention, x, range(1, 17))[0], naive(attention, x))


def test_rows_at_different_counts_each_see_their_own_past():
    attention, x = Attention(DIM, HEADS, 6), torch.randn(3, 12, DIM)
    begins = [0, 4, 9]
    state, outputs = attention.init_state(3), []
    for t in range(12):
        state = attention.reset_state(state, torch.tensor([t == begin for begin in begins]))
        y, state = attention(x[:, t : t + 1], state)
        outputs.append(y)
    assert state["count"].tolist() == [6, 6, 3]
    for row, begin in enumerate(begins):
        own = torch.cat(outputs, 1)[row, begin:]
        torch.testing.assert_close(own, naive(attention, x[row : row + 1, begin:])[0])


def test_a_token_reaches_itself_and_the_rest_of_its_window_only():
    attention, x = Attention(DIM, HEADS, 4), torch.randn(1, 11, DIM)
    jacobian = torch.autograd.functional.jacobian(lambda x: attention(x)[0], x).abs().amax((0, 2, 3, 5))
    t, s = torch.arange(11)[:, None], torch.arange(11)
    assert torch.equal(jacobian > 1e-12, (s <= t) & (s > t - 4))


def test_a_stream_may_go_on_for_ever():
    attention, x = Attention(DIM, HEADS, 4), torch.randn(1, 600, DIM)
    with torch.no_grad():
        state = attention(x)[1]
        late = attention(x[:, :9], state)
        fresh_cache = attention(x[:, -4:])[1]  # all that a window of four can know
        close(named(*late), named(*attention(x[:, :9], fresh_cache)))
    assert state_bytes(state) == state_bytes(attention.init_state(1))


def test_an_odd_number_of_features_a_head_is_refused():
    for dim, heads in [(9, 2), (6, 2)]:
        with pytest.raises(ValueError, match=f"dim {dim} over {heads} heads"):
            Attention(dim, heads)
