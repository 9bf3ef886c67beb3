"""Task `temperatures`: the next hour's temperature in a city, learned from some days and asked over the days after.

From the hours of 2010 in Seattle and San Francisco (the package vega-datasets). A model that is meta-trained on one
city adapts to the weather of a stretch of days in the other.
"""

from __future__ import annotations

import csv
import math
from importlib import resources
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.episodes.level import Batch, Episode
from metamem.episodes.registry import EPISODES
from metamem.tasks.evaluation import evaluation_generator
from metamem.tasks.text import TaskError

City = Literal["seattle", "sf"]
LAGS = (1, 2, 3, 24)  # hours before, whose temperatures a prediction is given
FEATURES = len(LAGS) + 2


@EPISODES.register("temperatures")
class Temperatures:
    """Stretches of hours in one city to meta-train on, and in another to be asked.

    Inputs: the temperatures 1, 2, 3 and 24 hours before and the time of day on a circle, 6 numbers; target: the
    temperature of the hour. All in units of the trained city's deviation around its mean.

    - `train`, `evaluated`   the cities, `seattle` or `sf`
    - `shots`, `query`       hours that are shown, and those after them that are asked
    """

    def __init__(self, *, train: City = "seattle", evaluated: City = "sf", shots: int = 48, query: int = 24) -> None:
        if shots < 1 or query < 1:
            raise TaskError(f"shots and query must be at least 1, not {shots} and {query}")
        cities: tuple[City, City] = (train, evaluated)
        self.shots, self.query, self.cities = shots, query, cities
        hours = load(train)
        self.mean, self.deviation = hours.mean(), hours.std()
        self.train, self.evaluated = (_examples((load(city) - self.mean) / self.deviation) for city in cities)
        if shots + query > (longest := len(self.train.targets)):
            raise TaskError(f"shots and query are {shots + query} hours, and a year has {longest}")

    def sample(self, generator: torch.Generator, tasks: int) -> Episode:
        """Stretches of the city that is trained on."""
        return self._stretches(self.train, generator, tasks)

    def evaluation(self, tasks: int, seed: int = 0) -> Episode:
        """Stretches of the other."""
        return self._stretches(self.evaluated, evaluation_generator(seed), tasks)

    def _stretches(self, of: Batch, generator: torch.Generator, tasks: int) -> Episode:
        length = self.shots + self.query
        starts = torch.randint(len(of.targets) - length + 1, (tasks, 1), generator=generator)
        inputs, targets = (value[starts + torch.arange(length)] for value in of)
        return Episode(*(Batch(inputs[:, part], targets[:, part]) for part in _parts(self.shots)))

    def measure(
        self, pred: Float[Tensor, "tasks hours 1"], target: Float[Tensor, "tasks hours 1"]
    ) -> dict[str, Float[Tensor, "tasks"]]:
        """The root of the mean squared error, in degrees Fahrenheit."""
        return {"degrees": self.deviation * (pred - target).square().flatten(1).mean(1).sqrt()}

    def describe(self) -> str:
        """The setting."""
        return (
            f"the next hour's temperature: {self.shots} hours shown, the next {self.query} asked; of {self.cities[0]} "
            f"in training, of {self.cities[1]} evaluated"
        )


def load(city: City) -> Float[Tensor, "hours"]:
    """The temperatures of a city, hour by hour, in degrees Fahrenheit."""
    try:
        file = resources.files("vega_datasets") / "_data" / f"{city}-temps.csv"
        text = file.read_text()
    except ModuleNotFoundError:
        raise TaskError("the task 'temperatures' needs vega-datasets: install metamem-torch[few-shot]") from None
    except OSError as error:
        raise TaskError(f"the temperatures of {city!r} cannot be read: {error}") from None
    return torch.tensor([float(row["temp"]) for row in csv.DictReader(text.splitlines())])


def _examples(hours: Tensor) -> Batch:
    """Every hour that has all hours before it: inputs [hours, 6], targets [hours, 1]."""
    first = max(LAGS)
    lagged = [hours[first - lag : len(hours) - lag] for lag in LAGS]
    angle = 2 * math.pi * torch.arange(first, len(hours)) / 24
    return Batch(torch.stack([*lagged, angle.sin(), angle.cos()], 1), hours[first:, None])


def _parts(shots: int) -> tuple[slice, slice]:
    return slice(0, shots), slice(shots, None)
