"""The LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), one or a stack of them.

i, f, o = σ(x W_x + h W_h + b),  g = tanh(…),   c ← f ⊙ c + i ⊙ g,   h ← o ⊙ tanh(c)

Layer l at token t needs layer l − 1 at t and itself at t − 1, so a stack runs in any order that keeps both:

    layers      a layer over all tokens, then the next: torch.nn.LSTM's own kernel
    tokens      a token through all layers, then the next: what a controller does whose input is not known before
    wavefront   at wave w layer l takes token w − l: all layers at once, in time + layers − 1 steps
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from metamem.controllers.base import Controller, read_out, width_of
from metamem.registry import MODULES
from metamem.state import State

Sequences = Float[Tensor, "batch time _features"]
Layers = Float[Tensor, "layers batch hidden"]
Layer = Float[Tensor, "batch hidden"]


class LSTMState(TypedDict):
    """h and c of each layer."""

    hidden: Float[Tensor, "batch layers hidden"]
    cell: Float[Tensor, "batch layers hidden"]


class Weights(NamedTuple):
    """A layer's, as torch has them; those of i, f, g, o one below the other."""

    input: Float[Tensor, "four_hidden dim"]
    recurrent: Float[Tensor, "four_hidden hidden"]
    input_bias: Float[Tensor, "four_hidden"]
    recurrent_bias: Float[Tensor, "four_hidden"]


@MODULES.register("lstm")
class LSTM(Controller):
    """`layers` LSTMs of width `hidden` (None: `dim`), one on the other, and a linear map back to `dim` (`project`:
    false: h itself, of width `hidden`). `schedule`: the order of layers and tokens, which changes no number."""

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        layers: int = 1,
        project: bool = True,
        schedule: Literal["layers", "tokens", "wavefront"] = "layers",
    ) -> None:
        super().__init__()
        hidden = width_of(dim, hidden, layers)
        self.schedule = schedule
        self.layers = nn.LSTM(dim, hidden, layers, batch_first=True)
        self.output = read_out(hidden, dim, project)
        self.dim_in, self.dim_out = dim, dim if project else hidden

    def init_state(self, batch: int) -> State:
        """h = c = 0."""
        like: Tensor = self.layers.all_weights[0][0]
        zeros = like.new_zeros(batch, self.layers.num_layers, self.layers.hidden_size)
        return {"hidden": zeros, "cell": zeros}

    def forward(
        self, x: Float[Tensor, "batch time dim_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch time dim_out"], State]:
        """h of the last layer, mapped back; the state after x."""
        state = self.init_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return x.new_zeros(*x.shape[:2], self.dim_out), state
        hidden, cell = (rearrange(state[key], "b l d -> l b d") for key in ("hidden", "cell"))
        if self.schedule == "layers":
            y, (hidden, cell) = self.layers(x, (hidden.contiguous(), cell.contiguous()))
        else:
            run = by_token if self.schedule == "tokens" else along_wavefront
            y, hidden, cell = run(self._weights(), x, hidden, cell)
        return self.output(y), _packed(hidden, cell)

    def step(
        self, x: Float[Tensor, "batch dim_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch dim_out"], State]:
        """One token through all layers."""
        state = self.init_state(x.shape[0]) if state is None else state
        y, hidden, cell = token(self._weights(), x, state["hidden"].unbind(1), state["cell"].unbind(1))
        return self.output(y), {"hidden": torch.stack(hidden, 1), "cell": torch.stack(cell, 1)}

    def _weights(self) -> list[Weights]:
        return [Weights(*layer) for layer in self.layers.all_weights]


def token(
    weights: Sequence[Weights], x: Float[Tensor, "batch features"], hidden: Sequence[Layer], cell: Sequence[Layer]
) -> tuple[Layer, list[Layer], list[Layer]]:
    """One token through all layers: h of the last, then h and c of each."""
    after: list[tuple[Tensor, Tensor]] = []
    for layer, h, c in zip(weights, hidden, cell, strict=True):
        x, c = torch.lstm_cell(x, [h, c], *layer)
        after.append((x, c))
    return x, [h for h, _ in after], [c for _, c in after]


def by_token(
    weights: Sequence[Weights], x: Sequences, hidden: Layers, cell: Layers
) -> tuple[Sequences, Layers, Layers]:
    """A token through all layers, then the next."""
    outputs, h, c = [], list(hidden.unbind(0)), list(cell.unbind(0))
    for now in x.unbind(1):
        y, h, c = token(weights, now, h, c)
        outputs.append(y)
    return torch.stack(outputs, 1), torch.stack(h), torch.stack(c)


def along_wavefront(
    weights: Sequence[Weights], x: Sequences, hidden: Layers, cell: Layers
) -> tuple[Sequences, Layers, Layers]:
    """At wave w layer l takes token w − l; what the layer below gave for it, it gave at the wave before."""
    depth, tokens, outputs = len(weights), x.shape[1], []
    first = functional.linear(x, weights[0].input).unbind(1)
    recurrent = torch.stack([layer.recurrent.mT for layer in weights])
    between = torch.stack([layer.input.mT for layer in weights[1:]]) if depth > 1 else recurrent[:0]
    bias = torch.stack([layer.input_bias + layer.recurrent_bias for layer in weights]).unsqueeze(1)
    for wave in range(tokens + depth - 1):
        low, high = max(0, wave - tokens + 1), min(depth, wave + 1)  # the layers that have a token at this wave
        below = slice(max(low - 1, 0), high - 1)
        given = torch.bmm(hidden[below], between[below])
        if low == 0:
            given = torch.cat([first[wave].unsqueeze(0), given])
        gates = torch.baddbmm(bias[low:high], hidden[low:high], recurrent[low:high]) + given
        admit, keep, candidate, show = gates.chunk(4, -1)
        moved = keep.sigmoid() * cell[low:high] + admit.sigmoid() * candidate.tanh()
        cell = torch.cat([cell[:low], moved, cell[high:]])
        hidden = torch.cat([hidden[:low], show.sigmoid() * moved.tanh(), hidden[high:]])
        if high == depth:
            outputs.append(hidden[-1])
    return torch.stack(outputs, 1), hidden, cell


def _packed(hidden: Layers, cell: Layers) -> State:
    return {"hidden": rearrange(hidden, "l b d -> b l d"), "cell": rearrange(cell, "l b d -> b l d")}
