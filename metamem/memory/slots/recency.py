"""Least recently used slots: where a sparse memory writes what is new (Rae et al. 2016, arXiv 1610.09027, section 3.2).

A slot is used at a token that reads or writes it with a weight above δ = 0.005; `accessed` holds when that last was, 0
for never.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Accessed = Int[Tensor, "batch slots"]

DELTA = 0.005


def least_recent(accessed: Accessed, heads: int) -> Int[Tensor, "batch heads"]:
    """A slot for each head, all different: those not used for the longest, of equal ones the lowest."""
    slots: list[Tensor] = []
    for _ in range(heads):
        if slots:
            accessed = accessed.scatter(1, slots[-1], torch.iinfo(accessed.dtype).max)
        slots.append(accessed.argmin(1, keepdim=True))  # of equal ones the first
    return torch.cat(slots, 1)


def mark(
    accessed: Accessed,
    slots: Int[Tensor, "batch rows"],
    weights: Float[Tensor, "batch rows"],
    time: Int[Tensor, "batch"],
) -> None:
    """Notes in place that these slots are used now."""
    now = torch.where(weights.detach() > DELTA, time.unsqueeze(1), 0)
    accessed.scatter_reduce_(1, slots, now, "amax")
