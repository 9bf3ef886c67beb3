"""A gated residual around a memory: the network learns, feature by feature, how much of the memory it takes.

y = g ⊙ memory(x) + (1 − g) ⊙ x,   g = σ([memory(x), x] W + b)
"""

from __future__ import annotations

import math

from jaxtyping import Bool, Float
from torch import Tensor, nn

from metamem.layers import Gate
from metamem.memory.base import Memory, Out, writing
from metamem.registry import MODULES
from metamem.state import State, Stateful


@MODULES.register("gated_residual")
class GatedResidual(Memory):
    """`memory`, and past it; at the start half of each, with an `initial_gate` of 0.5.

    aux: what the memory measures, and `gate`, the mean of g. Raises ValueError for a memory that gives another width
    than it takes.
    """

    def __init__(self, memory: Stateful, initial_gate: float = 0.5) -> None:
        super().__init__()
        dim, dim_out = (getattr(memory, key, None) for key in ("dim_in", "dim_out"))
        if dim is None or dim != dim_out:
            raise ValueError(f"a residual needs a memory that gives what it takes, not one of dims {dim} and {dim_out}")
        if not 0 < initial_gate < 1:
            raise ValueError(f"initial_gate must be between 0 and 1, not {initial_gate}")
        self.dim_in = self.dim_out = dim
        self.memory, self.gate = memory, Gate(dim)
        nn.init.constant_(self.gate.project.bias, math.log(initial_gate / (1 - initial_gate)))

    def init_state(self, batch: int) -> State:
        """The memory's."""
        return self.memory.init_state(batch)

    def reset_state(self, state: State, rows: Bool[Tensor, "batch"] | None = None) -> State:
        """The memory's."""
        return self.memory.reset_state(state, rows)

    def forward(self, x: Float[Tensor, "batch time dim"], state: State | None = None) -> Out:
        """The gated mean of what the memory makes of x, and x."""
        if not self.writing:
            with writing(self, False):
                return self._joined(x, *self.memory(x, state))
        return self._joined(x, *self.memory(x, state))

    def step(self, x: Float[Tensor, "batch dim"], state: State | None = None) -> Out:
        """One token."""
        return self._joined(x, *self.memory.step(x, state))

    def open(self, state: State, tokens: int) -> State:
        """The memory's."""
        return self.memory.open(state, tokens) if isinstance(self.memory, Memory) else state

    def close(self, state: State) -> State:
        """The memory's."""
        return self.memory.close(state) if isinstance(self.memory, Memory) else state

    def write(self, x: Float[Tensor, "batch time dim"], state: State) -> State:
        """The memory's state after x was written."""
        return self.memory(x, state)[1]

    def read(self, x: Float[Tensor, "batch time dim"], state: State) -> tuple[Tensor, State]:
        """The same with nothing written."""
        with writing(self, False):
            out = self._joined(x, *self.memory(x, state))
        return out.y, out.state

    def _joined(self, x: Tensor, read: Tensor, after: State, *measured: dict[str, Tensor]) -> Out:
        gate = self.gate.value(read, x)
        aux = {key: item for part in measured for key, item in part.items()}
        return Out(gate * read + (1 - gate) * x, after, {**aux, "gate": gate.mean(-1)})
