"""What a model is evaluated on: the same for all models and at all times, and never what it was trained on."""

from __future__ import annotations

import torch

FIRST = 1_000_003  # far from any seed of a training


def evaluation_generator(number: int = 0) -> torch.Generator:
    """The random numbers of an evaluation; those of another `number` are others."""
    return torch.Generator().manual_seed(FIRST + number)
