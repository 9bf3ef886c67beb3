"""Gates in [0, 1] of a number x: how a decision to write, free or keep is made differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.gating import straight_through

Gate = Literal["sigmoid", "steep_sigmoid", "hard"]
Logits = Float[Tensor, "*batch"]

STEEPNESS = 5.0


def steep_sigmoid(x: Logits) -> Logits:
    """σ(5 x): nearly a decision, with a gradient near x = 0 only."""
    return torch.sigmoid(STEEPNESS * x)


def hard(x: Logits) -> Logits:
    """1 where x > 0, else 0; the gradient is that of σ(x), straight through (Bengio et al. 2013, arXiv 1308.3432)."""
    return straight_through((x > 0).to(x.dtype), torch.sigmoid(x))


GATES: dict[Gate, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "steep_sigmoid": steep_sigmoid,
    "hard": hard,
}
