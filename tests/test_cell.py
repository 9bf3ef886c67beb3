"""Memory cells: a controller and its memories are the equations written out, reads reach the controller with their
gradient, any memory is served, and dims that differ are met by maps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import close, config_of, in_pieces, named, slopes, streaming_law
from torch import nn

from losses.recall import mse
from metamem import Network, TokenLevel, build
from metamem.attention import Attention
from metamem.config import ConfigError
from metamem.config.schema import ConnectionConfig
from metamem.controllers import GRU, LSTM, FeedForward
from metamem.layers import Linear
from metamem.memory.base import Memory, Out, writing
from metamem.memory.cell import MemoryCell
from metamem.memory.fast_weights import FastWeights
from metamem.memory.gated_residual import GatedResidual
from metamem.memory.mnm import MNM
from metamem.memory.slots import SAM, SparseOptions

pytestmark = pytest.mark.usefixtures("float64")

DIM, TIME = 6, 7
ROOT = Path(__file__).parent.parent


def level(**settings):
    return TokenLevel("fast", {mse: 1.0}, lr_max=0.5, **settings)


def delta(dim=DIM):
    return FastWeights(dim, [level()], heads=2, chunk=4, signal_at="token")


def mlp_memory(dim=DIM):
    return FastWeights(dim, [level(momentum="learned", forget="learned")], heads=2, hidden=[5], chunk=3)


def mnm(dim=DIM):
    return MNM(dim, [level()], hidden=5, width=4, heads=2)


def graph(dim=DIM):
    connections = [("in", "map"), ("map", "memory"), ("memory", "out")]
    modules = {"map": Linear(dim, dim), "memory": delta(dim)}
    return Network(modules, [ConnectionConfig(source=[a], to=b) for a, b in connections])


def without_dims():
    return Network({}, [ConnectionConfig(source=["in"], to="out")])


def gated():
    return GatedResidual(delta())


def nested():
    """One memory of the shared controller's own, and one with a controller of its own."""
    return MemoryCell(
        DIM, LSTM(DIM, 5, project=False), {"own": delta(), "with": MemoryCell(DIM, GRU(DIM), {"it": mnm()})}
    )


CELLS = {
    "one memory": lambda: MemoryCell(DIM, LSTM(2 * DIM, DIM, project=False), {"long": delta()}),
    "three memories": lambda: MemoryCell(
        DIM, LSTM(8, 5), {"short": Attention(DIM, 1, window=3), "long": mlp_memory(), "other": mnm(4)}
    ),
    "no projection": lambda: MemoryCell(DIM, GRU(DIM, layers=2), {"long": delta(8)}, project=False),
    "feed-forward": lambda: MemoryCell(DIM, FeedForward(9), {"graph": graph()}),
    "gated residual": lambda: MemoryCell(DIM, LSTM(DIM), {"gated": gated()}),
    "dedicated and shared": nested,
}


@pytest.fixture(params=CELLS)
def cell(request):
    return CELLS[request.param]()


def tokens(batch=3, time=TIME):
    return torch.randn(batch, time, DIM, requires_grad=True)


def test_a_cell_is_its_equations(cell):
    """Controller, maps and memories called one after the other on sequences of one token."""
    x = tokens()
    maps = [cell.input, *cell.writers.values(), cell.output]
    reads = [x.new_zeros(3, dim) for dim in cell.reads.values()]
    states, controller, outputs = [None] * len(reads), None, []
    for t in range(TIME):
        h, controller = cell.controller(maps[0](torch.cat([x[:, t], *reads], 1)).unsqueeze(1), controller)
        for number, (memory, write) in enumerate(zip(cell.memories.values(), maps[1:-1], strict=True)):
            y, states[number], *_ = memory(write(h), states[number])
            reads[number] = y[:, 0]
        outputs.append(maps[-1](torch.cat([h[:, 0], *reads], 1)))
    out = cell(x)
    torch.testing.assert_close(out.y, torch.stack(outputs, 1))
    torch.testing.assert_close(list(out.state["reads"].values()), reads)
    assert out.y.shape == (3, TIME, cell.dim_out)


def test_any_split_of_a_sequence_is_the_sequence(cell):
    streaming_law(cell, tokens(), examples=4)


def test_steps_are_the_sequence(cell):
    x, after, outputs = tokens(), None, []
    whole = cell(x)
    steepness = slopes(cell, x, whole.y, whole.state)
    for token in x.unbind(1):
        y, after, aux = cell.step(token, after)
        outputs.append(y)
        assert aux.keys() == whole.aux.keys()
    stepped = torch.stack(outputs, 1)
    close(named(stepped, after), named(whole.y, whole.state))
    close(slopes(cell, x, stepped, after), steepness)


