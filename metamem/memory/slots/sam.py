"""Sparse Access Memory (Rae et al. 2016, arXiv 1610.09027): heads that touch K slots, of as many as there are.

A token, with R read heads:

    U_h = the least recently used slots, one a write head              `recency`
    M[U_h] ← 0
    w^w_h = α_h (γ_h / R Σ_r w^r_{t−1} + (1 − γ_h) 1[U_h])             to what was read last, and to what is forgotten
    M ← M + Σ_h w^w_h ⊗ v_h
    w^r = softmax of β cos(k, M_i) over the K slots i most like k      `nearest`
    r = Σ w^r_i M_i

The choice of slots has no gradient, all else has (`journal`): a step costs K rows, forward and backward, and its
gradient is that of a dense memory with the same weights. The paper gives each read head a write head of its own; here
they are as many as asked for, and each writes to what all read heads read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metamem.memory.slots import interface
from metamem.memory.slots.content import Keys, Slots, Strengths, scores_of, similarity_of
from metamem.memory.slots.gates import GATES
from metamem.memory.slots.interface import Parts, Shapes, parts_of, strength_shapes
from metamem.memory.slots.journal import add, clear, take
from metamem.memory.slots.recency import least_recent, mark
from metamem.memory.slots.slot_memory import Reads, Vectors
from metamem.memory.slots.sparse_memory import SparseMemory, SparseOptions
from metamem.memory.slots.usage import HeadGates
from metamem.registry import MODULES
from metamem.state import State

ReadSlots = Int[Tensor, "batch reads k"]
ReadWeights = Float[Tensor, "batch reads k"]


class SAMState(TypedDict):
    """The memory; when each slot was last used, and the time; how many slots were ever touched; where the heads were
    last, and with which weights."""

    memory: Slots
    accessed: Int[Tensor, "batch slots"]
    time: Int[Tensor, "batch"]
    touched: Int[Tensor, "batch"]
    write_slots: Int[Tensor, "batch written"]
    write_weights: Float[Tensor, "batch writes written"]
    read_slots: ReadSlots
    read_weights: ReadWeights


class SAMParts(NamedTuple):
    """A token's interface vector; `share`: γ, `amount`: α."""

    keys: Keys
    strengths: Strengths
    values: Keys
    share: HeadGates
    amount: HeadGates | None


@dataclass(frozen=True)
class SAMRule:
    """What a token does, to a state that is open."""

    options: SparseOptions

    @property
    def shapes(self) -> Shapes:
        """The parts of the interface vector."""
        reads, writes, word = self.options.read_heads, self.options.write_heads, self.options.word
        return {
            "keys": (reads, word),
            **strength_shapes(self.options, reads),
            "values": (writes, word),
            "gates": (writes + writes * self.options.gating,),
        }

    def parts(self, vectors: Vectors) -> SAMParts:
        """The parts, as gates and keys."""
        return self.activated(parts_of(vectors, self.shapes))

    def activated(self, parts: Parts) -> SAMParts:
        """The parts, once they are apart."""
        writes = self.options.write_heads
        gates = GATES[self.options.gate](parts["gates"])
        return SAMParts(
            keys=parts["keys"],
            strengths=interface.strengths(self.options, parts, slice(None)),
            values=parts["values"],
            share=gates[:, :writes],
            amount=gates[:, writes:] if self.options.gating else None,
        )

    def write(self, parts: SAMParts, state: State) -> State:
        """To what was read last, and to the least recently used slots."""
        words, chain, time = state["words"], state["chain"], state["time"] + 1
        unused = least_recent(state["accessed"], self.options.write_heads)
        if self.options.erase:
            chain = clear(words, chain, unused)
        slots = torch.cat([state["read_slots"].flatten(1), unused], 1)
        again, anew = parts.share, 1 - parts.share
        if parts.amount is not None:
            again, anew = parts.amount * again, parts.amount * anew
        read = state["read_weights"].flatten(1) / self.options.read_heads
        weights = torch.cat([again.unsqueeze(-1) * read.unsqueeze(1), torch.diag_embed(anew)], -1)
        chain = add(words, chain, slots, weights.mT @ parts.values)
        state["index"].changed(words, slots)
        mark(state["accessed"], slots, weights.sum(1), time)
        touched = torch.maximum(state["touched"], slots.amax(1) + 1)
        moved = {"time": time, "touched": touched, "write_slots": slots, "write_weights": weights}
        return {**state, "chain": chain, **moved}

    def read(self, parts: SAMParts, state: State) -> tuple[Reads, State]:
        """The words most like the keys."""
        slots = self.nearest(parts.keys, state)
        rows, chain = take(state["words"], state["chain"], slots.flatten(1))
        rows = rows.unflatten(1, slots.shape[1:])
        return self.moved(self.by_content(parts, rows), slots, rows, {**state, "chain": chain})

    def nearest(self, keys: Keys, state: State) -> ReadSlots:
        """The K slots most like each key; of those never touched, all alike, the first K are enough to look at."""
        seen = int(state["touched"].max()) + self.options.k
        return state["index"].search(state["words"][:, :seen], keys, self.options.k)

    def by_content(self, parts: SAMParts, rows: Float[Tensor, "batch reads k word"]) -> ReadWeights:
        """The weights of what was found."""
        return torch.softmax(scores_of(similarity_of(rows, parts.keys), parts.strengths), -1)

    def moved(
        self, weights: ReadWeights, slots: ReadSlots, rows: Float[Tensor, "batch reads k word"], state: State
    ) -> tuple[Reads, State]:
        """What is read with these weights, and the heads where they are now."""
        mark(state["accessed"], slots.flatten(1), weights.flatten(1), state["time"])
        touched = torch.maximum(state["touched"], slots.flatten(1).amax(1) + 1)
        reads = (weights.unsqueeze(-1) * rows).sum(2)
        return reads, {**state, "touched": touched, "read_slots": slots, "read_weights": weights}


@MODULES.register("sam")
class SAM(SparseMemory):
    """A memory whose heads touch K slots. Raises ValueError for more writes than slots."""

    def __init__(self, dim: int, options: SparseOptions) -> None:
        super().__init__(dim, options, SAMRule(options))
