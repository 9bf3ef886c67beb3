"""Addressing by location: from where a head was, shifted and sharpened (Graves et al. 2014, section 3.3.2).

w^g = g w^c + (1 − g) w_{t−1},   w̃_i = Σ_j w^g_{i−j} s_j (circular),   w_i = w̃_i^γ / Σ_j w̃_j^γ
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory.slots.content import Weights

TINY = 1e-30  # below any weight that matters; log(0) has no gradient


def interpolated(content: Weights, before: Weights, gate: Float[Tensor, "batch heads"]) -> Weights:
    """Between the content weights (g = 1) and the last ones (g = 0)."""
    return torch.lerp(before, content, gate.unsqueeze(-1))


def shifted(weights: Weights, shifts: Float[Tensor, "batch heads shifts"]) -> Weights:
    """Rotated by −r … r slots, as much as `shifts`, a distribution over 2r + 1 numbers, says."""
    reach = shifts.shape[-1] // 2
    turned = torch.stack([weights.roll(by, -1) for by in range(-reach, reach + 1)], -1)
    return (turned @ shifts.unsqueeze(-1)).squeeze(-1)


def sharpened(weights: Weights, gamma: Float[Tensor, "batch heads"] | float) -> Weights:
    """w^γ / Σ w^γ, by logarithms: a sharp power of many small weights would underflow."""
    power = gamma.unsqueeze(-1) if isinstance(gamma, Tensor) else gamma
    return torch.softmax(power * weights.clamp(min=TINY).log(), -1)