def test_what_was_read_reaches_the_controller_with_its_gradient_inside_a_sequence(cell):
    """The columns of the controller's input that take the reads: from the second token on, never zero."""
    x = tokens()
    cell(x).y.square().sum().backward()
    first = cell.input if isinstance(cell.input, nn.Linear) else cell.controller
    weight = first.layers.weight_ih_l0 if isinstance(first, LSTM) else first.weight
    columns = weight.grad[:, DIM:].abs().sum(0)
    assert columns.shape == (sum(cell.reads.values()),) and (columns > 0).all()


def test_a_token_changes_later_outputs_through_the_reads_alone():
    """A controller without a past, a memory of the past: all that a later output knows of a token, the memory told."""
    memory = delta()
    cell, x = MemoryCell(DIM, FeedForward(DIM), {"long": memory}), tokens()
    gradient = torch.autograd.grad(cell(x).y[:, -1].sum(), x)[0]
    assert (gradient.abs().amax((0, 2)) > 0).all()
    with writing(cell, False):
        gradient = torch.autograd.grad(cell(x).y[:, -1].sum(), x, retain_graph=True)[0]
    with torch.no_grad():
        cell.input.weight[:, DIM:] = 0  # the reads go nowhere, and nothing is written
    with writing(cell, False):
        gradient = torch.autograd.grad(cell(x).y[:, -1].sum(), x)[0]
    assert gradient[:, :-1].eq(0).all() and gradient[:, -1].ne(0).any()


def test_reading_leaves_every_memory_as_it_was():
    cell, x = nested(), tokens().detach()
    state = cell(x).state
    y, after = cell.read(x, state)
    assert not torch.allclose(after["reads"]["own"], state["reads"]["own"])
    own, deep = after["memories"]["own"]["levels"], after["memories"]["with"]["memories"]["it"]["levels"]
    close(named(y, own), named(y, state["memories"]["own"]["levels"]))
    close(named(y, deep), named(y, state["memories"]["with"]["memories"]["it"]["levels"]))
    assert all(part.writing for part in cell.modules() if hasattr(part, "writing"))
    cell.writing = False
    torch.testing.assert_close(cell(x, state).y, y)
    cell.writing = True
    written = cell.write(x, state)
    close(named(y, written), named(y, cell(x, state).state))
    assert not torch.allclose(named(y, written["memories"])["own/levels/fast/delta/0"], named(y, own)["fast/delta/0"])


def test_what_memories_measure_comes_out_by_their_names():
    aux = nested()(tokens()).aux
    assert aux["own.surprise"].shape[:2] == (3, TIME) == aux["with.it.surprise"].shape[:2]


def test_no_map_stands_where_widths_meet():
    cell = CELLS["one memory"]()
    assert isinstance(cell.input, nn.Identity) and isinstance(cell.writers["long"], nn.Identity)
    cell = CELLS["three memories"]()
    assert (cell.input.in_features, cell.input.out_features) == (DIM + DIM + DIM + 4, 8)
    assert (cell.writers["other"].in_features, cell.writers["other"].out_features) == (8, 4)
    assert cell.dim_out == DIM and CELLS["no projection"]().dim_out == DIM + 8


def test_an_empty_sequence_changes_nothing(cell):
    x = tokens().detach()
    state = cell(x).state
    y, after, _ = cell(x[:, :0], state)
    assert y.shape == (3, 0, cell.dim_out)
    close(named(x, after), named(x, state))


class InPlace(Memory):
    """A sum of what it read, added up in place within a loop; its step says where it was not opened."""

    dim_in = dim_out = 5

    def init_state(self, batch):
        return {"sum": torch.zeros(batch, 5)}

    def open(self, state, tokens):
        return {"sum": state["sum"].clone(), "left": tokens}

    def close(self, state):
        return {"sum": state["sum"]}

    def step(self, x, state=None):
        state["sum"].add_(x.detach())
        return Out(state["sum"].clone(), {"sum": state["sum"], "left": state["left"] - 1}, {})


