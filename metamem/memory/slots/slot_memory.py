"""A memory of slots as a module: an interface from the input, a rule of what a token does, and a read-out.

    y_t = [reads_t; x_t if pass_through] W,   reads_t, state_t = rule(x_t W_interface + b, state_{t−1})

The input alone decides what is written and read, so any controller meets any memory. A token is written, then read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from metamem.memory.base import Memory, Out, check_rows
from metamem.memory.slots.interface import Interface, Shapes
from metamem.memory.slots.options import DenseOptions, Initial, ReadOptions
from metamem.state import State, leaves

Vectors = Float[Tensor, "batch size"]
Reads = Float[Tensor, "batch heads word"]

OPENED = "before"  # in a state that is open: the one that it was opened from
CONSTANT = 1e-6  # of a memory that starts nearly empty: its words have a direction, as zeros have none


@runtime_checkable
class Rule(Protocol):
    """What a kind of slot memory does with a token's interface vector: pure functions of it and the state."""

    @property
    def shapes(self) -> Shapes:
        """The parts of the interface vector."""
        ...

    def parts(self, vectors: Vectors) -> Any:
        """The parts, as gates, keys and distributions."""
        ...

    def write(self, parts: Any, state: State) -> State:
        """The state after the write."""
        ...

    def read(self, parts: Any, state: State) -> tuple[Reads, State]:
        """What each head reads, and the state with the heads where they are now."""
        ...


def token(rule: Rule, vectors: Vectors, state: State, writing: bool, reading: bool) -> tuple[Reads | None, State]:
    """A token's write, then its read."""
    parts = rule.parts(vectors)
    if writing:
        state = rule.write(parts, state)
    return rule.read(parts, state) if reading else (None, state)


@functools.cache
def _compiled() -> Callable[..., tuple[Reads | None, State]]:
    return torch.compile(token, fullgraph=True, dynamic=False)


class SlotMemory(Memory):
    """What all kinds share. `fresh` gives a kind's state for a batch."""

    def __init__(self, dim: int, options: ReadOptions, rule: Rule) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, not {dim}")
        self.options, self.rule = options, rule
        self.interface = Interface(dim, rule.shapes, options.clip)
        width = options.read_heads * options.word
        norms: dict[str, Callable[[], nn.Module]] = {
            "none": nn.Identity,
            "layer": lambda: nn.LayerNorm(options.word),
            "rms": lambda: nn.RMSNorm(options.word, eps=1e-6),
        }
        self.norm = norms[options.normalisation]()
        width += dim if options.pass_through else 0
        self.output = None if options.dim_out is None else nn.Linear(width, options.dim_out, bias=False)
        self.dim_in, self.dim_out = dim, options.dim_out or width

    def fresh(self, batch: int, dtype: torch.dtype) -> State:
        """The state before the first token."""
        raise NotImplementedError

    def init_state(self, batch: int) -> State:
        """The state before the first token, in float32 at least."""
        return self.fresh(batch, self._dtype())

    def forward(self, x: Float[Tensor, "batch time dim_in"], state: State | None = None) -> Out:
        """Each token is written, then read. aux: `trace.<name>`, if asked for."""
        return self._run(x, state, self.writing, reading=True)

    def write(self, x: Float[Tensor, "batch time dim_in"], state: State) -> State:
        """The state after x was written; read heads stay where they are."""
        return self._run(x, state, writing=True, reading=False).state

    def read(self, x: Float[Tensor, "batch time dim_in"], state: State) -> tuple[Tensor, State]:
        """What the memory holds for x; read heads move."""
        out = self._run(x, state, writing=False, reading=True)
        return out.y, out.state

    def step(self, x: Float[Tensor, "batch dim_in"], state: State | None = None) -> Out:
        """One token: written, then read; as it is within `open` and `close`, else between them."""
        state = self._state(x, state)
        now = state if OPENED in state else self.open(state, 1)
        with _full_precision(x):
            vectors = self.interface(x.to(self._dtype()))
            reads, after = self._token()(self.rule, vectors, now, self.writing, True)
            return Out(self._read_out(reads, x), after if OPENED in state else self.close(after), self._traced(after))

    def _run(self, x: Tensor, state: State | None, writing: bool, reading: bool) -> Out:
        state = self.open(self._state(x, state), x.shape[1])
        reads, traces, run = [], [], self._token()
        with _full_precision(x):
            for vectors in self.interface(x.transpose(0, 1).to(self._dtype())).unbind(0):
                read, state = run(self.rule, vectors, state, writing, reading)
                reads.append(read)
                traces.append(self._traced(state))
            state = self.close(state)
            y = self._read_out(torch.stack(reads, 1), x) if reads and reading else self._nothing(x)
        return Out(y, state, _over_time(traces, self._traced(state)))

    def _state(self, x: Tensor, state: State | None) -> State:
        if state is None:
            return self.init_state(x.shape[0])
        check_rows(next(leaves(state)), x)
        return state

    def _token(self) -> Callable[..., tuple[Reads | None, State]]:
        compiled = isinstance(self.options, DenseOptions) and self.options.compile_step
        return _compiled() if compiled and not torch.compiler.is_compiling() else token

    def _read_out(self, reads: Float[Tensor, "*batch heads word"] | None, x: Tensor) -> Float[Tensor, "*batch dim_out"]:
        assert reads is not None
        normed: Tensor = self.norm(reads.to(self.interface.weight.dtype))
        y = functional.dropout(normed.flatten(-2), self.options.dropout, self.training)
        if self.options.pass_through:
            y = torch.cat([y, x.to(y.dtype)], -1)
        return y if self.output is None else self.output(y)

    def _nothing(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], self.dim_out, dtype=self.interface.weight.dtype)

    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.interface.weight.dtype, torch.float32)

    def _traced(self, state: State) -> dict[str, Tensor]:
        names = state.get(OPENED, state) if self.options.trace else ()
        return {f"trace.{name}": state[name] for name in names}


class DenseMemory(SlotMemory):
    """A memory of slots whose heads may touch every slot; `initial`: what is in them before the first write."""

    options: DenseOptions

    def __init__(self, dim: int, options: DenseOptions, rule: Rule) -> None:
        super().__init__(dim, options, rule)
        initial = _initial(options.initial, options.slots, options.word)
        if options.initial == "learned":
            self.initial = nn.Parameter(initial)
        else:
            self.register_buffer("initial", initial, persistent=options.initial == "random")

    def _words(self, batch: int, dtype: torch.dtype) -> Float[Tensor, "batch slots word"]:
        return self.initial.to(dtype).expand(batch, -1, -1)


def _initial(kind: Initial, slots: int, word: int) -> Float[Tensor, "slots word"]:
    if kind in ("random", "learned"):
        return torch.randn(slots, word) * word**-0.5
    return torch.full((slots, word), CONSTANT if kind == "constant" else 0.0)


def _over_time(traces: Sequence[dict[str, Tensor]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    if not traces:
        return {name: value.unsqueeze(1)[:, :0] for name, value in like.items()}
    return {name: torch.stack([trace[name] for trace in traces], 1) for name in traces[0]}


@contextmanager
def _full_precision(x: Tensor) -> Iterator[None]:
    with torch.autocast(x.device.type, enabled=False):
        yield
