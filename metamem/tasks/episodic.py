"""Tasks of generated episodes in several settings, such as lengths: some are trained, those and more are evaluated."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from metamem.targets import Targets, asked
from metamem.tasks.evaluation import evaluation_generator, in_batches
from metamem.tasks.text import TaskError

Inputs: TypeAlias = Int[Tensor, "batch length"] | Float[Tensor, "batch length inputs"]
Episodes: TypeAlias = tuple[Inputs, Targets]
Predictions: TypeAlias = Float[Tensor, "batch length outputs"]


class Episodic(ABC):
    """A task whose episodes are drawn in settings; `settings` names those that are evaluated, each on `examples`
    episodes that are the same for all models and at all times."""

    def __init__(self, settings: Mapping[str, Any], examples: int, seed: int) -> None:
        if examples < 1:
            raise TaskError(f"examples must be at least 1, not {examples}")
        self.settings, self.examples, self.seed = dict(settings), examples, seed

    @abstractmethod
    def sample(self, generator: torch.Generator, batch: int, length: int) -> Episodes:
        """`batch` episodes to train on, of `length` positions each: inputs, and targets at what is asked."""

    @abstractmethod
    def episodes(self, generator: torch.Generator, batch: int, setting: Any) -> Episodes:
        """`batch` episodes of one setting, as long as they need to be."""

    def evaluation(self, name: str) -> Episodes:
        """The evaluation episodes of a setting."""
        number = list(self.settings).index(name)
        generator = evaluation_generator(1000 * self.seed + number)
        return self.episodes(generator, self.examples, self.settings[name])

    def evaluate(self, predict: Callable[[Tensor, Tensor], Tensor], length: int | None = None) -> dict[str, float]:
        """What `measure` says of each setting, such as `accuracy/length-8`; the setting decides how long an episode
        is, whatever `length` says.

        `predict` gives the predictions for (inputs, targets), which only a model that learns on the way looks at.
        """
        found = {}
        for name in self.settings:
            inputs, targets = self.evaluation(name)
            measured = self.measure(in_batches(predict, inputs, targets), targets)
            found |= {f"{key}/{name}": value for key, value in measured.items()}
        return found

    def measure(self, predictions: Predictions, targets: Targets) -> dict[str, float]:
        """Of the answers that are asked: `accuracy`, the share right; `exact`, the share of episodes without an error;
        `bits`, −log₂ p of all that an episode asks."""
        return measure(predictions, targets)


class OfLengths(Episodic):
    """A task whose episodes have a number of items: from the fewest to the most of `lengths` in training; evaluated are
    the most of training and each of `tested`. `activity` and `items`: what an episode asks, and of what, in words."""

    activity: str
    items: str

    def __init__(
        self, lengths: tuple[int, int], tested: tuple[int, ...], examples: int, seed: int, least: int = 1
    ) -> None:
        self.shortest, self.longest = check_range("lengths", lengths, least)
        if min((least, *tested)) < least:
            raise TaskError(f"tested must be at least {least}, not {list(tested)}")
        super().__init__({f"length-{n}": n for n in dict.fromkeys((self.longest, *tested))}, examples, seed)

    @abstractmethod
    def positions(self, size: int) -> int:
        """How long an episode of `size` items is."""

    @abstractmethod
    def lay_out(self, generator: torch.Generator, sizes: Int[Tensor, "batch"], length: int) -> Episodes:
        """Episodes of as many items as `sizes` says, each in `length` positions."""

    def sample(self, generator: torch.Generator, batch: int, length: int) -> Episodes:
        """`batch` episodes, each of its own number of items."""
        return self.drawn(generator, batch, length, self.longest)

    def drawn(self, generator: torch.Generator, batch: int, length: int, most: int) -> Episodes:
        """`batch` episodes of up to `most` items. Raises TaskError where the longest of training does not fit."""
        check_length(self.positions(self.longest), length, f"{self.activity} {self.longest} {self.items}")
        return self.lay_out(generator, draw(generator, batch, self.shortest, most), length)

    def episodes(self, generator: torch.Generator, batch: int, setting: int) -> Episodes:
        """`batch` episodes of one number of items."""
        return self.lay_out(generator, torch.full((batch,), setting), self.positions(setting))

    def evaluated(self) -> str:
        """What is evaluated; one line."""
        tested = ", ".join(str(n) for n in self.settings.values())
        return f"evaluation: {self.examples} episodes each of {tested} {self.items}, seed {self.seed}"


def measure(predictions: Predictions, targets: Targets) -> dict[str, float]:
    """Accuracy, exact episodes and bits an episode, of logits for tokens, or for bits where targets are numbers."""
    wanted = asked(targets)
    if targets.is_floating_point():
        losses = functional.binary_cross_entropy_with_logits(predictions, targets.nan_to_num(), reduction="none")
        right = (predictions > 0) == (targets > 0.5)
        wanted = wanted.unsqueeze(-1).expand_as(right)
    else:
        logits = predictions.flatten(0, 1)
        losses = functional.cross_entropy(logits, targets.clamp(min=0).flatten(), reduction="none").view_as(targets)
        right = predictions.argmax(-1) == targets
    losses, exact = losses.double().masked_fill(~wanted, 0.0), (right | ~wanted).flatten(1).all(1)
    return {
        "accuracy": float(right[wanted].double().mean()),
        "exact": float(exact.double().mean()),
        "bits": float(losses.flatten(1).sum(1).mean() / math.log(2)),
    }


def draw(generator: torch.Generator, batch: int, low: int, high: int) -> Int[Tensor, "batch"]:
    """A whole number from low to high for each row."""
    return torch.randint(low, high + 1, (batch,), generator=generator)


def check_range(name: str, bounds: tuple[int, int], least: int = 1) -> tuple[int, int]:
    """The bounds, where they lie right."""
    if not least <= bounds[0] <= bounds[1]:
        raise TaskError(f"{name} must be two numbers, the fewest, at least {least}, and the most, not {list(bounds)}")
    return bounds


def check_length(needed: int, length: int, what: str) -> None:
    """Raises TaskError where the longest episode does not fit."""
    if needed > length:
        raise TaskError(
            f"{what} needs a sequence of {needed} positions, and has {length}: make training.length larger, or the "
            f"task smaller"
        )


def pad(x: Shaped[Tensor, "batch time *rest"], length: int, value: float) -> Shaped[Tensor, "batch length *rest"]:
    """`x` with `value` after its end, up to `length`."""
    return functional.pad(x, (*(0, 0) * (x.ndim - 2), 0, length - x.shape[1]), value=value)


def shuffler(generator: torch.Generator) -> random.Random:
    """Python's own random numbers, decided by a torch generator: for episodes that are built node by node."""
    return random.Random(int(torch.randint(2**62, (), generator=generator)))