def test_a_memory_is_opened_for_the_loop_and_closed_after_it():
    cell = MemoryCell(DIM, FeedForward(DIM, 5), {"deep": GatedResidual(InPlace())})
    x = tokens().detach()
    state = cell.init_state(3)
    first = cell(x, state)
    assert list(first.state["memories"]["deep"]) == ["sum"] and state["memories"]["deep"]["sum"].eq(0).all()
    torch.testing.assert_close(cell(x[:, 3:], cell(x[:, :3], state).state).state, first.state)
    opened = cell.open(state, 4)
    for t in range(3):
        _, opened, _ = cell.step(x[:, t], opened)
    assert opened["memories"]["deep"]["left"] == 1
    torch.testing.assert_close(cell.close(opened), cell(x[:, :3], state).state)


COMPILED = """
import torch
from torch._dynamo.backends.debugging import aot_eager
from metamem import GatedResidual, MemoryCell
from metamem.controllers import FeedForward
from metamem.memory.slots import DNC, DNCOptions

torch.set_default_dtype(torch.float64)
slots = GatedResidual(DNC(8, DNCOptions(slots=6, word=4, dim_out=8)))
cell, x = MemoryCell(8, FeedForward(8), {"slots": slots}), torch.randn(2, 3, 8, requires_grad=True)
made = []
for run in (cell, torch.compile(cell, fullgraph=True, backend=aot_eager)):
    y = run(x).y
    made.append([y, *torch.autograd.grad(y.square().sum(), [x, *cell.parameters()])])
torch.testing.assert_close(made[1], made[0], rtol=1e-9, atol=1e-11)
"""


@pytest.mark.slow
def test_a_cell_compiles_whole():
    """But for torch's LSTM and GRU, which torch.compile refuses. In a process of its own, without jaxtyping."""
    environment = {**os.environ, "JAXTYPING_DISABLE": "1"}
    command = [sys.executable, "-c", COMPILED]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


COMPILED_STEP = """
import torch
from torch._dynamo.backends.debugging import aot_eager
from metamem import MemoryCell
from metamem.controllers import GRU, LSTM
from metamem.memory import cell
from metamem.memory.slots import DNC, NTM, DNCOptions, NTMOptions

graphs = []

def backend(graph, inputs):
    assert not torch._functorch.config.donated_buffer, "inductor's backward could not be run again"
    graphs.append(graph)
    return aot_eager(graph, inputs)

compiled = torch.compile(MemoryCell._tokens, fullgraph=True, dynamic=False, backend=backend)
cell._compiled = lambda: compiled
torch.set_default_dtype(torch.float64)
x = torch.randn(2, 12, 8, requires_grad=True)
for controller in (LSTM, GRU):
    made = []
    for compiles in (False, True):
        torch.manual_seed(0)
        memories = {"dnc": DNC(8, DNCOptions(slots=6, word=4)), "ntm": NTM(5, NTMOptions(slots=6, word=4))}
        whole = MemoryCell(8, controller(8), memories, compile_step=compiles)
        y, state, _ = whole(x)
        step = whole.step(x[:, 0], state).y
        total = y.square().sum() + step.square().sum()
        once = torch.autograd.grad(total, [x, *whole.parameters()], retain_graph=True)
        again = torch.autograd.grad(total, [x, *whole.parameters()])
        assert all(map(torch.equal, once, again))
        made.append([y, step, *once])
    torch.testing.assert_close(made[1], made[0], rtol=1e-9, atol=1e-11)
    assert len(graphs) == 2, f"{len(graphs)} graphs for twelve tokens and one"
    graphs.clear()
assert not torch._dynamo.config.allow_rnn
"""


@pytest.mark.slow
def test_a_cell_compiles_a_few_tokens_at_a_time_in_two_graphs():
    """With torch's LSTM and GRU; one graph for five tokens, from the first on, and one for those that remain, whose
    backward can keep its graph for another."""
    environment = {**os.environ, "JAXTYPING_DISABLE": "1"}
    command = [sys.executable, "-c", COMPILED_STEP]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def test_a_memory_that_is_written_in_place_cannot_be_compiled():
    memory = GatedResidual(SAM(8, SparseOptions(dim_out=8)))
    with pytest.raises(ValueError, match="the memory 'sparse', a SAM, is written in place"):
        MemoryCell(8, LSTM(8), {"sparse": memory}, compile_step=True)


# The gated residual


def test_a_gated_residual_is_its_equation():
    memory, x = gated(), tokens()
    with torch.no_grad():
        nn.init.normal_(memory.gate.project.weight)
    read = memory.memory(x).y
    gate = (torch.cat([read, x], -1) @ memory.gate.project.weight.T + memory.gate.project.bias).sigmoid()
    out = memory(x)
    torch.testing.assert_close(out.y, gate * read + (1 - gate) * x)
    torch.testing.assert_close(out.aux["gate"], gate.mean(-1))
    torch.testing.assert_close(out.aux["surprise"], memory.memory(x).aux["surprise"])
    streaming_law(memory, x, examples=4)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_gated_residual_starts_at_its_initial_gate(share):
    memory, x = GatedResidual(delta(), initial_gate=share), tokens()
    torch.testing.assert_close(memory(x).y, share * memory.memory(x).y + (1 - share) * x)


