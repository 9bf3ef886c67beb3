"""The Neural Turing Machine's memory (Graves, Wayne, Danihelka 2014, arXiv 1410.5401).

Each head, in the order of `location`: content weights, interpolation with where the head was (g), circular shift (s),
sharpening (γ ≥ 1). Write heads first, on the memory as it was, then read heads on what they left:

    M ← M ⊙ Π (1 − w^w ⊗ e) + Σ w^w ⊗ a,   r = w^r M

Heads start at the first slot, which tells slots of an empty memory apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory.slots import interface
from metamem.memory.slots.content import Keys, Slots, Strengths, Weights, content_weights, oneplus
from metamem.memory.slots.erase_add import written_to
from metamem.memory.slots.gates import GATES
from metamem.memory.slots.interface import Shapes, erase_shapes, parts_of, strength_shapes
from metamem.memory.slots.location import interpolated, sharpened, shifted
from metamem.memory.slots.options import DenseOptions, Initial
from metamem.memory.slots.slot_memory import DenseMemory, Reads, Vectors
from metamem.memory.slots.usage import HeadGates
from metamem.registry import MODULES
from metamem.state import State


@dataclass(frozen=True, kw_only=True)
class NTMOptions(DenseOptions):
    """Settings of an NTM.

    - `gamma`   γ, how far a head's weights are sharpened after its shift: learned (1 and above), or a constant
    - `shifts`   by how many slots a head can move, at most, to either side
    """

    initial: Initial = "constant"
    gamma: Literal["learned"] | float = "learned"
    shifts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.gamma, str) and self.gamma < 1:
            raise ValueError(f"gamma must be learned, or a number of at least 1, not {self.gamma}")
        if not 0 <= 2 * self.shifts < self.slots:
            raise ValueError(f"shifts must be at least 0 and below half the {self.slots} slots, not {self.shifts}")


class NTMState(TypedDict):
    """The memory, and where the heads were last."""

    memory: Slots
    write_weights: Weights
    read_weights: Weights


class NTMHeads(NamedTuple):
    """What moves some heads."""

    keys: Keys
    strengths: Strengths
    gate: HeadGates | None
    shifts: Float[Tensor, "batch heads shifts"]
    gamma: HeadGates | float


class NTMParts(NamedTuple):
    """A token's interface vector."""

    reads: NTMHeads
    writes: NTMHeads
    erase: Keys | None
    values: Keys


@dataclass(frozen=True)
class NTMRule:
    """What a token does."""

    options: NTMOptions

    @property
    def shapes(self) -> Shapes:
        """The parts of the interface vector; of the heads, those that read come first."""
        writes, word = self.options.write_heads, self.options.word
        heads = self.options.read_heads + writes
        return {
            "keys": (heads, word),
            **strength_shapes(self.options, heads),
            **({"gate": (heads,)} if self.options.gating else {}),
            "shifts": (heads, 2 * self.options.shifts + 1),
            **({"gamma": (heads,)} if isinstance(self.options.gamma, str) else {}),
            **erase_shapes(self.options),
            "values": (writes, word),
        }

    def parts(self, vectors: Vectors) -> NTMParts:
        """The parts, as gates, keys and distributions."""
        options, reads = self.options, self.options.read_heads
        parts = parts_of(vectors, self.shapes)
        gates = GATES[options.gate](parts["gate"]) if options.gating else None
        shifts = torch.softmax(parts["shifts"], -1)

        def heads(which: slice) -> NTMHeads:
            return NTMHeads(
                keys=parts["keys"][:, which],
                strengths=interface.strengths(options, parts, which),
                gate=None if gates is None else gates[:, which],
                shifts=shifts[:, which],
                gamma=oneplus(parts["gamma"][:, which]) if isinstance(options.gamma, str) else float(options.gamma),
            )

        return NTMParts(heads(slice(reads)), heads(slice(reads, None)), interface.erase(parts), parts["values"])

    def write(self, parts: NTMParts, state: State) -> State:
        """Write heads move, erase and add."""
        weights = self._moved(parts.writes, state["memory"], state["write_weights"])
        memory = written_to(state["memory"], weights, parts.erase, parts.values)
        return {"memory": memory, "write_weights": weights, "read_weights": state["read_weights"]}

    def read(self, parts: NTMParts, state: State) -> tuple[Reads, State]:
        """Read heads move and read."""
        weights = self._moved(parts.reads, state["memory"], state["read_weights"])
        return torch.bmm(weights, state["memory"]), {**state, "read_weights": weights}

    def _moved(self, heads: NTMHeads, memory: Slots, before: Weights) -> Weights:
        weights = content_weights(memory, heads.keys, heads.strengths, self.options.top_k)
        if heads.gate is not None:
            weights = interpolated(weights, before, heads.gate)
        return sharpened(shifted(weights, heads.shifts), heads.gamma)


@MODULES.register("ntm")
class NTM(DenseMemory):
    """A memory with heads that move by content and by location. Raises ValueError for more writes than slots."""

    def __init__(self, dim: int, options: NTMOptions) -> None:
        super().__init__(dim, options, NTMRule(options))

    def fresh(self, batch: int, dtype: torch.dtype) -> State:
        """The initial memory, all heads at the first slot."""
        first = torch.zeros(self.options.slots, dtype=torch.long, device=self.interface.weight.device)
        first[0] = 1
        heads = first.to(dtype).expand(batch, self.options.read_heads + self.options.write_heads, -1)
        reads, writes = heads.split([self.options.read_heads, self.options.write_heads], 1)
        return {"memory": self._words(batch, dtype), "write_weights": writes, "read_weights": reads}
