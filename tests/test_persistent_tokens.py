"""Persistent tokens: a memory that has read them goes on as one that was given them as its first tokens."""

import pytest
import torch
from conformance import DIM, MEMORIES, Out, close, fast, of_rows, tensors
from small_models import shaken, with_memory

from metamem import Session
from metamem.attention import Attention
from metamem.memory.fast_weights import FastWeights
from metamem.memory.persistent_tokens import PersistentTokens
from metamem.state import Stateful

pytestmark = pytest.mark.usefixtures("float64")


def made(memory="titans-like", tokens=3):
    torch.manual_seed(0)
    return PersistentTokens(tokens, MEMORIES[memory].build())


@pytest.mark.parametrize("memory", ["titans-like", "gated-delta-momentum"])
def test_they_are_the_first_tokens_of_every_stream(memory):
    """3 tokens, and chunks of 4: the stream's first token ends a chunk."""
    module, x = made(memory), torch.randn(2, 9, DIM)
    out = module(x)
    whole = module.memory(torch.cat([module.tokens.expand(2, -1, -1), x], 1))
    late = Out(whole.y[:, 3:], whole.state, {key: value[:, 3:] for key, value in whole.aux.items()})
    close(tensors(Out(out.y, out.state["memory"], out.aux)), tensors(late))


def test_they_are_read_once_and_by_the_rows_that_begin():
    module, x = made(), torch.randn(3, 9, DIM)
    state = module(x[:, :4]).state
    assert state["begun"].all()
    state = module.reset_state(state, torch.tensor([False, True, False]))
    assert state["begun"].tolist() == [True, False, True]
    out = module(x[:, 4:], state)
    close(of_rows(tensors(out), [1]), tensors(module(x[1:2, 4:])))
    whole = module(x[[0, 2]])
    late = Out(whole.y[:, 4:], whole.state, {key: value[:, 4:] for key, value in whole.aux.items()})
    close(of_rows(tensors(out), [0, 2]), tensors(late))


def test_an_empty_call_begins_nothing():
    module = made()
    state = module(torch.randn(2, 0, DIM)).state
    assert not state["begun"].any()
    x = torch.randn(2, 5, DIM)
    close(tensors(module(x, state)), tensors(module(x)))


def test_a_session_begins_a_stream_with_them():
    """Also at every reset; and a memory that does not write reads its initial weights, tokens or none."""
    memory = "{kind: fast_weights, dim: 6, heads: 2, chunk: 4}"
    config = with_memory(f"{{kind: persistent_tokens, tokens: 2, memory: {memory}}}", "memory.memory.init.**")
    model, tokens = shaken(config), torch.randint(7, (1, 12))
    session = Session(model, config, reset_every=6)
    losses = session.observe(tokens).losses
    again = Session(model, config)
    again.last = tokens[:, 5:6]
    torch.testing.assert_close(losses[:, 6:], again.observe(tokens[:, 6:]).losses)
    frozen = [Session(model, config, writing=False).observe(tokens).losses]
    with torch.no_grad():
        model.get_parameter("memory.tokens").add_(1.0)
    frozen.append(Session(model, config, writing=False).observe(tokens).losses)
    assert torch.equal(*frozen)
    assert not torch.allclose(losses, Session(model, config, reset_every=6).observe(tokens).losses)


@pytest.mark.parametrize(
    ("tokens", "memory", "told"),
    [
        (0, lambda: FastWeights(DIM, [fast()]), "tokens must be at least 1, not 0"),
        (2, Stateful, "the memory does not say what it takes"),
        (2, lambda: Attention(DIM, 2, window=None), "give it `persistent` instead"),
    ],
    ids=["no token", "no dim", "a cache that grows"],
)
def test_a_memory_that_cannot_read_them_is_refused(tokens, memory, told):
    with pytest.raises(ValueError, match=told):
        PersistentTokens(tokens, memory())
