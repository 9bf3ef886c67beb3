"""A causal Transformer with a cache of keys and values: a controller that sees its own past (pre-norm; Vaswani et al.
2017, arXiv 1706.03762; Xiong et al. 2020, arXiv 2002.04745).

    x ← x + Attention(norm(x)),   x ← x + MLP(norm(x))      of each layer;      h = norm(x)
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from metamem.attention import Attention
from metamem.controllers.base import Controller
from metamem.layers import MLP, RMSNorm
from metamem.registry import MODULES
from metamem.state import State, Stateful


@MODULES.register("transformer")
class Transformer(Controller):
    """`layers` layers of `heads` heads over the last `window` tokens (None: all), the MLP `expansion` times wider.

    A token costs as much as the cache is long.
    """

    def __init__(
        self, dim: int, heads: int = 4, layers: int = 2, window: int | None = None, expansion: float = 4.0
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, not {layers}")
        self.dim_in = self.dim_out = dim
        self.layers = nn.ModuleList(_Layer(dim, heads, window, expansion) for _ in range(layers))
        self.norm = RMSNorm(dim)

    def init_state(self, batch: int) -> State:
        """Each layer's empty cache, by number."""
        return {str(index): layer.init_state(batch) for index, layer in enumerate(self._each())}

    def reset_state(self, state: State, rows: Bool[Tensor, "batch"] | None = None) -> State:
        """Each cache's own reset."""
        return {str(index): layer.reset_state(state[str(index)], rows) for index, layer in enumerate(self._each())}

    def forward(
        self, x: Float[Tensor, "batch time dim_in"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch time dim_out"], State]:
        """The last layer's output, normed, and the caches after x."""
        after = {}
        for index, layer in enumerate(self._each()):
            x, after[str(index)] = layer(x, None if state is None else state[str(index)])
        return self.norm(x), after

    def _each(self) -> list[_Layer]:
        return [layer for layer in self.layers if isinstance(layer, _Layer)]


class _Layer(Stateful):
    """One layer; its state is its attention's cache."""

    def __init__(self, dim: int, heads: int, window: int | None, expansion: float) -> None:
        super().__init__()
        self.norm_attention, self.attention = RMSNorm(dim), Attention(dim, heads, window)
        self.norm_mlp, self.mlp = RMSNorm(dim), MLP(dim, expansion)

    def init_state(self, batch: int) -> State:
        return self.attention.init_state(batch)

    def reset_state(self, state: State, rows: Bool[Tensor, "batch"] | None = None) -> State:
        return self.attention.reset_state(state, rows)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        attended, after = self.attention(self.norm_attention(x), state)
        x = x + attended
        return x + self.mlp(self.norm_mlp(x)), after
