"""A feed-forward controller, as the NTM may have one (Graves et al. 2014, arXiv 1410.5401, section 3.4): it remembers
nothing, so that what a model remembers is in its memories alone.

h = φ(… φ(x W_1 + b_1) …)
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from metamem.controllers.base import Controller, width_of
from metamem.memory.activations import ACTIVATIONS
from metamem.registry import MODULES
from metamem.state import State


@MODULES.register("feed_forward")
class FeedForward(Controller):
    """`layers` layers of width `hidden` (None: `dim`), each with the activation φ."""

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        layers: int = 1,
        activation: Literal["silu", "gelu", "tanh", "relu"] = "tanh",
    ) -> None:
        super().__init__()
        hidden = width_of(dim, hidden, layers)
        self.dim_in, self.dim_out, self.activation = dim, hidden, activation
        self.layers = nn.ModuleList(nn.Linear(dim if layer == 0 else hidden, hidden) for layer in range(layers))

    def forward(
        self, x: Float[Tensor, "batch time dim_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch time dim_out"], State]:
        """h of every token by itself; there is no state."""
        return self._apply_layers(x), {}

    def step(
        self, x: Float[Tensor, "batch dim_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch dim_out"], State]:
        """h of one token."""
        return self._apply_layers(x), {}

    def _apply_layers(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = ACTIVATIONS[self.activation].function(layer(x))
        return x
