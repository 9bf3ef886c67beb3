"""The GRU (Cho et al. 2014, arXiv 1406.1078), the reset gate after the product, as torch.nn.GRU has it.

r, z = σ(x W_x + h W_h + b),   n = tanh(x W + b + r ⊙ (h U + c)),   h ← (1 − z) ⊙ n + z ⊙ h
"""

from __future__ import annotations

from typing import TypedDict

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from metamem.controllers.base import Controller, read_out, width_of
from metamem.registry import MODULES
from metamem.state import State


class GRUState(TypedDict):
    """h of each layer."""

    hidden: Float[Tensor, "batch layers hidden"]


@MODULES.register("gru")
class GRU(Controller):
    """`layers` GRUs of width `hidden` (None: `dim`), one on the other, and a linear map back to `dim` (`project`:
    false: h itself, of width `hidden`)."""

    def __init__(self, dim: int, hidden: int | None = None, layers: int = 1, project: bool = True) -> None:
        super().__init__()
        hidden = width_of(dim, hidden, layers)
        self.layers = nn.GRU(dim, hidden, layers, batch_first=True)
        self.output = read_out(hidden, dim, project)
        self.dim_in, self.dim_out = dim, dim if project else hidden

    def init_state(self, batch: int) -> State:
        """h = 0."""
        like: Tensor = self.layers.all_weights[0][0]
        return {"hidden": like.new_zeros(batch, self.layers.num_layers, self.layers.hidden_size)}

    def forward(
        self, x: Float[Tensor, "batch time dim_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch time dim_out"], State]:
        """h of the last layer, mapped back; the state after x."""
        state = self.init_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return x.new_zeros(*x.shape[:2], self.dim_out), state
        y, hidden = self.layers(x, rearrange(state["hidden"], "b l d -> l b d").contiguous())
        return self.output(y), {"hidden": rearrange(hidden, "l b d -> b l d")}

    def step(
        self, x: Float[Tensor, "batch dim_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch dim_out"], State]:
        """One token through all layers."""
        state = self.init_state(x.shape[0]) if state is None else state
        after = []
        for layer, h in zip(self.layers.all_weights, state["hidden"].unbind(1), strict=True):
            x = torch.gru_cell(x, h, *layer)
            after.append(x)
        return self.output(x), {"hidden": torch.stack(after, 1)}
