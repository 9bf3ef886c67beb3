"""What sparse memories share: slots that are written in place within a call, and the state between calls.

Unwritten slots are all alike, empty, and slots are taken in ascending order: the least recently used of equal ones is
the lowest, and so is the nearest. So the first `touched` slots of a row are all that was ever read or written, and a
call of T tokens can touch no more than T (k + write heads) others: it works on those alone. With the number of slots
grows nothing but the state itself. An exact search looks through the slots in use, as attention looks through the
tokens read: once a stream has filled a large memory, that is all of them, and `index: faiss` looks through fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metamem.memory.slots.journal import closed, opened
from metamem.memory.slots.nearest import IndexKind, check_index, index_of
from metamem.memory.slots.options import SlotOptions, WriteOptions
from metamem.memory.slots.slot_memory import OPENED, SlotMemory
from metamem.state import State


@dataclass(frozen=True, kw_only=True)
class NearestOptions(WriteOptions):
    """Settings of a memory whose heads read few slots.

    - `k`   how many slots a head reads
    - `index`   what finds them: `exact`, or `faiss`, approximate and for memories of which very many slots are in use
    """

    k: int = 4
    index: IndexKind = "exact"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, not {self.k}")
        super().__post_init__()
        if self.k > self.slots:
            raise ValueError(f"k must be at most the {self.slots} slots, not {self.k}")
        check_index(self.index)


@dataclass(frozen=True, kw_only=True)
class SparseOptions(NearestOptions, SlotOptions):
    """Settings of a memory whose heads write where they have read."""

    @property
    def writes(self) -> int:
        """The slots that were read before, and one for each write head."""
        return self.read_heads * self.k + self.write_heads


class SparseMemory(SlotMemory):
    """A memory that between `open` and `close` is written in place. `by_slot`: what of its state, beside the words, has
    an entry a slot; `words_of_slot`: how many words a slot holds."""

    compiles = False  # what is written in place depends on numbers, and so does how much
    options: NearestOptions
    by_slot: tuple[str, ...] = ("accessed",)
    words_of_slot: int = 1

    def fresh(self, batch: int, dtype: torch.dtype) -> State:
        """Empty slots, without storage until something is written; nothing read or written."""
        options, zero = self.options, self.interface.weight.new_zeros((), dtype=dtype)
        stamp, slot = zero.to(torch.int32), zero.to(torch.int64)
        reads = batch, options.read_heads, options.k
        return {
            "memory": zero.expand(batch, options.slots, self.words_of_slot * options.word),
            "accessed": stamp.expand(batch, options.slots),
            "time": stamp.expand(batch),
            "touched": slot.expand(batch),
            "write_slots": slot.expand(batch, options.writes),
            "write_weights": zero.expand(batch, options.write_heads, options.writes),
            "read_slots": slot.expand(reads),
            "read_weights": zero.expand(reads),
        }

    def open(self, state: State, tokens: int) -> State:
        """The slots that these tokens can touch, to be written in place."""
        touched = int(state["touched"].max())
        reach = min(self.options.slots, touched + tokens * (self.options.k + self.options.write_heads))
        words, chain = opened(state["memory"][:, :reach])
        working = {name: state[name][:, :reach].clone() for name in self.by_slot}
        index = index_of(self.options.index, words[..., : self.options.word], touched)
        return {**state, **working, "words": words, "chain": chain, "index": index, OPENED: state}

    def close(self, state: State) -> State:
        """The state after the loop, the slots that it did not reach as they were."""
        before = state[OPENED]
        after = {name: state[name] for name in before}
        after["memory"] = closed(state["words"], state["chain"])
        for name in ("memory", *self.by_slot):
            after[name] = _joined(after[name], before[name])
        return after

    def _traced(self, state: State) -> dict[str, Tensor]:
        return {f"trace.{name}": value for name, value in self._dense(state).items()} if self.options.trace else {}

    def _now(self, state: State) -> State:
        """What closing would give, of a loop that goes on."""
        if OPENED not in state:
            return state
        return self.close({**state, **{name: state[name].clone() for name in ("words", *self.by_slot)}})

    @torch.no_grad()
    def _dense(self, state: State) -> dict[str, Tensor]:
        """The memory, and for every slot its last use and its weights."""
        state = self._now(state)
        slots = self.options.slots
        return {
            "memory": state["memory"],
            "accessed": state["accessed"],
            "read_weights": spread(state["read_slots"], state["read_weights"], slots),
            "write_weights": spread(state["write_slots"].unsqueeze(1), state["write_weights"], slots),
        }


def spread(
    slots: Int[Tensor, "*#batch k"], weights: Float[Tensor, "*batch k"], count: int
) -> Float[Tensor, "*batch slots"]:
    """Sparse weights as dense ones."""
    return weights.new_zeros(*weights.shape[:-1], count).scatter_add(-1, slots.expand_as(weights), weights)


def _joined(working: Tensor, whole: Tensor) -> Tensor:
    """What a loop left of the first slots, and the others."""
    return working if working.shape[1] == whole.shape[1] else torch.cat([working, whole[:, working.shape[1] :]], 1)
