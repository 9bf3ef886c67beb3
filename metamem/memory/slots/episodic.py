"""Episodic memory: pairs of key and value, each token's kept whole, found by key, until they are evicted.

    M ← M ∪ {(k^w, g v)}                     in the place of the pair that eviction chooses, once all slots are in use
    w = softmax of β cos(k^r, k_i) over the K pairs whose keys are most like k^r,   r = Σ w_i v_i

(after Pritzel et al. 2017, Neural Episodic Control, arXiv 1703.01988.) Nothing is blended or erased in part. Written in
place, found and differentiated as in `sam`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from metamem.memory.slots import interface
from metamem.memory.slots.content import Keys, Strengths, scores_of, similarity_of
from metamem.memory.slots.gates import GATES
from metamem.memory.slots.interface import Shapes, parts_of, strength_shapes
from metamem.memory.slots.journal import add, clear, take
from metamem.memory.slots.recency import least_recent, mark
from metamem.memory.slots.slot_memory import Reads, Vectors
from metamem.memory.slots.sparse_memory import NearestOptions, SparseMemory
from metamem.memory.slots.usage import HeadGates
from metamem.registry import MODULES
from metamem.state import State


@dataclass(frozen=True, kw_only=True)
class EpisodicOptions(NearestOptions):
    """Settings of an episodic memory.

    - `eviction`   which pair goes for a new one: the one not read or written for longest (`least_recent`), or the one
                   written first (`oldest`)
    """

    eviction: Literal["least_recent", "oldest"] = "least_recent"


class EpisodicParts(NamedTuple):
    """A token's interface vector; `amount`: g."""

    queries: Keys
    strengths: Strengths
    keys: Keys
    values: Keys
    amount: HeadGates | None


@dataclass(frozen=True)
class EpisodicRule:
    """What a token does, to a state that is open; a slot holds a key, then a value."""

    options: EpisodicOptions

    @property
    def shapes(self) -> Shapes:
        """The parts of the interface vector."""
        reads, writes, word = self.options.read_heads, self.options.write_heads, self.options.word
        return {
            "queries": (reads, word),
            **strength_shapes(self.options, reads),
            "keys": (writes, word),
            "values": (writes, word),
            **({"amount": (writes,)} if self.options.gating else {}),
        }

    def parts(self, vectors: Vectors) -> EpisodicParts:
        """The parts, as gates and keys."""
        parts, options = parts_of(vectors, self.shapes), self.options
        amount = GATES[options.gate](parts["amount"]) if options.gating else None
        strengths = interface.strengths(options, parts, slice(None))
        return EpisodicParts(parts["queries"], strengths, parts["keys"], parts["values"], amount)

    def write(self, parts: EpisodicParts, state: State) -> State:
        """A pair for each write head, in the place of what is evicted."""
        words, time = state["words"], state["time"] + 1
        slots = least_recent(state["accessed"], self.options.write_heads)
        values = parts.values if parts.amount is None else parts.amount.unsqueeze(-1) * parts.values
        chain = clear(words, state["chain"], slots)
        chain = add(words, chain, slots, torch.cat([parts.keys, values], -1))
        state["index"].changed(words[..., : self.options.word], slots)
        whole = torch.ones_like(values[..., 0])
        mark(state["accessed"], slots, whole, time)
        touched = torch.maximum(state["touched"], slots.amax(1) + 1)
        moved = {"time": time, "touched": touched, "write_slots": slots, "write_weights": torch.diag_embed(whole)}
        return {**state, "chain": chain, **moved}

    def read(self, parts: EpisodicParts, state: State) -> tuple[Reads, State]:
        """The values of the nearest keys; zeros where nothing was written yet."""
        word, k = self.options.word, self.options.k
        seen = int(state["touched"].max()) + k
        slots = state["index"].search(state["words"][:, :seen, :word], parts.queries, k, state["touched"])
        rows, chain = take(state["words"], state["chain"], slots.flatten(1))
        keys, values = rows.unflatten(1, slots.shape[1:]).split(word, -1)
        scores = scores_of(similarity_of(keys, parts.queries), parts.strengths)
        there = slots < state["touched"][:, None, None]
        weights = torch.softmax(scores.masked_fill(~there, torch.finfo(scores.dtype).min), -1) * there
        if self.options.eviction == "least_recent":
            mark(state["accessed"], slots.flatten(1), weights.flatten(1), state["time"])
        reads = (weights.unsqueeze(-1) * values).sum(2)
        return reads, {**state, "chain": chain, "read_slots": slots, "read_weights": weights}


@MODULES.register("episodic")
class Episodic(SparseMemory):
    """A memory of pairs of key and value. Raises ValueError for more writes than slots."""

    options: EpisodicOptions
    words_of_slot = 2

    def __init__(self, dim: int, options: EpisodicOptions) -> None:
        super().__init__(dim, options, EpisodicRule(options))