def test_a_gated_residual_reads_and_writes_as_its_memory_does():
    memory, x = gated(), tokens().detach()
    state = memory.write(x, memory.init_state(3))
    close(named(x, state), named(x, memory.memory(x).state))
    y, after = memory.read(x, state)
    close(named(x, after["levels"]), named(x, state["levels"]))
    memory.writing = False
    torch.testing.assert_close(memory(x, state).y, y)
    assert memory.memory.writing


# What cannot be


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: MemoryCell(DIM, LSTM(DIM), {}), "needs at least one memory"),
        (lambda: MemoryCell(0, LSTM(DIM), {"a": delta()}), "dim must be at least 1, not 0"),
        (lambda: MemoryCell(DIM, LSTM(DIM), {"keys": delta()}), "'keys' is no name for a memory"),
        (lambda: MemoryCell(DIM, LSTM(DIM), {"a.b": delta()}), "'a.b' is no name for a memory"),
        (
            lambda: MemoryCell(DIM, LSTM(DIM), {"a": without_dims()}),
            "'a', a Network, does not say what it takes",
        ),
        (lambda: GatedResidual(LSTM(4, 5, project=False)), "not one of dims 4 and 5"),
        (lambda: GatedResidual(delta(), initial_gate=1.0), "initial_gate must be between 0 and 1, not 1.0"),
    ],
)
def test_what_cannot_be_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


# In a config

CELL = """
name: cell
task: {name: none}
network:
  modules:
    embed: {kind: embedding, size: 7, dim: 6}
    cell:
      kind: memory_cell
      dim: 6
      controller: {kind: CONTROLLER, dim: 10, hidden: 5}
      memories:
        short: {kind: attention, dim: 6, heads: 1, window: 3}
        long: {kind: gated_residual, memory: {kind: fast_weights, dim: 6, heads: 2, chunk: 4}}
    head: {kind: linear, dim_in: 6, dim_out: 7}
  connections:
    - {from: in, to: embed}
    - {from: embed, to: cell}
    - {from: cell, to: head}
    - {from: head, to: out}
hierarchy:
  groups:
    all: {match: "**"}
    memory: {match: "cell.memories.*.memory.init.**", scope: sample}
  levels:
    - {name: surprise, clock: token, objective: {losses.recall.mse: 1.0}, rule: {}, groups: [memory]}
    - {name: task, clock: step, objective: {losses.outer.next_token: 1.0},
       optimizer: {name: sgd, lr: 0.1}, groups: [all]}
training: {length: 8}
"""


def test_a_config_names_controller_and_memories():
    network = build(config_of(CELL.replace("CONTROLLER", "gru")))
    assert isinstance(network.cell.controller, GRU)
    assert isinstance(network.cell.memories["long"].memory, FastWeights)
    names = dict(network.named_parameters())
    assert "cell.memories.long.memory.init.0" in names and "cell.controller.layers.weight_ih_l0" in names
    x = torch.randint(7, (2, 9))
    whole = network(x)
    assert "cell.long.surprise" in whole.aux
    close(named(*in_pieces(network, x, [3, 4])), named(whole.y, whole.state))


@pytest.mark.parametrize(
    ("line", "other", "told"),
    [
        ("kind: CONTROLLER", "kind: grru", r"cell.controller.kind: there is no module kind 'grru'; did you mean 'gru'"),
        (
            "kind: CONTROLLER, dim: 10, hidden: 5",
            "kind: attention, dim: 10, heads: 1",
            r"controller.kind: 'attention' is no Controller \(feed_forward, grid_lstm",
        ),
        ("kind: attention", "kind: rms_norm", "memories.short"),
        ("dim: 6, heads: 1", "dims: 6, heads: 1", r"memories.short.dims: .* no such option; did you mean 'dim'"),
        (
            "cell.memories.*.memory",
            "memories.*.memory",
            r"names the weights of this memory, cell.memories.long.memory.init",
        ),
    ],
)
def test_what_is_wrong_in_a_cell_is_told_with_its_place(line, other, told):
    with pytest.raises(ConfigError, match=told):
        build(config_of(CELL.replace(line, other).replace("CONTROLLER, dim: 10, hidden: 5", "gru, dim: 10")))
