"""The protocol of every memory: write, read, and both over a sequence or a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from metamem.state import State, Stateful


class Out(NamedTuple):
    """What a memory's forward gives: the read-out, the state after it, and what it measured on the way."""

    y: Tensor
    state: State
    aux: dict[str, Tensor]


class Memory(Stateful):
    """`forward(x, state) -> (y, state, aux)`, x: [batch, time, dim].

    Every memory passes the conformance suite (tests/conformance.py): it joins by one line in its table.

    - `writing`    switched off, a forward only reads (`metamem.memory.base.writing`)
    - `compiles`   whether torch.compile takes its step whole
    """

    writing: bool = True
    compiles: bool = True

    def write(self, x: Float[Tensor, "batch time dim"], state: State) -> State:
        """The state after x was written."""
        raise NotImplementedError

    def read(
        self, x: Float[Tensor, "batch time dim"], state: State
    ) -> tuple[Float[Tensor, "batch time dim_out"], State]:
        """What the state holds for x, nothing written; reading may move read heads."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "batch time dim"], state: State | None = None) -> Out:
        """Writes and reads a sequence in the memory's own order."""
        raise NotImplementedError

    def step(self, x: Float[Tensor, "batch dim"], state: State | None = None) -> Out:
        """One token: `forward` of a sequence of one, for a controller that reads before it goes on."""
        return Out(*super().step(x, state))

    def open(self, state: State, tokens: int) -> State:
        """The state as a loop of up to `tokens` steps carries it: each step's goes into the next one alone. A memory
        that would copy itself at every step works in place between `open` and `close`."""
        return state

    def close(self, state: State) -> State:
        """The state after such a loop, as any other again."""
        return state


def check_rows(carried: Shaped[Tensor, "rows *_carried"], x: Shaped[Tensor, "batch *_dims"]) -> None:
    """Raises ValueError where a tensor of a state has other rows than x: a single one would broadcast, silently."""
    if carried.shape[0] != x.shape[0]:
        raise ValueError(f"the state has {carried.shape[0]} rows, the input {x.shape[0]}")


@contextmanager
def writing(module: nn.Module, on: bool) -> Iterator[None]:
    """Within it, the memories of a module write or, switched off, only read."""
    memories = [part for part in module.modules() if isinstance(part, Memory)]
    before = [memory.writing for memory in memories]
    for memory in memories:
        memory.writing = memory.writing and on
    try:
        yield
    finally:
        for memory, was in zip(memories, before, strict=True):
            memory.writing = was
