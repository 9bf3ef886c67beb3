"""Writing: what a head erases of a slot, then adds to it (Graves et al. 2014, section 3.2).

M ← M ⊙ Π_heads (1 − w ⊗ e) + Σ_heads w ⊗ v
"""

from __future__ import annotations

import torch

from metamem.memory.slots.content import Keys, Slots, Weights


def written_to(memory: Slots, weights: Weights, erase: Keys | None, values: Keys) -> Slots:
    """The memory after a write; `erase` None: nothing is erased."""
    shares = weights.unsqueeze(-1).unbind(1)
    if erase is not None:
        for share, erased in zip(shares, erase.unsqueeze(2).unbind(1), strict=True):
            memory = memory * (1 - share * erased)
    for share, value in zip(shares, values.unsqueeze(2).unbind(1), strict=True):
        memory = torch.addcmul(memory, share, value)
    return memory
