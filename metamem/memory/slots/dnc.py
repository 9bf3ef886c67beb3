"""The Differentiable Neural Computer's memory (Graves et al. 2016, doi 10.1038/nature20101), as DeepMind released it.

A token, in this order; the parts are in `usage`, `content`, `erase_add`, `links`, `read_modes`:

    u ← usage of u and the last weights, free gates f                      no gradient through write weights
    w^w = g^w (g^a a(u) + (1 − g^a) c(M, k^w, β^w))                        several write heads allocate in turn
    M ← M ⊙ Π (1 − w^w ⊗ e) + Σ w^w ⊗ v
    L, p ← links and precedence, the links with the old p
    w^r = π (backward, forward, c(M, k^r, β^r)),   r = w^r M              with `sharp_links`, both sharpened before

Gates by σ, erase vectors by σ, strengths by softplus, read modes by softmax; keys and written vectors as they are.
The state starts at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory.slots import interface
from metamem.memory.slots.content import Keys, Slots, Strengths, Weights, content_weights, oneplus
from metamem.memory.slots.erase_add import written_to
from metamem.memory.slots.gates import GATES
from metamem.memory.slots.interface import Shapes, erase_shapes, parts_of, strength_shapes
from metamem.memory.slots.links import Links, Precedence, directed, links_after, precedence_after, resolved
from metamem.memory.slots.options import DenseOptions
from metamem.memory.slots.read_modes import mixed
from metamem.memory.slots.slot_memory import DenseMemory, Reads, Vectors
from metamem.memory.slots.usage import HeadGates, Usage, allocate, usage_after
from metamem.registry import MODULES
from metamem.state import State


@dataclass(frozen=True, kw_only=True)
class DNCOptions(DenseOptions):
    """Settings of a memory with temporal links.

    - `sharp_links`   where links lead a read head is sharpened, by a learned power of each head and direction: it
                      follows long sequences without getting lost (Csordás and Schmidhuber 2019)
    - `freeing`   a read may free the slots that it read, by the free gates; off: what was written stays in use
    """

    sharp_links: bool = False
    freeing: bool = True


class DNCState(TypedDict):
    """The memory M, usage u, links L and precedence p of each write head, and where the heads were last."""

    memory: Slots
    usage: Usage
    links: Links
    precedence: Precedence
    write_weights: Weights
    read_weights: Weights


class DNCParts(NamedTuple):
    """A token's interface vector; `share`: g^a, `amount`: g^w, `modes`: π, `powers`: s forward and backward."""

    read_keys: Keys
    write_keys: Keys
    read_strengths: Strengths
    write_strengths: Strengths
    erase: Keys | None
    values: Keys
    free: HeadGates | None
    share: HeadGates
    amount: HeadGates | None
    modes: Float[Tensor, "batch heads modes"]
    powers: Float[Tensor, "batch heads directions"] | None


@dataclass(frozen=True)
class DNCRule:
    """What a token does."""

    options: DNCOptions

    @property
    def shapes(self) -> Shapes:
        """The parts of the interface vector."""
        reads, writes, word = self.options.read_heads, self.options.write_heads, self.options.word
        return {
            "read_keys": (reads, word),
            "write_keys": (writes, word),
            **strength_shapes(self.options, reads + writes),
            **erase_shapes(self.options),
            "values": (writes, word),
            **({"free": (reads,)} if self.options.freeing else {}),
            "gates": (writes + writes * self.options.gating,),
            "modes": (reads, 1 + 2 * writes),
            **({"powers": (reads, 2)} if self.options.sharp_links else {}),
        }

    def parts(self, vectors: Vectors) -> DNCParts:
        """The parts, as gates, keys and distributions."""
        options, reads, writes = self.options, self.options.read_heads, self.options.write_heads
        parts, gate = parts_of(vectors, self.shapes), GATES[options.gate]
        gates = gate(parts["gates"])
        return DNCParts(
            read_keys=parts["read_keys"],
            write_keys=parts["write_keys"],
            read_strengths=interface.strengths(options, parts, slice(reads)),
            write_strengths=interface.strengths(options, parts, slice(reads, None)),
            erase=interface.erase(parts),
            values=parts["values"],
            free=gate(parts["free"]) if options.freeing else None,
            share=gates[:, :writes],
            amount=gates[:, writes:] if options.gating else None,
            modes=torch.softmax(parts["modes"], -1),
            powers=oneplus(parts["powers"]) if options.sharp_links else None,
        )

    def write(self, parts: DNCParts, state: State) -> State:
        """Usage, write weights, memory, links, precedence."""
        usage = usage_after(state["usage"], state["write_weights"], state["read_weights"], parts.free)
        content = content_weights(state["memory"], parts.write_keys, parts.write_strengths, self.options.top_k)
        share, amount = parts.share, parts.amount
        allocated = allocate(usage, share if amount is None else share * amount)
        weights = torch.lerp(content, allocated, share.unsqueeze(-1))
        if amount is not None:
            weights = amount.unsqueeze(-1) * weights
        return {
            "memory": written_to(state["memory"], weights, parts.erase, parts.values),
            "usage": usage,
            "links": links_after(state["links"], state["precedence"], weights),
            "precedence": precedence_after(state["precedence"], weights),
            "write_weights": weights,
            "read_weights": state["read_weights"],
        }

    def read(self, parts: DNCParts, state: State) -> tuple[Reads, State]:
        """By content, and along the links from where each head was."""
        memory = state["memory"]
        content = content_weights(memory, parts.read_keys, parts.read_strengths, self.options.top_k)
        forward, backward = directed(state["links"], state["read_weights"])
        if parts.powers is not None:
            forward, backward = resolved(forward, parts.powers[..., 0]), resolved(backward, parts.powers[..., 1])
        weights = mixed(parts.modes, backward, forward, content)
        return torch.bmm(weights, memory), {**state, "read_weights": weights}


@MODULES.register("dnc")
class DNC(DenseMemory):
    """A memory with dynamic allocation and temporal links. Raises ValueError for more writes than slots."""

    def __init__(self, dim: int, options: DNCOptions) -> None:
        super().__init__(dim, options, DNCRule(options))

    def fresh(self, batch: int, dtype: torch.dtype) -> State:
        """The initial memory; nothing used, linked, written or read."""
        reads, writes, slots = self.options.read_heads, self.options.write_heads, self.options.slots
        zeros = self.interface.weight.new_zeros(batch, slots, dtype=dtype)
        return {
            "memory": self._words(batch, dtype),
            "usage": zeros,
            "links": zeros.new_zeros(batch, writes, slots, slots),
            "precedence": zeros.new_zeros(batch, writes, slots),
            "write_weights": zeros.new_zeros(batch, writes, slots),
            "read_weights": zeros.new_zeros(batch, reads, slots),
        }
