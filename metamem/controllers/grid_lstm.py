"""Grid LSTM over time and depth (Kalchbrenner, Danihelka, Graves 2015, arXiv 1507.01526): an LSTM along each of both.

At token t and layer l, with h, m of the time dimension from t − 1 and those of the depth dimension from layer l − 1:

    H = [h^depth, h^time]                        priority: the depth dimension's H has the h^time of t
    i, f, o = σ(H W + b),  g = tanh(H W + b)     of each dimension its own W
    m ← f ⊙ m + i ⊙ g,     h ← tanh(o ⊙ m)

What goes into the first layer along depth, h and m, is projected from x.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from metamem.controllers.base import Controller, read_out, width_of
from metamem.registry import MODULES
from metamem.state import State

Row = Float[Tensor, "batch _features"]


class GridLSTMState(TypedDict):
    """h and m of the time dimension, of each layer."""

    hidden: Float[Tensor, "batch layers hidden"]
    cell: Float[Tensor, "batch layers hidden"]


@MODULES.register("grid_lstm")
class GridLSTM(Controller):
    """`layers` blocks of width `hidden` (None: `dim`) and a linear map back to `dim` (`project`: false: h itself).

    - `tied`       all layers have the same weights
    - `priority`   the depth dimension sees what the time dimension has just become (section 3.2)
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        layers: int = 2,
        project: bool = True,
        tied: bool = False,
        priority: bool = False,
    ) -> None:
        super().__init__()
        hidden = width_of(dim, hidden, layers)
        self.hidden, self.layers, self.priority = hidden, layers, priority
        self.input = nn.Linear(dim, 2 * hidden)
        self.blocks = nn.ModuleList(nn.Linear(2 * hidden, 8 * hidden) for _ in range(1 if tied else layers))
        self.output = read_out(hidden, dim, project)
        self.dim_in, self.dim_out = dim, dim if project else hidden

    def init_state(self, batch: int) -> State:
        """h = m = 0 along time."""
        zeros = self.input.weight.new_zeros(batch, self.layers, self.hidden)
        return {"hidden": zeros, "cell": zeros}

    def forward(
        self, x: Float[Tensor, "batch time dim_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch time dim_out"], State]:
        """h of the last layer along depth, mapped back; the state after x."""
        state = self.init_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return x.new_zeros(*x.shape[:2], self.dim_out), state
        outputs = []
        for projected in self.input(x).unbind(1):
            depth, state = self._token(projected, state)
            outputs.append(depth)
        return self.output(torch.stack(outputs, 1)), state

    def step(
        self, x: Float[Tensor, "batch dim_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch dim_out"], State]:
        """One token through all layers."""
        depth, after = self._token(self.input(x), self.init_state(x.shape[0]) if state is None else state)
        return self.output(depth), after

    def _token(self, projected: Row, state: State) -> tuple[Row, State]:
        depth, cell = projected.chunk(2, -1)
        hiddens, cells = [], []
        before = zip(state["hidden"].unbind(1), state["cell"].unbind(1), strict=True)
        for layer, (time, time_cell) in enumerate(before):
            block = self.blocks[layer % len(self.blocks)]
            assert isinstance(block, nn.Linear)
            both = torch.cat([depth, time], -1)
            if self.priority:
                (to_time, to_depth), (time_bias, depth_bias) = block.weight.chunk(2), block.bias.chunk(2)
                time, time_cell = _lstm(functional.linear(both, to_time, time_bias), time_cell)
                both = torch.cat([depth, time], -1)
                depth, cell = _lstm(functional.linear(both, to_depth, depth_bias), cell)
            else:
                time_gates, depth_gates = block(both).chunk(2, -1)
                (time, time_cell), (depth, cell) = _lstm(time_gates, time_cell), _lstm(depth_gates, cell)
            hiddens.append(time)
            cells.append(time_cell)
        return depth, {"hidden": torch.stack(hiddens, 1), "cell": torch.stack(cells, 1)}


def _lstm(gates: Row, cell: Row) -> tuple[Row, Row]:
    """h and m from the gates i, f, o, g; unlike the LSTM of most, the output gate is inside the tanh."""
    (admit, keep, show), candidate = gates[:, : 3 * cell.shape[1]].sigmoid().chunk(3, -1), gates[:, 3 * cell.shape[1] :]
    cell = torch.addcmul(keep * cell, admit, candidate.tanh())
    return torch.tanh(show * cell), cell
