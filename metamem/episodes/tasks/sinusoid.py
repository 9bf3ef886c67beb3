"""Task `sinusoid`: y = A sin(ω x + φ) from a few points (Finn et al. 2017; of unknown frequency: Li et al. 2017)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.episodes.level import Batch, Episode
from metamem.episodes.registry import EPISODES
from metamem.tasks.evaluation import evaluation_generator
from metamem.tasks.text import TaskError

PHASE = (0.0, math.pi)
X = (-5.0, 5.0)


class Waves(NamedTuple):
    """The parameters of several sines, each [tasks]."""

    amplitude: Tensor
    frequency: Tensor
    phase: Tensor

    def __call__(self, x: Float[Tensor, "tasks points 1"]) -> Float[Tensor, "tasks points 1"]:
        """A sin(ω x + φ)."""
        amplitude, frequency, phase = (value[:, None, None] for value in self)
        return amplitude * torch.sin(frequency * x + phase)


@EPISODES.register("sinusoid")
class Sinusoid:
    """Sines of an amplitude in 0.1 … 5 and a phase in 0 … π, seen at points in −5 … 5.

    - `frequency`   its range: [1, 1] for Finn's setting, [0.8, 1.2] for Li's
    - `shots`, `query`   points that are shown, and that are asked
    - `noise`       deviation of the values that are shown
    """

    def __init__(
        self,
        *,
        shots: int = 10,
        query: int = 10,
        frequency: tuple[float, float] = (0.8, 1.2),
        amplitude: tuple[float, float] = (0.1, 5.0),
        noise: float = 0.0,
    ) -> None:
        if shots < 1 or query < 1:
            raise TaskError(f"shots and query must be at least 1, not {shots} and {query}")
        for name, (low, high) in (("frequency", frequency), ("amplitude", amplitude)):
            if not 0 < low <= high:
                raise TaskError(f"{name} must be a range above 0, low to high, not [{low:g}, {high:g}]")
        if noise < 0:
            raise TaskError(f"noise must be at least 0, not {noise:g}")
        self.shots, self.query, self.noise = shots, query, noise
        self.frequency, self.amplitude = frequency, amplitude

    def waves(self, generator: torch.Generator, tasks: int) -> Waves:
        """Sines drawn from the prior."""
        return Waves(*(_uniform(generator, of, tasks) for of in (self.amplitude, self.frequency, PHASE)))

    def sample(self, generator: torch.Generator, tasks: int, query: int | None = None) -> Episode:
        """Tasks with points of their own."""
        waves = self.waves(generator, tasks)
        shown, asked = (_uniform(generator, X, tasks, count, 1) for count in (self.shots, query or self.query))
        values = waves(shown)
        if self.noise:
            values = values + self.noise * torch.randn(values.shape, generator=generator)
        return Episode(Batch(shown, values), Batch(asked, waves(asked)))

    def evaluation(self, tasks: int, seed: int = 0) -> Episode:
        """Tasks that are asked at 100 points each."""
        return self.sample(evaluation_generator(seed), tasks, query=100)

    def measure(
        self, pred: Float[Tensor, "tasks points 1"], target: Float[Tensor, "tasks points 1"]
    ) -> dict[str, Float[Tensor, "tasks"]]:
        """The mean squared error."""
        return {"mse": (pred - target).square().flatten(1).mean(1)}

    def bayes(self, episode: Episode, phases: int = 512, frequencies: int = 65) -> Float[Tensor, "tasks points 1"]:
        """The predictions of least expected squared error: the posterior mean given the support set, in float64."""
        if not self.noise:
            return self._determined(episode)
        tasks = zip(*episode.support, episode.query.inputs, strict=True)
        return torch.stack([self._posterior_mean(*task, phases, frequencies) for task in tasks])

    def _determined(self, episode: Episode) -> Tensor:
        """Without noise, two points determine amplitude and phase, and three the frequency with them (but for sets of
        measure zero): the posterior is a point, and its mean the truth."""
        unknown = 2 + (self.frequency[0] < self.frequency[1])
        if self.shots < unknown:
            raise TaskError(
                f"{self.shots} points without noise leave a curve of {unknown} unknowns, which no grid integrates: "
                f"give {unknown} or more shots, or a noise"
            )
        return episode.query.targets.double()

    def _posterior_mean(self, x: Tensor, y: Tensor, asked: Tensor, phases: int, frequencies: int) -> Tensor:
        """∫ E[A | φ, ω] sin(ω x* + φ) dp(φ, ω | data) on a grid of midpoints; A, uniform on its range, in closed form:
        given φ and ω the likelihood is a normal of A, with mean m = Σ s y / Σ s² and variance v = σ² / Σ s²."""
        x, y, asked = (value.double().flatten() for value in (x, y, asked))
        phase, frequency = _midpoints(PHASE, phases), _midpoints(self.frequency, frequencies)
        # sin(ω x + φ) = sin(ω x) cos φ + cos(ω x) sin φ: sines of frequencies and of phases, never of pairs.
        turns, circle = frequency[:, None] * x, torch.stack([phase.cos(), phase.sin()])
        sines = torch.einsum("cfn,cp->fpn", torch.stack([turns.sin(), turns.cos()]), circle)
        power = sines.square().sum(-1).clamp(min=1e-12)
        mean, deviation = (sines @ y) / power, self.noise / power.sqrt()
        low, high = ((bound - mean) / deviation for bound in self.amplitude)
        if self.amplitude[0] == self.amplitude[1]:
            amplitude = torch.full_like(mean, self.amplitude[0])
            log_mass = -0.5 * low.square()
        else:
            log_mass = deviation.log() + _log_normal_mass(low, high)
            amplitude = mean + deviation * _truncated_mean(low, high)
        # The likelihood at the best A, −½ (Σ y² − m² Σ s²) / σ², and the mass of A around it.
        log_posterior = 0.5 * mean.square() * power / self.noise**2 + log_mass
        weight = torch.softmax(log_posterior.flatten(), 0).view_as(mean) * amplitude
        turns = frequency[:, None] * asked
        return torch.einsum("fp,cp,cfn->n", weight, circle, torch.stack([turns.sin(), turns.cos()]))[:, None]

    def describe(self) -> str:
        """The setting."""
        low, high = self.frequency
        frequency = f"frequency {low:g}" if low == high else f"frequency {low:g}–{high:g}"
        return f"sines of amplitude {self.amplitude[0]:g}–{self.amplitude[1]:g}, {frequency}: {self.shots} points shown"


def _uniform(generator: torch.Generator, bounds: tuple[float, float], *shape: int) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(shape, generator=generator)


def _midpoints(bounds: tuple[float, float], count: int) -> Tensor:
    if bounds[0] == bounds[1]:
        return torch.tensor([bounds[0]], dtype=torch.float64)
    step = (bounds[1] - bounds[0]) / count
    return bounds[0] + step * (torch.arange(count, dtype=torch.float64) + 0.5)


def _log_normal_mass(low: Tensor, high: Tensor) -> Tensor:
    """log (Φ(high) − Φ(low)), also far out in either tail, from which side it is small."""
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return upper + torch.log1p(-torch.exp(lower - upper).clamp(max=1 - 1e-15))


def _truncated_mean(low: Tensor, high: Tensor) -> Tensor:
    """(φ(low) − φ(high)) / (Φ(high) − Φ(low)): the mean of a standard normal that is cut to a range."""
    mass = _log_normal_mass(low, high)
    density_low, density_high = (torch.exp(-0.5 * (z * z + math.log(2 * math.pi)) - mass) for z in (low, high))
    # Where the range lies far out, the mass is all at its nearer end.
    return torch.clamp(density_low - density_high, low, high)
