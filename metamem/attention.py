"""Sliding-window causal attention with a cache: short-term memory that forgets by distance.

    y_t = Σ_{t−window < s ≤ t} softmax_s(q_t · k_s / √d) v_s,   rotary positions

Computed block against (previous and own) block, so that a token costs O(window) at any length. The cache holds keys
before their rotation, and positions count from the start of the cache: a stream may go on for ever.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from metamem.registry import MODULES
from metamem.state import State, Stateful

Heads = Float[Tensor, "batch heads tokens dim_head"]
Seen = Float[Tensor, "batch heads seen dim_head"]  # the cache, then the tokens of this call


@MODULES.register("attention")
class Attention(Stateful):
    """Sliding-window attention of `heads` heads over the last `window` tokens, the token itself included."""

    def __init__(self, dim: int, heads: int = 4, window: int = 64) -> None:
        super().__init__()
        if dim % heads or dim // heads % 2:
            raise ValueError(f"dim {dim} over {heads} heads must give each an even number of features")
        self.dim_in = self.dim_out = dim
        self.heads, self.window = heads, window
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def init_state(self, batch: int) -> State:
        """An empty cache: `count` of its `window` places are filled, the last ones."""
        weight = self.output.weight
        shape = (batch, self.heads, self.window, weight.shape[0] // self.heads)
        count = torch.zeros(batch, dtype=torch.long, device=weight.device)
        return {"keys": weight.new_zeros(shape), "values": weight.new_zeros(shape), "count": count}

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], State]:
        """The attended values, and the cache after them."""
        state = self.init_state(x.shape[0]) if state is None else state
        queries, keys, values = rearrange(self.project(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        keys = torch.cat([state["keys"].to(keys.dtype), keys], 2)
        values = torch.cat([state["values"].to(values.dtype), values], 2)
        tokens = x.shape[1]
        after: State = {
            "keys": keys[:, :, tokens:].to(state["keys"].dtype),
            "values": values[:, :, tokens:].to(state["values"].dtype),
            "count": (state["count"] + tokens).clamp(max=self.window),
        }
        attended = _attend(queries, keys, values, state["count"], self.window)
        return self.output(rearrange(attended, "b h t d -> b t (h d)")), after


def _attend(queries: Heads, keys: Seen, values: Seen, count: Int[Tensor, "batch"], window: int) -> Heads:
    """`keys` and `values` begin `window` tokens before the queries, `count` of these are real."""
    tokens = queries.shape[2]
    block = min(window, tokens)
    fill = -tokens % block
    queries = functional.pad(_rotate(queries, first=window), (0, 0, 0, fill))
    keys, values = (functional.pad(x, (0, 0, 0, fill)) for x in (_rotate(keys, first=0), values))
    queries = rearrange(queries, "b h (n t) d -> b h n t d", t=block)
    keys, values = (x.unfold(2, window + block, block).mT for x in (keys, values))
    scores = queries @ keys.mT * queries.shape[-1] ** -0.5
    scores = scores.masked_fill(~_visible(count, queries.shape[2], block, window), -torch.inf)
    return rearrange(scores.softmax(-1) @ values, "b h n t d -> b h (n t) d")[:, :, :tokens]


def _visible(
    count: Int[Tensor, "batch"], blocks: int, block: int, window: int
) -> Bool[Tensor, "batch 1 blocks block span"]:
    """Which keys a query sees: the last `window` before and with it, of those that are real."""
    device = count.device
    query = window + torch.arange(block, device=device)[:, None]
    key = torch.arange(window + block, device=device)[None, :]
    near = (key <= query) & (key > query - window)
    absolute = key[0] + block * torch.arange(blocks, device=device)[:, None]
    real = absolute >= window - count[:, None, None]
    return (near & real[:, :, None, :])[:, None]


def _rotate(x: Heads, first: int) -> Heads:
    """Rotary position embedding, positions from `first`."""
    half = x.shape[-1] // 2
    exact = torch.promote_types(x.dtype, torch.float32)  # a position in bfloat16 would be rounded
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angle = (first + torch.arange(x.shape[2], device=x.device))[:, None] * frequency
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)
