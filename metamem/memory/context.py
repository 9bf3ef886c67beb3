"""Memory as context: attention reads what a memory holds of the past, and the memory stores what attention made of it.

Titans' first block (Behrouz et al. 2024, arXiv 2501.00663, section 4.1, equations 21 to 25). The sequence is cut into
segments S of C tokens. With M_0 the memory at the segment's start and p the persistent tokens, for its token i

    h_i = M_0(x_i)                                                read by the memory's own queries
    y_i = Attn(x_i;  [p_1 … p_N ∥ h_1 … h_i ∥ x_1 … x_i])         each at its place in [p ∥ h ∥ S], p without one
    M_i = M_{i−1} written with y_i
    o_i = y_i ⊗ M_i(y_i)                                          ⊗: the gate g ⊙ y + (1 − g) ⊙ M(y)

The paper's equations are of whole segments; here h_i is seen from token i on, and M read after i writes: strictly
causal, so that a stream may be cut anywhere.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from metamem.attention import fixed_tokens, rotate, visible
from metamem.layers import Gate
from metamem.memory.base import Memory, Out
from metamem.memory.schedule import Rows, known_positions, schedule
from metamem.registry import MODULES
from metamem.state import State, align, tree_map

Tokens = Float[Tensor, "batch tokens dim"]
Heads = Float[Tensor, "batch heads tokens dim_head"]
Cached = Float[Tensor, "batch 2 heads _ dim_head"]  # 2: the retrieved h, the segment's x


class MemoryAsContextState(TypedDict):
    """`position`: tokens read; `keys`, `values`: those of the segment, its last places; `memory`: the memory of now,
    `recall`: the memory at the segment's start, from which the rest of the segment reads."""

    position: Int[Tensor, "batch"]
    keys: Cached
    values: Cached
    memory: State
    recall: State


