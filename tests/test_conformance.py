"""Every gate on every memory of the table in conformance.py; and, compiled, the same numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conformance import GATES, MEMORIES

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_conformance(memory, gate):
    entry = MEMORIES[memory]
    if gate in entry.exempt:
        pytest.skip(f"{memory} documents that it does not pass {gate}")
    GATES[gate](entry)


def test_every_exemption_names_a_gate():
    assert {gate for entry in MEMORIES.values() for gate in entry.exempt} <= set(GATES)


COMPILED = """
import sys, torch
from conformance import MEMORIES, gradients, tensors, tokens

torch.set_num_threads(1)
name, backend, length = sys.argv[1:]
memory = MEMORIES[name].build(torch.float32)
compiled = torch.compile(memory, fullgraph=True, backend=backend)
x = tokens(2, int(length), torch.float32).requires_grad_()
with torch.no_grad():  # a state enters a compiled memory at a boundary of its chunks and periods
    state = memory(tokens(2, 8, torch.float32)).state
results = []
for run in (memory, compiled):
    out = run(x, state)
    results.append({**tensors(out), **{f"d {key}": value for key, value in gradients(memory, x, out).items()}})
for key, expected in results[0].items():
    torch.testing.assert_close(results[1][key], expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{key}: {text}")
"""


@pytest.mark.parametrize(
    ("memory", "backend", "length"),
    [
        pytest.param("delta-two-levels", "aot_eager", 11, id="delta-two-levels-graph", marks=pytest.mark.slow),
        pytest.param("titans-like", "inductor", 4, id="titans-like-inductor", marks=pytest.mark.slow),
        pytest.param("context-titans", "aot_eager", 11, id="context-titans-graph", marks=pytest.mark.slow),
        pytest.param("routed-blocks", "aot_eager", 11, id="routed-blocks-graph", marks=pytest.mark.slow),
        pytest.param("routed-layers", "aot_eager", 8, id="routed-layers-graph", marks=pytest.mark.slow),
        pytest.param("mnm-g", "aot_eager", 3, id="mnm-g-graph"),
        pytest.param("mnm-p", "inductor", 3, id="mnm-p-inductor", marks=pytest.mark.slow),
        pytest.param("dnc", "aot_eager", 3, id="dnc-graph", marks=pytest.mark.slow),
        pytest.param("ntm", "aot_eager", 2, id="ntm-graph", marks=pytest.mark.slow),
        pytest.param("delta", "inductor", 4, id="delta-inductor", marks=pytest.mark.slow),
        pytest.param("gated-delta-momentum", "inductor", 8, id="gated-delta-inductor", marks=pytest.mark.slow),
        pytest.param("mlp3-two-levels", "inductor", 8, id="mlp3-two-levels-inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_in_one_graph_it_gives_the_same_numbers(memory, backend, length):
    """Forward and backward, `fullgraph=True`; `aot_eager` takes the same two graphs, without the wait for a C++
    compiler, which has once given wrong gradients of a state. In a process of its own: torch.compile cannot see
    through jaxtyping."""
    run_compiled(COMPILED, memory, backend, str(length))


def run_compiled(code, *arguments):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAXTYPING_DISABLE": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]


TOKEN_BY_TOKEN = """
import torch
from conformance import DIM, SIZES, gradients, tensors, tokens
from metamem.memory.slots import DNC, NTM, DNCOptions, NTMOptions, slot_memory
from torch._dynamo.backends.debugging import aot_eager

torch.set_num_threads(1)
graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return aot_eager(graph, inputs)

compiled = torch.compile(slot_memory.token, fullgraph=True, dynamic=False, backend=backend)
slot_memory._compiled = lambda: compiled
for kind, options in ((DNC, DNCOptions), (NTM, NTMOptions)):
    results, x = [], tokens(2, 9).requires_grad_()
    for compiles in (False, True):
        torch.manual_seed(0)
        memory = kind(DIM, options(**SIZES, compile_step=compiles)).double()
        graphs.clear()
        out = memory(x)
        results.append({**tensors(out), **{f"d {key}": value for key, value in gradients(memory, x, out).items()}})
    for key, expected in results[0].items():
        message = lambda text: f"{kind.__name__} {key}: {text}"
        torch.testing.assert_close(results[1][key], expected, rtol=1e-6, atol=1e-8, msg=message)
    assert 1 <= len(graphs) <= 3, f"{kind.__name__}: {len(graphs)} graphs for nine tokens"
"""


@pytest.mark.slow
def test_compiled_token_by_token_slots_give_the_same_numbers_in_a_few_graphs():
    """`compile_step`: a graph for the first token, whose state needs no gradient, and one for all after it."""
    run_compiled(TOKEN_BY_TOKEN)


CHUNK_BY_CHUNK = """
import torch
from conformance import MEMORIES, gradients, tensors, tokens
from metamem.memory import chunkwise, compiled
from torch._dynamo.backends.debugging import aot_eager

torch.set_num_threads(1)
graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return aot_eager(graph, inputs)

graph = torch.compile(
    chunkwise.run, fullgraph=True, dynamic=False, recompile_limit=compiled.GRAPHS, backend=backend
)
compiled._graph = lambda executor: graph
for name in ("titans-like", "ttt-mlp", "lact", "atlas"):
    memory = MEMORIES[name].build(torch.float64)
    x = tokens(2, 27).requires_grad_()
    results = []
    for memory.compile_chunk in (False, True):
        graphs.clear()
        out = memory(x)
        results.append({**tensors(out), **{f"d {key}": value for key, value in gradients(memory, x, out).items()}})
    for key, expected in results[0].items():
        message = lambda text: f"{name} {key}: {text}"
        torch.testing.assert_close(results[1][key], expected, rtol=1e-6, atol=1e-8, msg=message)
    assert 1 <= len(graphs) <= 3, f"{name}: {len(graphs)} graphs for seven segments"
"""


@pytest.mark.slow
def test_compiled_chunk_by_chunk_it_gives_the_same_numbers_in_a_few_graphs():
    """A graph for some chunks together, one for a chunk, and one for what is left over; not one a chunk."""
    run_compiled(CHUNK_BY_CHUNK)
