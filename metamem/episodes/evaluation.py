"""How good a learner is on tasks that it was not trained on: means with 95 % intervals, and diverged tasks, counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.episodes.learner import Learner
from metamem.episodes.level import Batch, Episode
from metamem.episodes.parameters import task_losses
from metamem.episodes.registry import EpisodicTask
from metamem.memory.signals import Objectives

Z = 1.959964  # of a normal's middle 95 %
CHUNK = 100  # tasks evaluated at once
DIVERGED = 10.0  # times the mean loss before adaptation: a task that adapting has thrown that far has diverged


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks, and half the width of its 95 % interval, 1.96 standard errors of it; and the median."""

    mean: float
    interval: float
    median: float
    tasks: int

    @classmethod
    def of(cls, values: Float[Tensor, "tasks"]) -> Estimate:
        """The estimate from the figure of each task."""
        values, count = values.double(), len(values)
        if count < 2:
            return cls(float(values.mean()), math.nan, float(values.mean()), count)
        interval = Z * float(values.std()) / math.sqrt(count)
        return cls(float(values.mean()), interval, float(values.quantile(0.5)), count)

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.interval:.2g}"


@dataclass(frozen=True)
class Evaluation:
    """After some inner updates: the outer loss and the task's own figures, over the tasks whose loss is finite; and how
    many diverged: not finite, or above ten times the mean loss before any update. The finite ones are in the mean too.
    """

    loss: Estimate
    figures: dict[str, Estimate]
    diverged: int


@torch.no_grad()
def evaluate(
    learner: Learner, task: EpisodicTask, episode: Episode, steps: Sequence[int], objectives: Objectives
) -> dict[int, Evaluation]:
    """Number of inner updates -> how the learner does after them on the tasks of an episode."""
    learner.eval()
    losses, figures = {}, {}
    for count in sorted({0, *steps}):
        predictions = torch.cat([learner(part, count) for part in chunks(episode)])
        losses[count] = task_losses(objectives, predictions, episode.query.targets)
        figures[count] = task.measure(predictions, episode.query.targets)
    learner.train()
    far = DIVERGED * float(losses[0].mean())
    return {count: _evaluation(losses[count], figures[count], far) for count in steps}


def chunks(episode: Episode) -> list[Episode]:
    """The tasks of an episode, some at a time."""
    support, query = (zip(*(value.split(CHUNK) for value in batch), strict=True) for batch in episode)
    return [Episode(Batch(*shown), Batch(*asked)) for shown, asked in zip(support, query, strict=True)]


def _evaluation(losses: Tensor, figures: Mapping[str, Tensor], far: float) -> Evaluation:
    finite = losses.isfinite()
    diverged = int((~finite | (losses > far)).sum())
    return Evaluation(
        Estimate.of(losses[finite]), {name: Estimate.of(values[finite]) for name, values in figures.items()}, diverged
    )
