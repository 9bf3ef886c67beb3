"""Short-term memory: the last n words, read by content and by age.

    M_t = [v_t, v_{t−1}, …, v_{t−n+1}],   w = softmax_i(β cos(k, M_i) + b_i),   r = Σ w_i M_i

over what has been written. The bias b_i of each age i comes from the input: a head can ask for what is like its key,
and for what came i tokens ago.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metamem.memory.slots import interface
from metamem.memory.slots.content import Keys, Slots, Strengths, Weights, scores_of, similarity
from metamem.memory.slots.interface import Shapes, parts_of, strength_shapes
from metamem.memory.slots.options import ReadOptions
from metamem.memory.slots.slot_memory import Reads, SlotMemory, Vectors
from metamem.registry import MODULES
from metamem.state import State


class WindowState(TypedDict):
    """The last words, the youngest first; how many there are; where they were read."""

    memory: Slots
    filled: Int[Tensor, "batch"]
    read_weights: Weights


class WindowParts(NamedTuple):
    """A token's interface vector; `ages`: b."""

    keys: Keys
    strengths: Strengths
    ages: Weights
    value: Float[Tensor, "batch word"]


@dataclass(frozen=True)
class WindowRule:
    """What a token does."""

    options: ReadOptions

    @property
    def shapes(self) -> Shapes:
        """The parts of the interface vector."""
        reads = self.options.read_heads
        return {
            "keys": (reads, self.options.word),
            **strength_shapes(self.options, reads),
            "ages": (reads, self.options.slots),
            "value": (self.options.word,),
        }

    def parts(self, vectors: Vectors) -> WindowParts:
        """The parts."""
        parts = parts_of(vectors, self.shapes)
        strengths = interface.strengths(self.options, parts, slice(None))
        return WindowParts(parts["keys"], strengths, parts["ages"], parts["value"])

    def write(self, parts: WindowParts, state: State) -> State:
        """The word comes first, the oldest goes."""
        memory = torch.cat([parts.value.unsqueeze(1), state["memory"][:, :-1]], 1)
        return {**state, "memory": memory, "filled": (state["filled"] + 1).clamp(max=self.options.slots)}

    def read(self, parts: WindowParts, state: State) -> tuple[Reads, State]:
        """By content and by age; zeros where nothing was written yet."""
        memory = state["memory"]
        scores = scores_of(similarity(memory, parts.keys), parts.strengths) + parts.ages
        ages = torch.arange(self.options.slots, device=memory.device)
        there = (ages < state["filled"].unsqueeze(1)).unsqueeze(1)
        least = torch.finfo(scores.dtype).min
        weights = torch.softmax(scores.masked_fill(~there, least), -1) * there
        return torch.bmm(weights, memory), {**state, "read_weights": weights}


@MODULES.register("window")
class Window(SlotMemory):
    """A memory of the last `slots` words, one a token."""

    def __init__(self, dim: int, options: ReadOptions) -> None:
        super().__init__(dim, options, WindowRule(options))

    def fresh(self, batch: int, dtype: torch.dtype) -> State:
        """Nothing written."""
        options = self.options
        zeros = self.interface.weight.new_zeros(batch, options.slots, options.word, dtype=dtype)
        return {
            "memory": zeros,
            "filled": torch.zeros(batch, dtype=torch.long, device=zeros.device),
            "read_weights": zeros.new_zeros(batch, options.read_heads, options.slots),
        }
