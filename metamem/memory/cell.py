"""A memory cell: a controller and the memories that it serves, token by token.

    h_t   = controller([x_t, r^1_{t−1}, …, r^M_{t−1}])
    r^m_t = memory^m(h_t)                                  each writes and reads in its own order
    y_t   = [h_t, r^1_t, …, r^M_t] W + b

(Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, for one memory.) Controller
and memories meet in vectors only: where widths differ, a linear map stands between. A cell is a memory itself: in the
place of a memory it is one with a controller of its own, so dedicated and shared controllers mix, to any depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metamem.controllers.base import Controller
from metamem.memory.base import Memory, Out, writing
from metamem.registry import MODULES
from metamem.state import State, Stateful, align, tree_map

Tokens = Callable[["MemoryCell", Tensor, State], tuple[Tensor, State, dict[str, Tensor]]]

# Tokens of a compiled graph: they share what a call costs beside its kernels, and the wait grows with them.
UNROLLED = 5


class MemoryCellState(TypedDict):
    """The controller's state; the last read of each memory, and its state, by name."""

    controller: State
    reads: dict[str, Float[Tensor, "batch _dim_read"]]
    memories: dict[str, State]


@MODULES.register("memory_cell")
class MemoryCell(Memory):
    """`controller` with `memories`, each a module with a state: a memory, an attention, a graph, another cell.

    - `dim`       of x, and of y
    - `project`   false: y_t = [h_t, r_t] itself
    - `compile_step`   five tokens, controller and memories, are one compiled graph, and those that remain one each

    aux: what the memories measure, `<name>.<measure>`. Raises ValueError for no memory, a name that torch modules use,
    a memory that does not say its dims, and `compile_step` with one that torch.compile does not take.
    """

    def __init__(
        self,
        dim: int,
        controller: Controller,
        memories: dict[str, Stateful],
        project: bool = True,
        compile_step: bool = False,
    ) -> None:
        super().__init__()
        _check(dim, memories)
        self.compile_step = compile_step
        if compile_step:
            _check_compiles(memories)
        self.controller = controller
        self.memories = nn.ModuleDict(memories)
        self.names = tuple(memories)
        dims: dict[str, Any] = {name: (memory.dim_in, memory.dim_out) for name, memory in memories.items()}
        self.reads: dict[str, int] = {name: dim_out for name, (_, dim_out) in dims.items()}
        read = sum(self.reads.values())
        self.input = between(dim + read, controller.dim_in)
        self.writers = nn.ModuleDict({name: between(controller.dim_out, dim_in) for name, (dim_in, _) in dims.items()})
        self.output = nn.Linear(controller.dim_out + read, dim) if project else nn.Identity()
        self.register_buffer("nothing", torch.zeros(0), persistent=False)  # knows the device and the type of reads
        self.dim_in, self.dim_out = dim, dim if project else controller.dim_out + read

    def init_state(self, batch: int) -> State:
        """Controller and memories at their start; nothing was read."""
        nothing = self.get_buffer("nothing")
        return {
            "controller": self.controller.init_state(batch),
            "reads": {name: nothing.new_zeros(batch, dim) for name, dim in self.reads.items()},
            "memories": {name: self._memory(name).init_state(batch) for name in self.names},
        }

    def reset_state(self, state: State, rows: Bool[Tensor, "batch"] | None = None) -> State:
        """Each part's own reset."""
        if rows is None:
            return self.init_state(next(iter(state["reads"].values())).shape[0])
        memories = state["memories"].items()
        return {
            "controller": self.controller.reset_state(state["controller"], rows),
            "reads": tree_map(lambda read: torch.where(align(rows, read), 0, read), state["reads"]),
            "memories": {name: self._memory(name).reset_state(part, rows) for name, part in memories},
        }

    def forward(self, x: Float[Tensor, "batch time dim"], state: State | None = None) -> Out:
        """Each token moves the controller, which writes and reads every memory."""
        if not self.writing:
            with writing(self, False):
                return self._run(x, state)
        return self._run(x, state)

    def step(self, x: Float[Tensor, "batch dim"], state: State | None = None) -> Out:
        """One token."""
        state = self.init_state(x.shape[0]) if state is None else state
        with _run_of(self) as run:
            given, after, aux = run(self, x.unsqueeze(1), state)
        return Out(self.output(given[:, 0]), after, {name: value[:, 0] for name, value in aux.items()})

    def open(self, state: State, tokens: int) -> State:
        """Every memory's state, opened."""
        return {
            **state,
            "memories": {name: self._opened(name, part, tokens) for name, part in state["memories"].items()},
        }

    def close(self, state: State) -> State:
        """Every memory's state, closed."""
        return {**state, "memories": {name: self._closed(name, part) for name, part in state["memories"].items()}}

    def write(self, x: Float[Tensor, "batch time dim"], state: State) -> State:
        """The state after x moved the controller and was written."""
        return self._run(x, state).state

    def read(self, x: Float[Tensor, "batch time dim"], state: State) -> tuple[Tensor, State]:
        """What controller and memories make of x, the memories as they are; the controller moves."""
        with writing(self, False):
            out = self._run(x, state)
        return out.y, out.state

    def _run(self, x: Tensor, state: State | None) -> Out:
        state = self.init_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return Out(x.new_zeros(*x.shape[:2], self.dim_out), state, {})
        state = self.open(state, x.shape[1])
        outputs, measured, compiles = [], [], _compiles(self)
        if compiles and torch.is_grad_enabled() and not _transformed():
            state = tree_map(_with_gradient, state)
        with _run_of(self) as run:
            for part in x.split(_split(x.shape[1]) if compiles else x.shape[1], 1):
                y, state, aux = run(self, part, state)
                outputs.append(y)
                measured.append(aux)
        aux = {name: torch.cat([one[name] for one in measured], 1) for name in measured[0]}
        return Out(self.output(torch.cat(outputs, 1)), self.close(state), aux)

    def _tokens(self, x: Tensor, state: State) -> tuple[Tensor, State, dict[str, Tensor]]:
        """[h, r] of some tokens, the state after them, and what was measured at each."""
        outputs, measured = [], []
        for now in x.unbind(1):
            y, state, aux = self._token(now, state)
            outputs.append(y)
            measured.append(aux)
        return torch.stack(outputs, 1), state, {name: torch.stack([a[name] for a in measured], 1) for name in aux}

    def _token(self, x: Tensor, state: State) -> tuple[Tensor, State, dict[str, Tensor]]:
        """[h, r] of a token, the state after it, and what was measured."""
        given = self.input(torch.cat([x, *state["reads"].values()], -1))
        h, controller = self.controller.step(given, state["controller"])
        reads, memories, aux = {}, {}, {}
        for name in self.names:
            out = self._memory(name).step(self.writers[name](h), state["memories"][name])
            reads[name], memories[name], *measured = out
            aux.update({f"{name}.{key}": value for part in measured for key, value in part.items()})
        after = {"controller": controller, "reads": reads, "memories": memories}
        return torch.cat([h, *reads.values()], -1), after, aux

    def _opened(self, name: str, state: State, tokens: int) -> State:
        memory = self._memory(name)
        return memory.open(state, tokens) if isinstance(memory, Memory) else state

    def _closed(self, name: str, state: State) -> State:
        memory = self._memory(name)
        return memory.close(state) if isinstance(memory, Memory) else state

    def _memory(self, name: str) -> Stateful:
        memory = self.memories[name]
        assert isinstance(memory, Stateful)
        return memory


