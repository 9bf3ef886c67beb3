"""The LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000) over a sequence.

i, f, o = σ(x W_x + h W_h + b),  g = tanh(…),   c ← f ⊙ c + i ⊙ g,   h ← o ⊙ tanh(c)
"""

from __future__ import annotations

from typing import TypedDict

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from metamem.registry import MODULES
from metamem.state import State, Stateful


class LSTMState(TypedDict):
    """h and c of each layer."""

    hidden: Float[Tensor, "batch layers dim_hidden"]
    cell: Float[Tensor, "batch layers dim_hidden"]


@MODULES.register("lstm")
class LSTM(Stateful):
    """`layers` LSTMs of width `hidden` (None: `dim`), one on the other, and a linear map back to `dim`."""

    def __init__(self, dim: int, hidden: int | None = None, layers: int = 1) -> None:
        super().__init__()
        if min(dim, layers, 1 if hidden is None else hidden) < 1:
            raise ValueError(f"dim, hidden and layers must be at least 1, not {dim}, {hidden}, {layers}")
        self.dim_in = self.dim_out = dim
        self.layers = nn.LSTM(dim, hidden or dim, layers, batch_first=True)
        self.output = nn.Linear(hidden or dim, dim, bias=False)

    def init_state(self, batch: int) -> State:
        """h = c = 0."""
        zeros = self.output.weight.new_zeros(batch, self.layers.num_layers, self.layers.hidden_size)
        return {"hidden": zeros, "cell": zeros}

    def forward(
        self, x: Float[Tensor, "batch time dim"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch time dim"], State]:
        """h of the last layer, mapped back; the state after x."""
        state = self.init_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return x, state
        before = tuple(rearrange(state[key], "b l d -> l b d").contiguous() for key in ("hidden", "cell"))
        y, after = self.layers(x, before)
        hidden, cell = (rearrange(part, "l b d -> b l d") for part in after)
        return self.output(y), {"hidden": hidden, "cell": cell}
