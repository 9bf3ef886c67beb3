"""What `compile_chunk` does besides compiling: it cuts a call into graphs, and leaves biases to the sums.

Here its graphs are the plain functions; `torch.compile` itself is in test_conformance, among the slow ones.
"""

import pytest
import torch
from conformance import MEMORIES, close, gradients, midstream, tensors, tokens

from metamem.memory import chunkwise, compiled
from metamem.memory.dual import affine, local_read, outer_sum

CHUNKWISE = ("titans-like", "ttt-mlp", "lact", "atlas")


@pytest.fixture
def graphs(monkeypatch):
    """The segments of each graph that is called."""
    called = []

    def graph(executor):
        def call(learner, span, *arguments):
            called.append(span)
            return executor(learner, span, *arguments)

        return call

    monkeypatch.setattr(compiled, "_graph", graph)
    return called


def results(memory, x, state=None):
    out = memory(x, state)
    return {**tensors(out), **{f"d {key}": value for key, value in gradients(memory, x, out).items()}}


@pytest.mark.parametrize("begun", [0, 3], ids=["from a chunk's start", "from its middle"])
@pytest.mark.parametrize("name", CHUNKWISE)
def test_cut_into_graphs_it_gives_the_same(name, begun, graphs):
    memory, x = MEMORIES[name].build(), tokens(2, 27).requires_grad_()
    state = midstream(memory, 2, begun) if begun else None
    expected = results(memory, x, state)
    assert graphs == []
    memory.compile_chunk = True
    close(results(memory, x, state), expected)
    counts = [len(span.segments) for span in graphs]
    assert set(counts) <= {1, compiled.TOGETHER} and counts.count(compiled.TOGETHER) >= 1
    assert sum(span.length * len(span.segments) for span in graphs) == 27
    assert all(span.start == 0 for span in graphs), "a graph knows no place"


@pytest.mark.parametrize("name", CHUNKWISE)
def test_biases_added_are_inputs_of_one(name, monkeypatch):
    memory, x = MEMORIES[name].build(), tokens(2, 11).requires_grad_()
    expected = results(memory, x)
    monkeypatch.setattr(chunkwise, "_ones", lambda: False)
    close(results(memory, x), expected)


def test_the_parts_of_a_biased_write_and_read():
    torch.manual_seed(0)
    read, written, signal = (torch.randn(2, 5, width, dtype=torch.float64) for width in (3, 3, 4))
    strength, weight, rate = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((5, 5), (4, 4), (5,)))
    one = torch.ones(2, 5, 1, dtype=torch.float64)
    reads, writes = (torch.cat([x, one], -1) for x in (read, written))
    assert affine(read, weight).shape == (2, 5, 4)
    torch.testing.assert_close(affine(read, weight), reads @ weight)
    torch.testing.assert_close(affine(reads, weight), reads @ weight)
    torch.testing.assert_close(
        local_read(strength, read, written, signal, bias=True), (strength * (reads @ writes.mT)) @ signal
    )
    expected = torch.einsum("bs,bsi,bso->bio", rate, writes, signal)
    torch.testing.assert_close(outer_sum(rate, written, signal, bias=True), expected)
    torch.testing.assert_close(outer_sum(rate, writes, signal), expected)