@functools.cache
def _compiled() -> Tokens:
    # A wrapper in C++ calls what a graph cannot fuse, products and sorts, without Python in between.
    return torch.compile(
        MemoryCell._tokens,
        fullgraph=True,
        dynamic=False,
        options={"cpp_wrapper": True, "size_asserts": False},
    )


@contextmanager
def _run_of(cell: MemoryCell) -> Iterator[Tokens]:
    """What takes some tokens: compiled, if asked for, and not in a graph that is compiled whole."""
    if not _compiles(cell):
        yield MemoryCell._tokens
        return
    from torch import _dynamo as dynamo  # as long an import as all others together
    from torch._functorch import config as functorch

    # torch's LSTM and GRU are read for their weights, not called; each cell, batch and rest has a graph of its own. A
    # backward keeps its buffers for another (retain_graph).
    with dynamo.config.patch(allow_rnn=True, recompile_limit=64), functorch.patch(donated_buffer=False):
        yield _compiled()


def _compiles(cell: MemoryCell) -> bool:
    return cell.compile_step and not torch.compiler.is_compiling()


def _transformed() -> bool:
    """Whether a transform of torch.func is under way, which has gradients of its own."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


def _split(tokens: int) -> list[int]:
    """How many tokens each call takes: as many as a graph has, then one by one what remains."""
    graphs, rest = divmod(tokens, UNROLLED)
    return [UNROLLED] * graphs + [1] * rest


def _with_gradient(value: Tensor) -> Tensor:
    """As any token leaves it, so that the first tokens take the graph of the others."""
    if value.requires_grad or not value.is_floating_point():
        return value
    return value.clone(memory_format=torch.contiguous_format).requires_grad_()


def between(given: int, taken: int) -> nn.Module:
    """From a vector of one width to one of another; nothing where they are the same."""
    return nn.Identity() if given == taken else nn.Linear(given, taken)


def _check(dim: int, memories: dict[str, Stateful]) -> None:
    if dim < 1:
        raise ValueError(f"dim must be at least 1, not {dim}")
    if not memories:
        raise ValueError("a memory cell needs at least one memory; a controller without any is a module by itself")
    for name, memory in memories.items():
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"{name!r} is no name for a memory: torch modules use it; choose another")
        if not all(isinstance(getattr(memory, key, None), int) for key in ("dim_in", "dim_out")):
            raise ValueError(f"the memory {name!r}, a {type(memory).__name__}, does not say what it takes and gives")


def _check_compiles(memories: dict[str, Stateful]) -> None:
    for name, memory in memories.items():
        for part in memory.modules():
            if isinstance(part, Memory) and not part.compiles:
                raise ValueError(
                    f"the memory {name!r}, a {type(part).__name__}, is written in place, which torch.compile does not "
                    f"take; set compile_step to false"
                )
