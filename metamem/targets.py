"""Targets: what a position should predict, which positions are not asked at all, and how many were met.

A target is a token, or a vector of numbers. Not asked is `IGNORE`, or a vector with a nan in it.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE = -100  # the target of a position that is not asked; torch's own convention
Targets = Int[Tensor, "*tokens"] | Float[Tensor, "*tokens features"]


def asked(targets: Targets) -> Bool[Tensor, "*tokens"]:
    """Which positions are asked."""
    if targets.is_floating_point():
        return ~targets.isnan().any(-1)
    return targets != IGNORE


def mean_asked(losses: Float[Tensor, "*tokens"], targets: Targets) -> Float[Tensor, ""]:
    """The mean of the losses over the positions asked, themselves 0 elsewhere; 0 where none is asked."""
    return losses.sum() / asked(targets).sum().clamp(min=1)


def accuracy(answers: Int[Tensor, "*tokens"], targets: Int[Tensor, "*tokens"]) -> float:
    """The share of the positions asked whose answer is the target; nan where none is asked."""
    right = (answers == targets)[asked(targets)]
    return float(right.double().mean())