@MODULES.register("memory_as_context")
class MemoryAsContext(Memory):
    """Attention of `heads` heads within segments of `segment` tokens, over `persistent` learned tokens, what `memory`
    held at the segment's start, and the segment; the memory is written with what it attends to.

    aux: what the memory measures. The state holds the memory twice. Raises ValueError where a segment has no token, a
    head would have an odd number of features, or the memory has another dim.
    """

    def __init__(self, dim: int, memory: Memory, heads: int = 4, segment: int = 64, persistent: int = 4) -> None:
        super().__init__()
        _check(dim, memory, heads, segment, persistent)
        self.dim_in = self.dim_out = dim
        self.heads, self.segment = heads, segment
        self.memory = memory
        self.queries = nn.Linear(dim, dim, bias=False)
        self.keys_values = nn.Linear(dim, 2 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.persistent = nn.Parameter(torch.randn(persistent, dim)) if persistent else None
        self.gate = Gate(dim)

    def init_state(self, batch: int) -> State:
        """Before the first token."""
        weight = self.output.weight
        shape = (batch, 2, self.heads, self.segment, weight.shape[0] // self.heads)
        return {
            "position": torch.zeros(batch, dtype=torch.long, device=weight.device),
            "keys": weight.new_zeros(shape),
            "values": weight.new_zeros(shape),
            "memory": self.memory.init_state(batch),
            "recall": self.memory.init_state(batch),
        }

    def forward(self, x: Tokens, state: State | None = None) -> Out:
        """Reads, attends, writes, and reads again, segment by segment."""
        positions = [0] if state is None else known_positions(state["position"], [self.segment])
        state = self.init_state(x.shape[0]) if state is None else state
        outputs, measured = [], []
        for run in schedule(positions, x.shape[1], self.segment, {}):
            for piece in run.segments:
                tokens = x[:, piece.start : piece.start + piece.length]
                y, state, aux = self._read_on(tokens, state, piece.refresh)
                outputs.append(y)
                measured.append(aux)
        if not outputs:
            return Out(x.clone(), state, self.memory(x, state["memory"]).aux)
        aux = {key: torch.cat([part[key] for part in measured], 1) for key in measured[0]}
        return Out(torch.cat(outputs, 1), state, aux)

    def write(self, x: Tokens, state: State) -> State:
        """The state after x was read."""
        return self(x, state).state

    def read(self, x: Tokens, state: State) -> tuple[Tokens, State]:
        """What attention makes of x in the place of the last token read, and the memory of now of that."""
        queries, last = self._queries(x), self.segment - 1
        turned = rotate(rearrange(queries, "b h t d -> (b t) h 1 d"), first=self.segment + last)
        turned = rearrange(turned, "(b t) h 1 d -> b h t d", b=x.shape[0])
        position = state["position"]
        count = torch.where(position > 0, (position - 1) % self.segment + 1, 0)
        seen = torch.arange(self.segment, device=x.device) > last - count[:, None, None, None]
        y = self._attend(queries, turned, state["keys"], state["values"], seen)
        read, memory = self.memory.read(y, state["memory"])
        return self.gate(y, read), {**state, "memory": memory}

    def _read_on(self, x: Tokens, state: State, begins: Rows | None) -> Out:
        """Tokens of one segment, the first of a new one in the rows that begin one."""
        position, recall = state["position"], _at_start(state["memory"], state["recall"], begins)
        retrieved, recall = self.memory.read(x, recall)
        projected = self.keys_values(torch.stack([retrieved.to(x.dtype), x], 1))
        new = rearrange(projected, "b two t (kv h d) -> kv b two h t d", kv=2, h=self.heads)
        keys, values = _extended(state["keys"], new[0], begins), _extended(state["values"], new[1], begins)
        queries, before = self._queries(x), keys.shape[3] - x.shape[1]
        seen = visible(position % self.segment, x.shape[1], before)[:, :, 0]
        y = self._attend(queries, rotate(queries, first=self.segment + before), keys, values, seen)
        read, memory, aux = self.memory(y, state["memory"])
        after: State = {
            "position": position + x.shape[1],
            "keys": _last(keys, state["keys"]),
            "values": _last(values, state["values"]),
            "memory": memory,
            "recall": recall,
        }
        return Out(self.gate(y, read), after, aux)

    def _queries(self, x: Tokens) -> Heads:
        return rearrange(self.queries(x), "b t (h d) -> b h t d", h=self.heads)

    def _attend(
        self, queries: Heads, turned: Heads, keys: Cached, values: Cached, seen: Bool[Tensor, "batch 1 #tokens places"]
    ) -> Tokens:
        """Attn over [p ∥ h ∥ S]; `turned`, the queries at their places, for what has a place."""
        tokens = torch.cat([rotate(keys[:, 0], first=0), rotate(keys[:, 1], first=self.segment)], 2)
        values = torch.cat([values[:, 0], values[:, 1]], 2)
        # Not by -inf: a read may see nothing at all, and is zero then, as all values are.
        scores = (turned @ tokens.mT).masked_fill(~torch.cat([seen, seen], -1), torch.finfo(turned.dtype).min)
        if self.persistent is not None:
            fixed = fixed_tokens(self.keys_values(self.persistent), self.heads)
            scores = torch.cat([queries @ fixed.keys.mT, scores], -1)
            values = torch.cat([fixed.values.expand(len(queries), -1, -1, -1), values], 2)
        weights = (scores * queries.shape[-1] ** -0.5).softmax(-1)
        return self.output(rearrange(weights @ values, "b h t d -> b t (h d)"))


def _extended(cache: Cached, new: Cached, begins: Rows | None) -> Cached:
    """The cache, emptied in the rows that begin a segment, and the new tokens; those alone where all rows begin one."""
    if begins == ():
        return new
    if begins is not None:
        cache = torch.where(align(_mask(begins, cache), cache), 0, cache)
    return torch.cat([cache.to(new.dtype), new], 3)


def _last(keys: Cached, cache: Cached) -> Cached:
    """As many places as the cache has, the last ones; zeros before them where there are fewer."""
    places = cache.shape[3]
    filled = functional.pad(keys, (0, 0, max(0, places - keys.shape[3]), 0))
    return filled[:, :, :, -places:].to(cache.dtype)


def _at_start(memory: State, recall: State, begins: Rows | None) -> State:
    """The memory at the start of each row's segment: that of now in the rows that begin one."""
    if begins is None:
        return recall
    if begins == ():
        return memory

    return tree_map(lambda now, then: torch.where(align(_mask(begins, now), now), now, then), memory, recall)


def _mask(rows: Rows, like: Tensor) -> Bool[Tensor, "batch"]:
    return torch.tensor(rows, device=like.device)


def _check(dim: int, memory: Memory, heads: int, segment: int, persistent: int) -> None:
    if segment < 1:
        raise ValueError(f"segment must be at least 1 token, not {segment}")
    if persistent < 0:
        raise ValueError(f"persistent must be a number of tokens, not {persistent}")
    if dim % heads or dim // heads % 2:
        raise ValueError(f"dim {dim} over {heads} heads must give each an even number of features")
    ends = getattr(memory, "dim_in", dim), getattr(memory, "dim_out", dim)
    if ends != (dim, dim):
        raise ValueError(f"the memory takes dim {ends[0]} and gives {ends[1]}, and tokens here have {dim}")
