"""Few-shot classification: `ways` classes of a pool in random order, `shots` examples of each shown, `query` asked.

A class is what its examples make it; a task numbers its classes anew, so that nothing but the support set says which is
which.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metamem.episodes.level import Batch, Episode
from metamem.tasks.text import TaskError

EVALUATION = 1_000_003  # far from any seed of a training
Draw = Callable[[torch.Generator, Tensor, int], Tensor]  # (generator, classes [many], examples) -> [many, examples, …]


def episode(
    generator: torch.Generator, pool: Tensor, draw: Draw, tasks: int, ways: int, shots: int, query: int
) -> Episode:
    """Tasks over classes of the pool: images [tasks, ways · count, …] and labels [tasks, ways · count]."""
    chosen = torch.rand(tasks, len(pool), generator=generator).argsort(1)[:, :ways]
    images = draw(generator, pool[chosen].flatten(), shots + query)
    images = images.unflatten(0, (tasks, ways))
    labels = torch.arange(ways).view(1, ways, 1).expand(tasks, -1, shots + query)
    support, asked = (
        Batch(images[:, :, part].flatten(1, 2), labels[:, :, part].flatten(1, 2))
        for part in (slice(0, shots), slice(shots, None))
    )
    return Episode(support, asked)


def accuracy(pred: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The share of examples whose largest logit is their class's."""
    return {"accuracy": (pred.argmax(-1) == target).float().mean(1)}


def check_sizes(ways: int, shots: int, query: int, classes: int, what: str) -> None:
    """Raises TaskError for a task that cannot be drawn."""
    if min(ways, shots, query) < 1 or ways < 2:
        raise TaskError(f"ways must be at least 2, shots and query at least 1, not {ways}, {shots} and {query}")
    if ways > classes:
        raise TaskError(f"ways is {ways}, and there are {classes} classes {what}: lower it")
