"""Few-shot classification: `ways` classes of a pool in random order, `shots` examples of each shown, `query` asked.

A class is what its examples make it; a task numbers its classes anew, so that nothing but the support set says which is
which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metamem.episodes.level import Batch, Episode
from metamem.tasks.evaluation import evaluation_generator
from metamem.tasks.text import TaskError


class FewShot(ABC):
    """Tasks over two pools of classes: those `trained` on, and those that are `evaluated`.

    Raises TaskError for sizes of which no task can be drawn.
    """

    def __init__(self, ways: int, shots: int, query: int, trained: Tensor, evaluated: Tensor) -> None:
        if min(ways, shots, query) < 1 or ways < 2:
            raise TaskError(f"ways must be at least 2, shots and query at least 1, not {ways}, {shots} and {query}")
        if ways > (fewest := min(len(trained), len(evaluated))):
            raise TaskError(f"ways is {ways}, and there are {fewest} classes to train on, or to evaluate on: lower it")
        self.ways, self.shots, self.query = ways, shots, query
        self.trained, self.evaluated = trained, evaluated

    @abstractmethod
    def draw(
        self, generator: torch.Generator, classes: Int[Tensor, "classes"], examples: int
    ) -> Float[Tensor, "classes examples *features"]:
        """Examples of each of the classes."""

    def sample(self, generator: torch.Generator, tasks: int) -> Episode:
        """Tasks over the classes that are trained on."""
        return self._over(self.trained, generator, tasks)

    def evaluation(self, tasks: int, seed: int = 0) -> Episode:
        """Tasks over the others."""
        return self._over(self.evaluated, evaluation_generator(seed), tasks)

    def _over(self, pool: Tensor, generator: torch.Generator, tasks: int) -> Episode:
        """Tasks over classes of the pool: images [tasks, ways · count, …] and labels [tasks, ways · count]."""
        chosen = torch.rand(tasks, len(pool), generator=generator).argsort(1)[:, : self.ways]
        images = self.draw(generator, pool[chosen].flatten(), self.shots + self.query)
        images = images.unflatten(0, (tasks, self.ways))
        labels = torch.arange(self.ways).view(1, self.ways, 1).expand(tasks, -1, self.shots + self.query)
        support, asked = (
            Batch(images[:, :, part].flatten(1, 2), labels[:, :, part].flatten(1, 2))
            for part in (slice(0, self.shots), slice(self.shots, None))
        )
        return Episode(support, asked)

    def measure(
        self, pred: Float[Tensor, "tasks examples ways"], target: Int[Tensor, "tasks examples"]
    ) -> dict[str, Float[Tensor, "tasks"]]:
        """`accuracy`: the share of examples whose largest logit is their class's."""
        return {"accuracy": (pred.argmax(-1) == target).float().mean(1)}
