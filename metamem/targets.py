"""Targets: what a position should predict, and which positions are not asked at all."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE = -100  # the target of a position that is not asked; torch's own convention


def asked(targets: Int[Tensor, "*tokens"]) -> Bool[Tensor, "*tokens"]:
    """Which positions are asked."""
    return targets != IGNORE


def mean_asked(losses: Float[Tensor, "*tokens"], targets: Int[Tensor, "*tokens"]) -> Float[Tensor, ""]:
    """The mean of the losses over the positions asked, themselves 0 elsewhere; 0 where none is asked."""
    return losses.sum() / asked(targets).sum().clamp(min=1)
