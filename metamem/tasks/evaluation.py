"""What a model is evaluated on: the same for all models and at all times, and never what it was trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Shaped
from torch import Tensor

BATCH = 64  # episodes evaluated at once
FIRST = 1_000_003  # far from any seed of a training


def evaluation_generator(number: int = 0) -> torch.Generator:
    """The random numbers of an evaluation; those of another `number` are others."""
    return torch.Generator().manual_seed(FIRST + number)


def in_batches(
    predict: Callable[[Tensor, Tensor], Tensor],
    inputs: Shaped[Tensor, "batch *given"],
    targets: Shaped[Tensor, "batch *asked"],
) -> Shaped[Tensor, "batch *found"]:
    """What `predict` gives for episodes, (inputs, targets), some of them at once."""
    return torch.cat([predict(*batch) for batch in zip(inputs.split(BATCH), targets.split(BATCH), strict=True)])
