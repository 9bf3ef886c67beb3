"""The protocol of every controller: what reads the input, and what its memories read last, and moves on."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from metamem.state import State, Stateful


class Controller(Stateful):
    """`forward(x, state) -> (h, state)`, x: [batch, time, dim_in], h: [batch, time, dim_out]; `step`: one token, no
    time axis. Any split of a sequence gives the same h and state."""

    dim_in: int
    dim_out: int

    def forward(
        self, x: Float[Tensor, "batch time dim_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch time dim_out"], State]:
        """h of every token, and the state after the last."""
        raise NotImplementedError

    def step(
        self, x: Float[Tensor, "batch dim_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch dim_out"], State]:
        """h of one token, and the state after it."""
        h, after = super().step(x, state)
        return h, after


def width_of(dim: int, hidden: int | None, layers: int) -> int:
    """The width of h: `hidden`, or that of the input. Raises ValueError for sizes below 1."""
    hidden = dim if hidden is None else hidden
    if min(dim, hidden, layers) < 1:
        raise ValueError(f"dim, hidden and layers must be at least 1, not {dim}, {hidden}, {layers}")
    return hidden


def read_out(hidden: int, dim: int, project: bool) -> nn.Module:
    """From h to what a controller gives: a linear map back to the width of the input, or h itself."""
    return nn.Linear(hidden, dim, bias=False) if project else nn.Identity()
