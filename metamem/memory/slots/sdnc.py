"""The Sparse Differentiable Neural Computer (Rae et al. 2016, arXiv 1610.09027, appendix D): SAM with temporal links.

Slots are written as in `sam`, and linked as in `links`; of each row and column of the link matrix there are the largest
few entries (`sparse_links`). A read head has K slots of the mixture

    w^r = the K largest of π_back Lᵀ w^r_{t−1} + π_on L w^r_{t−1} + π_content w^c,   w^c: SAM's weights of K slots

for each write head's L, and reads r = Σ w^r_i M_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metamem.memory.slots.interface import Shapes, parts_of
from metamem.memory.slots.journal import take
from metamem.memory.slots.sam import ReadSlots, ReadWeights, SAMParts, SAMRule, SAMState
from metamem.memory.slots.slot_memory import Reads, Vectors
from metamem.memory.slots.sparse_links import Sparse, SparseLinks, links_after, strongest
from metamem.memory.slots.sparse_memory import SparseMemory, SparseOptions, spread
from metamem.registry import MODULES
from metamem.state import State

Modes = Float[Tensor, "batch reads modes"]


@dataclass(frozen=True, kw_only=True)
class SDNCOptions(SparseOptions):
    """Settings of an SDNC.

    - `links`   how many entries of each row and column of the link matrix are kept
    """

    links: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.links <= self.slots:
            raise ValueError(f"links must be from 1 to the {self.slots} slots, not {self.links}")


class SDNCState(SAMState):
    """SAM's; of each slot, what it was written after, and what after it; what was written last."""

    row_slots: Int[Tensor, "batch slots writes links"]
    row_values: Float[Tensor, "batch slots writes links"]
    column_slots: Int[Tensor, "batch slots writes links"]
    column_values: Float[Tensor, "batch slots writes links"]
    last: Int[Tensor, "batch writes links"]
    precedence: Float[Tensor, "batch writes links"]


class SDNCParts(NamedTuple):
    """A token's interface vector; `modes`: π."""

    sam: SAMParts
    modes: Modes


@dataclass(frozen=True)
class SDNCRule:
    """What a token does, to a state that is open."""

    options: SDNCOptions

    @property
    def sam(self) -> SAMRule:
        """What it shares with SAM: how slots are written, and found by content."""
        return SAMRule(self.options)

    @property
    def shapes(self) -> Shapes:
        """SAM's parts, and the modes of each read head."""
        return {**self.sam.shapes, "modes": (self.options.read_heads, 1 + 2 * self.options.write_heads)}

    def parts(self, vectors: Vectors) -> SDNCParts:
        """The parts, as gates, keys and distributions."""
        parts = parts_of(vectors, self.shapes)
        return SDNCParts(self.sam.activated(parts), torch.softmax(parts["modes"], -1))

    def write(self, parts: SDNCParts, state: State) -> State:
        """SAM's write, and its links."""
        state = self.sam.write(parts.sam, state)
        _, _, last, precedence = links_after(_links(state), state["write_slots"], state["write_weights"].detach())
        return {**state, "last": last, "precedence": precedence}

    def read(self, parts: SDNCParts, state: State) -> tuple[Reads, State]:
        """By content, and along the links from where each head was."""
        near, links, writes = self.sam.nearest(parts.sam.keys, state), _links(state), self.options.write_heads
        words, found = state["words"], near.shape[1:]
        rows, chain = take(words, state["chain"], near.flatten(1))
        content = self.sam.by_content(parts.sam, rows.unflatten(1, found))
        back, on, by_content = parts.modes.split([writes, writes, 1], -1)
        ways = [(near, by_content * content)]
        for modes, way in ((back, links.rows), (on, links.columns)):
            ways.append(_along(way, modes, state["read_slots"], state["read_weights"]))
        candidates, weights = (torch.cat(both, -1) for both in zip(*ways, strict=True))
        slots, weights = strongest(candidates, weights, self.options.k)
        rows, chain = take(words, chain, slots.flatten(1))
        return self.sam.moved(weights, slots, rows.unflatten(1, found), {**state, "chain": chain})


def _links(state: State) -> SparseLinks:
    rows = Sparse(state["row_slots"], state["row_values"])
    columns = Sparse(state["column_slots"], state["column_values"])
    return SparseLinks(rows, columns, state["last"], state["precedence"])


def _along(
    way: Sparse, modes: Float[Tensor, "batch reads writes"], slots: ReadSlots, weights: ReadWeights
) -> tuple[Int[Tensor, "batch reads _candidates"], Float[Tensor, "batch reads _candidates"]]:
    """Where the links take each head from the slots that it read last, and how much of it goes there."""
    at = slots.flatten(1).unsqueeze(-1).expand(-1, -1, modes.shape[-1])
    entries, values = (part.unflatten(1, slots.shape[1:]) for part in way.rows(at))
    shares = modes[:, :, None, :, None] * weights[:, :, :, None, None] * values
    return entries.flatten(2), shares.flatten(2)


@MODULES.register("sdnc")
class SDNC(SparseMemory):
    """A memory whose heads touch K slots, by content and along links. Raises ValueError for more writes than slots."""

    options: SDNCOptions
    by_slot = ("accessed", "row_slots", "row_values", "column_slots", "column_values")

    def __init__(self, dim: int, options: SDNCOptions) -> None:
        super().__init__(dim, options, SDNCRule(options))

    def fresh(self, batch: int, dtype: torch.dtype) -> State:
        """SAM's, and nothing linked."""
        state, options = super().fresh(batch, dtype), self.options
        zero, slot = state["memory"].new_zeros(()), state["touched"].new_zeros(())
        entries, last = (
            (batch, options.slots, options.write_heads, options.links),
            (batch, options.write_heads, options.links),
        )
        return {
            **state,
            "row_slots": slot.expand(entries),
            "row_values": zero.expand(entries),
            "column_slots": slot.expand(entries),
            "column_values": zero.expand(entries),
            "last": slot.expand(last),
            "precedence": zero.expand(last),
        }

    @torch.no_grad()
    def _dense(self, state: State) -> dict[str, Tensor]:
        state = self._now(state)
        slots = self.options.slots
        links = spread(state["row_slots"], state["row_values"], slots).transpose(1, 2)
        precedence = spread(state["last"], state["precedence"], slots)
        return {**super()._dense(state), "links": links, "precedence": precedence}
