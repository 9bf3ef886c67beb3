"""Memory as context in a model: built from a config, adapted in a session, refused where it cannot be. Its equations
are in test_titans_blocks.py, its laws in conformance.py."""

import pytest
import torch
from conformance import DIM, MEMORIES, close, tensors
from small_models import shaken, streaming_law, with_memory

from metamem import ConfigError, Session, build
from metamem.memory.context import MemoryAsContext

pytestmark = pytest.mark.usefixtures("float64")
MEMORY = "{kind: fast_weights, dim: 6, heads: 2, chunk: 4, signal_at: token}"


def context(memory=MEMORY, options="heads: 1, segment: 3, persistent: 2", glob="memory.memory.init.**"):
    return with_memory(f"{{kind: memory_as_context, dim: 6, {options}, memory: {memory}}}", glob)


@pytest.mark.parametrize("segment", [1, 50])
def test_streaming_law_at_any_segment(segment):
    """One token; more than the stream."""
    memory = MEMORIES["titans-like"].build()
    module = MemoryAsContext(DIM, memory, heads=2, segment=segment, persistent=1)
    streaming_law(module, torch.randn(3, 13, DIM, requires_grad=True), examples=2)


def test_within_the_first_segment_attention_sees_the_initial_memory():
    """What a token retrieves is the memory at the segment's start: the writes of its own segment do not move it."""
    module, x = MEMORIES["context-delta"].build(), torch.randn(1, 5, DIM)
    recall = module(x).state["recall"]
    close({"h": module.memory.read(x, recall)[0]}, {"h": module.memory.read(x, module.memory.init_state(1))[0]})
    moved = module(torch.cat([x, x[:, :1]], 1)).state["recall"]  # the sixth token begins a segment
    assert not torch.allclose(module.memory.read(x, moved)[0], module.memory.read(x, recall)[0], atol=1e-3)


def test_what_is_retrieved_reaches_the_output_and_the_persistent_tokens_too():
    """Past the first segment an earlier token is seen through the memory only; without writes, not at all."""
    module, x = MEMORIES["context-delta"].build(), torch.randn(1, 10, DIM, requires_grad=True)
    reach = torch.autograd.grad(module(x).y[0, 5].sum(), x)[0].abs().amax(-1)[0]
    assert (reach[:6] > 1e-9).all() and (reach[6:] == 0).all()
    module.memory.writing = False
    reach = torch.autograd.grad(module(x).y[0, 5].sum(), x)[0].abs().amax(-1)[0]
    assert (reach[:5] == 0).all() and reach[5] > 1e-9


def test_a_read_of_nothing_is_what_the_initial_memory_makes_of_nothing():
    """Without persistent tokens and before the first token, attention has nothing to see and gives zero."""
    module, x = MEMORIES["context-titans"].build(), torch.randn(2, 3, DIM)
    y, _ = module.read(x, module.init_state(2))
    nothing = torch.zeros_like(x)
    torch.testing.assert_close(y, module.gate(nothing, module.memory.read(nothing, module.memory.init_state(2))[0]))


def test_an_empty_call_measures_what_any_call_does():
    module = MEMORIES["context-titans"].build()
    out = module(torch.randn(2, 0, DIM))
    assert out.y.shape == (2, 0, DIM) and out.aux["surprise"].shape == (2, 0)
    close(tensors(module(torch.ones(2, 3, DIM), out.state)), tensors(module(torch.ones(2, 3, DIM))))


def test_its_memory_is_given_the_levels_that_name_it_and_its_measures_have_its_path():
    model = build(context())
    assert [level.name for level in model.memory.memory.levels] == ["surprise"]
    assert list(model(torch.zeros(1, 2, dtype=torch.long)).aux) == ["memory.surprise"]


def test_a_session_with_it_is_saved_in_mid_segment_and_goes_on(tmp_path):
    config = context()
    model, tokens = shaken(config), torch.randint(7, (1, 17))
    whole, session, other = (Session(model, config) for _ in range(3))
    losses = whole.observe(tokens).losses
    session.observe(tokens[:, :8])
    session.save(tmp_path / "session")
    other.load(tmp_path / "session")
    torch.testing.assert_close(other.observe(tokens[:, 8:]).losses, losses[:, 8:])


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (dict(options="segment: 0"), "network.modules.memory: segment must be at least 1 token, not 0"),
        (dict(options="heads: 2, persistent: -1"), "persistent must be a number of tokens, not -1"),
        (dict(options="heads: 4"), "dim 6 over 4 heads must give each an even number of features"),
        (dict(memory=MEMORY.replace("6", "8")), "the memory takes dim 8 and gives 8, and tokens here have 6"),
        (dict(memory="{kind: mlp, dim: 6}"), "memory.memory.kind: 'mlp' is no Memory (dnc, episodic, fast_weights"),
        (
            dict(memory=MEMORY.replace("heads: 2", "heads: x")),
            "network.modules.memory.memory.heads: expected an integer",
        ),
        (
            dict(memory="{dim: 6}"),
            "network.modules.memory.memory.kind: is missing: name a module kind, such as attention",
        ),
        (dict(glob="memory.init.**"), "no token level names the weights of this memory, memory.memory.init.*"),
    ],
    ids=lambda case: None if isinstance(case, str) else next(iter(case.values()))[:20],
)
def test_what_cannot_be_is_refused_in_one_line(config, told):
    with pytest.raises(ConfigError) as error:
        build(context(**config))
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) == 1
