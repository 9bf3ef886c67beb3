"""Dynamic key-value memory (Zhang et al. 2017, arXiv 1611.08108): keys are slow weights, values are what is stored.

    w = softmax_i(β cos(k, K_i)),   M ← M ⊙ Π (1 − g w^w ⊗ e) + Σ g w^w ⊗ v,   r = w^r M

Slots stand for concepts that all sequences share, K_i; each sequence writes what it knows of them. The paper's weights
are of k · K_i, and its writes have no gate g (`gating: false`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import nn

from metamem.memory.slots import interface
from metamem.memory.slots.content import Keys, Slots, Strengths, Weights, content_weights
from metamem.memory.slots.erase_add import written_to
from metamem.memory.slots.gates import GATES
from metamem.memory.slots.interface import Shapes, erase_shapes, parts_of, strength_shapes
from metamem.memory.slots.options import DenseOptions
from metamem.memory.slots.slot_memory import OPENED, DenseMemory, Reads, Vectors
from metamem.memory.slots.usage import HeadGates
from metamem.registry import MODULES
from metamem.state import State


class KeyValueState(TypedDict):
    """The values; where they were written and read."""

    memory: Slots
    write_weights: Weights
    read_weights: Weights


class KeyValueParts(NamedTuple):
    """A token's interface vector; `amount`: g."""

    read_keys: Keys
    write_keys: Keys
    read_strengths: Strengths
    write_strengths: Strengths
    erase: Keys | None
    values: Keys
    amount: HeadGates | None


@dataclass(frozen=True)
class KeyValueRule:
    """What a token does, to a state that is open: with the keys in it."""

    options: DenseOptions

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
            **({"amount": (writes,)} if self.options.gating else {}),
        }

    def parts(self, vectors: Vectors) -> KeyValueParts:
        """The parts, as gates and keys."""
        options, reads = self.options, self.options.read_heads
        parts = parts_of(vectors, self.shapes)
        return KeyValueParts(
            read_keys=parts["read_keys"],
            write_keys=parts["write_keys"],
            read_strengths=interface.strengths(options, parts, slice(reads)),
            write_strengths=interface.strengths(options, parts, slice(reads, None)),
            erase=interface.erase(parts),
            values=parts["values"],
            amount=GATES[options.gate](parts["amount"]) if options.gating else None,
        )

    def write(self, parts: KeyValueParts, state: State) -> State:
        """To the values of the keys that are like the key."""
        weights = content_weights(state["keys"], parts.write_keys, parts.write_strengths, self.options.top_k)
        if parts.amount is not None:
            weights = parts.amount.unsqueeze(-1) * weights
        memory = written_to(state["memory"], weights, parts.erase, parts.values)
        return {**state, "memory": memory, "write_weights": weights}

    def read(self, parts: KeyValueParts, state: State) -> tuple[Reads, State]:
        """From the values of the keys that are like the key."""
        weights = content_weights(state["keys"], parts.read_keys, parts.read_strengths, self.options.top_k)
        return torch.bmm(weights, state["memory"]), {**state, "read_weights": weights}


@MODULES.register("key_value")
class KeyValue(DenseMemory):
    """A memory of values under learned keys. Raises ValueError for more writes than slots."""

    def __init__(self, dim: int, options: DenseOptions) -> None:
        super().__init__(dim, options, KeyValueRule(options))
        self.keys = nn.Parameter(torch.randn(options.slots, options.word))

    def fresh(self, batch: int, dtype: torch.dtype) -> State:
        """The initial values; nothing written or read."""
        reads, writes, slots = self.options.read_heads, self.options.write_heads, self.options.slots
        zeros = self.interface.weight.new_zeros(batch, reads + writes, slots, dtype=dtype)
        read, written = zeros.split([reads, writes], 1)
        return {"memory": self._words(batch, dtype), "write_weights": written, "read_weights": read}

    def open(self, state: State, tokens: int) -> State:
        """With the keys beside it, which are no state."""
        keys = self.keys.to(self._dtype()).expand(state["memory"].shape[0], -1, -1)
        return {**state, "keys": keys, OPENED: state}

    def close(self, state: State) -> State:
        """Without the keys."""
        return {name: state[name] for name in state[OPENED]}
