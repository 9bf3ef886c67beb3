"""Causal attention with a cache: short-term memory that forgets by distance, or with `window` None never.

    y_t = Σ_{t−window < s ≤ t} softmax_s(q_t · k_s / √d) v_s,   rotary positions

`persistent` adds learned tokens p that every query sees beside its window, without a position: Titans' sliding-window
attention with a prefix, SW-Attn*([p_1 … p_N] ∥ x) (Behrouz et al. 2024, arXiv 2501.00663, equations 26 and 27).

With a window it is computed block against (previous and own) block, so that a token costs O(window) at any length. The
cache holds keys before their rotation, and positions count from the start of the cache: a stream may go on for ever.
Without one the cache, and the cost of a token, grow with every token read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from metamem.registry import MODULES
from metamem.state import State, Stateful, align, tree_map

Heads = Float[Tensor, "batch heads tokens dim_head"]
Seen = Float[Tensor, "batch heads seen dim_head"]  # the cache, then the tokens of this call


@MODULES.register("attention")
class Attention(Stateful):
    """Attention of `heads` heads over the last `window` tokens, the token itself included (None: over all of them),
    and over `persistent` learned tokens.

    Raises ValueError where a head would have an odd number of features, or the window no token.
    """

    def __init__(self, dim: int, heads: int = 4, window: int | None = 64, persistent: int = 0) -> None:
        super().__init__()
        if dim % heads or dim // heads % 2:
            raise ValueError(f"dim {dim} over {heads} heads must give each an even number of features")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, or null for all tokens, not {window}")
        if persistent < 0:
            raise ValueError(f"persistent must be a number of tokens, not {persistent}")
        self.dim_in = self.dim_out = dim
        self.heads, self.window = heads, window
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.persistent = nn.Parameter(torch.randn(persistent, dim)) if persistent else None

    def init_state(self, batch: int) -> State:
        """An empty cache: of its `window` places (without a window, one for each token read) the last `count` are
        filled."""
        weight = self.output.weight
        shape = (batch, self.heads, self.window or 0, weight.shape[0] // self.heads)
        count = torch.zeros(batch, dtype=torch.long, device=weight.device)
        return {"keys": weight.new_zeros(shape), "values": weight.new_zeros(shape), "count": count}

    def reset_state(self, state: State, rows: Bool[Tensor, "batch"] | None = None) -> State:
        """An empty cache for the chosen rows; without a window, places that no row fills any more are dropped."""
        if rows is None:
            return self.init_state(state["count"].shape[0])
        emptied = tree_map(lambda leaf: torch.where(align(rows, leaf), 0, leaf), state)
        if self.window is not None:
            return emptied
        unused = state["keys"].shape[2] - int(emptied["count"].max())
        return {**emptied, "keys": emptied["keys"][:, :, unused:], "values": emptied["values"][:, :, unused:]}

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], State]:
        """The attended values, and the cache after them."""
        state = self.init_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return x, state
        queries, keys, values = rearrange(self.project(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        keys = torch.cat([state["keys"].to(keys.dtype), keys], 2)
        values = torch.cat([state["values"].to(values.dtype), values], 2)
        passed = 0 if self.window is None else x.shape[1]
        count = state["count"] + x.shape[1]
        after: State = {
            "keys": keys[:, :, passed:].to(state["keys"].dtype),
            "values": values[:, :, passed:].to(state["values"].dtype),
            "count": count if self.window is None else count.clamp(max=self.window),
        }
        if self.window is None and self.persistent is None:
            attended = _attend_to_all(queries, keys, values, state["count"])
        else:
            attended = _attend(queries, keys, values, state["count"], self.window, self._fixed())
        return self.output(rearrange(attended, "b h t d -> b t (h d)")), after

    def _fixed(self) -> Fixed | None:
        if self.persistent is None:
            return None
        return fixed_tokens(functional.linear(self.persistent, self.project.weight[self.dim_in :]), self.heads)


class Fixed(NamedTuple):
    """Keys and values of learned tokens, which every query sees and which have no position."""

    keys: Float[Tensor, "heads fixed dim_head"]
    values: Float[Tensor, "heads fixed dim_head"]


def fixed_tokens(projected: Float[Tensor, "fixed two_dim"], heads: int) -> Fixed:
    """Those of learned tokens that were projected as all tokens are, to keys and values."""
    return Fixed(*rearrange(projected, "n (two h d) -> two h n d", two=2, h=heads))


def _attend_to_all(queries: Heads, keys: Seen, values: Seen, count: Int[Tensor, "batch"]) -> Heads:
    """`keys` and `values` end with those of the queries; of the ones before, the last `count` are real."""
    tokens, seen = queries.shape[2], keys.shape[2]
    queries, keys = rotate(queries, first=seen - tokens), rotate(keys, first=0)
    if seen == tokens:
        return functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    seen_by = visible(count, tokens, seen - tokens)[:, :, 0]
    return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen_by)


def _attend(
    queries: Heads, keys: Seen, values: Seen, count: Int[Tensor, "batch"], window: int | None, fixed: Fixed | None
) -> Heads:
    """`keys` and `values` end with those of the queries; of the ones before (`window`, if there is one), the last
    `count` are real. In blocks of up to `window` queries."""
    tokens = queries.shape[2]
    before = keys.shape[2] - tokens
    block = min(window or tokens, tokens)
    fill = (0, 0, 0, -tokens % block)
    turned, keys = rotate(queries, first=before), rotate(keys, first=0)
    queries, turned = (
        rearrange(functional.pad(x, fill), "b h (n t) d -> b h n t d", t=block) for x in (queries, turned)
    )
    keys, values = (functional.pad(x, fill).unfold(2, before + block, block).mT for x in (keys, values))
    scores = turned @ keys.mT
    scores = scores.masked_fill(~visible(count, block, before, queries.shape[2], window), -torch.inf)
    if fixed is not None:
        # By the unturned queries: a turned one would see a distance to what has no position.
        scores = torch.cat([queries @ fixed.keys.unsqueeze(1).mT, scores], -1)
        values = torch.cat([fixed.values.unsqueeze(1).expand(*values.shape[:3], -1, -1), values], -2)
    weights = (scores * queries.shape[-1] ** -0.5).softmax(-1)
    return rearrange(weights @ values, "b h n t d -> b h (n t) d")[:, :, :tokens]


def visible(
    count: Int[Tensor, "batch"], block: int, before: int, blocks: int = 1, window: int | None = None
) -> Bool[Tensor, "batch 1 blocks block span"]:
    """Which keys a query sees: the last `window` before and with it, of those that are real. A block's keys begin
    `before` tokens before it; of those before the first block, the last `count` are real."""
    device = count.device
    query = before + torch.arange(block, device=device)[:, None]
    key = torch.arange(before + block, device=device)[None, :]
    near = (key <= query) & (key > query - (window or before + block))
    absolute = key[0] + block * torch.arange(blocks, device=device)[:, None]
    real = absolute >= before - count[:, None, None]
    return (near & real[:, :, None, :])[:, None]


def rotate(x: Heads, first: int) -> Heads:
    """Rotary position embedding, positions from `first`."""
    half = x.shape[-1] // 2
    exact = torch.promote_types(x.dtype, torch.float32)  # a position in bfloat16 would be rounded
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angle = (first + torch.arange(x.shape[2], device=x.device))[:, None] * frequency
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)
