"""Persistent tokens: what a memory has read before each stream, learned and the same for all of them.

    x_new = [p_1 … p_N] ∥ x

(Behrouz et al. 2024, arXiv 2501.00663, equation 19.) The outputs at the p are dropped; what the memory stored of them
stays in its state. The memory may be a graph of modules: an attention in it keeps its cache of them.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metamem.attention import Attention
from metamem.memory.base import Out
from metamem.registry import MODULES
from metamem.state import State, Stateful, align, tree_map


class PersistentTokensState(TypedDict):
    """`begun`: the rows in which the memory has read the tokens; `memory`: its state."""

    begun: Bool[Tensor, "batch"]
    memory: State


@MODULES.register("persistent_tokens")
class PersistentTokens(Stateful):
    """`memory`, which reads `tokens` learned tokens before the first one of a stream.

    Raises ValueError for no token, and for a memory without a dim or with a cache that grows.
    """

    def __init__(self, tokens: int, memory: Stateful) -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {tokens}")
        self.dim_in, self.dim_out = _dim(memory), getattr(memory, "dim_out", None)
        self.tokens = nn.Parameter(torch.randn(tokens, self.dim_in))
        self.memory = memory

    def init_state(self, batch: int) -> State:
        """Nothing read, not the tokens either: that is left to the first call, which has the weights of then."""
        begun = torch.zeros(batch, dtype=torch.bool, device=self.tokens.device)
        return {"begun": begun, "memory": self.memory.init_state(batch)}

    def forward(self, x: Float[Tensor, "batch time dim"], state: State | None = None) -> Out:
        """The memory's outputs for x."""
        state = self.init_state(x.shape[0]) if state is None else state
        begins = x.shape[1] > 0
        y, after, *measured = self.memory(x, self._begin(state, x.dtype) if begins else state["memory"])
        begun = torch.ones_like(state["begun"]) if begins else state["begun"]
        return Out(y, {"begun": begun, "memory": after}, measured[0] if measured else {})

    def _begin(self, state: State, dtype: torch.dtype) -> State:
        """The memory's state after the tokens, in rows that had not read them."""
        begun, before = state["begun"], state["memory"]
        if not torch.compiler.is_compiling() and begun.all():  # a compiled graph has no host values
            return before
        tokens = self.tokens.to(dtype).expand(begun.shape[0], -1, -1)
        read = self.memory(tokens, None)[1]
        return tree_map(lambda new, old: torch.where(align(begun, old), old, new), read, before)


def _dim(memory: Stateful) -> int:
    """The dim of the tokens that the memory reads."""
    dim = getattr(memory, "dim_in", None)
    if dim is None:
        raise ValueError("persistent tokens need to know their dim, and the memory does not say what it takes")
    if any(isinstance(part, Attention) and part.window is None for part in memory.modules()):
        raise ValueError("an attention without a window has its own persistent tokens: give it `persistent` instead")
    return dim
