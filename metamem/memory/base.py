"""The protocol of every memory: write, read, and both over a sequence."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metamem.state import State, Stateful


class Out(NamedTuple):
    """What a memory's forward gives: the read-out, the state after it, and what it measured on the way."""

    y: Tensor
    state: State
    aux: dict[str, Tensor]


class Memory(Stateful):
    """`forward(x, state) -> (y, state, aux)`, x: [batch, time, dim].

    Every memory passes the conformance suite (tests/conformance.py): it joins by one line in its table.

    - `writing`   switched off, a forward only reads (`metamem.adaptation.writing`)
    """

    writing: bool = True

    def write(self, x: Tensor, state: State) -> State:
        """The state after x was written."""
        raise NotImplementedError

    def read(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """What the state holds for x, nothing written; reading may move read heads."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: State | None = None) -> Out:
        """Writes and reads a sequence in the memory's own order."""
        raise NotImplementedError
