"""Task `drift`: online linear regression whose weights drift, each output row's at a speed of its own.

    x_t ~ N(0, I)      y_t = x_t W_t + σ ε_t      row r of W_t: an AR(1) walk of variance 1 and half-life h_r
    w_t = a w_{t−1} + √(1 − a²) ξ_t,   a = ½^(1/h)                                h = ∞: the weights stay as drawn

At t a model sees [x_t, x_{t−1}, y_{t−1}] and is asked for y_t: a memory that writes y_{t−1} at the key x_{t−1} and
reads at x_t does the regression online. The right timescales are known, and so is the best that can be done: the
Kalman filter of each row (`metamem.tasks.kalman`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from metamem.registry import TASKS
from metamem.tasks.evaluation import evaluation_generator
from metamem.tasks.kalman import Filtered, kalman_filter
from metamem.tasks.text import TaskError

Episodes = tuple[Float[Tensor, "batch length inputs"], Float[Tensor, "batch length rows"]]
HALF_LIVES = (20.0, 20.0, 200.0, 200.0, 2000.0, 2000.0, None, None)


class Regression(NamedTuple):
    """What is regressed: x, y, y without its noise, and where a row's weights were drawn anew before t."""

    x: Float[Tensor, "batch length features"]
    y: Float[Tensor, "batch length rows"]
    clean: Float[Tensor, "batch length rows"]
    redrawn: Bool[Tensor, "batch length rows"]


@TASKS.register("drift")
class Drift:
    """Online linear regression with drifting weights.

    Args:
        half_lives: of each output row's weights, in tokens; none (null) for weights that stay.
        features: of x.
        noise: σ, the standard deviation of what is added to y.
        jumps: the probability, at each token and for each row, that its weights are drawn anew. The filter that the
            evaluation compares with then knows when: a lower bound that no model reaches.
        asked_from: of a training sequence, the share after which y is asked.
        stream: tokens of an evaluation stream, of which the second half counts.
        examples: evaluation streams.
        seed: of the evaluation streams, which are the same for all models and at all times.

    Raises `TaskError` for settings that cannot be.
    """

    def __init__(
        self,
        *,
        half_lives: tuple[float | None, ...] = HALF_LIVES,
        features: int = 16,
        noise: float = 0.5,
        jumps: float = 0.0,
        asked_from: float = 0.5,
        stream: int = 12_000,
        examples: int = 4,
        seed: int = 0,
    ) -> None:
        self.half_lives = tuple(math.inf if life is None else life for life in half_lives)
        if not half_lives or not min(self.half_lives) > 0:
            raise TaskError(f"half_lives must be numbers above 0, at least one, not {list(half_lives)}")
        if min(features, examples) < 1 or stream < 2:
            raise TaskError(
                f"features and examples must be at least 1 and stream 2, not {features}, {examples} and {stream}"
            )
        if not noise > 0:
            raise TaskError(f"noise must be above 0, not {noise}")
        for name, share in (("jumps", jumps), ("asked_from", asked_from)):
            if not 0 <= share < 1:
                raise TaskError(f"{name} must be at least 0 and below 1, not {share}")
        self.features, self.noise, self.jumps, self.asked_from = features, noise, jumps, asked_from
        self.stream, self.examples, self.seed = stream, examples, seed
        self.decay = 0.5 ** (1 / torch.tensor(self.half_lives, dtype=torch.float64))

    def sample(self, generator: torch.Generator, batch: int, length: int) -> Episodes:
        """`batch` sequences: inputs [x_t, x_{t−1}, y_{t−1}], and y_t where it is asked."""
        drawn = self.draw(generator, batch, length, torch.get_default_dtype())
        targets = drawn.y.clone()
        targets[:, : int(self.asked_from * length)] = math.nan
        return inputs(drawn), targets

    def draw(
        self, generator: torch.Generator, batch: int, length: int, dtype: torch.dtype = torch.float64
    ) -> Regression:
        """`batch` regressions of `length` tokens."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(batch, length, *shape, generator=generator, dtype=dtype)

        rows = len(self.half_lives)
        redrawn = torch.zeros(batch, length, rows, dtype=torch.bool)
        if self.jumps:
            redrawn = torch.rand(batch, length, rows, generator=generator) < self.jumps
        x, noise = normal(self.features), normal(rows)
        weights = walk(normal(rows, self.features), self.decay.to(dtype), redrawn)
        clean = torch.einsum("btf,btrf->btr", x, weights)
        return Regression(x, clean + self.noise * noise, clean, redrawn)

    @cached_property
    def evaluation(self) -> Regression:
        """The evaluation streams."""
        generator = evaluation_generator(1000 * self.seed)
        return self.draw(generator, self.examples, self.stream)

    @cached_property
    def optimum(self) -> Filtered:
        """The Kalman filter on the evaluation streams."""
        streams = self.evaluation
        return kalman_filter(streams.x, streams.y, self.decay, self.noise, streams.redrawn if self.jumps else None)

    def evaluate(self, predict: Callable[[Tensor, Tensor], Tensor], length: int | None = None) -> dict[str, float]:
        """Squared errors of what is predicted of y without its noise, over those of the Kalman filter, on the second
        half of the streams: `ratio`, of the sums over all rows, `ratio/row-0` of each, and `excess/row-0`, how much of
        `ratio` − 1 is its; `optimum/ratio` is the filter's.

        `predict` gives the predictions for (inputs, targets) of whole streams in one call, whatever `length` says.
        """
        streams = self.evaluation
        dtype = torch.get_default_dtype()
        predictions = predict(inputs(streams).to(dtype), streams.y.to(dtype)).double()
        mine, best = (self._errors(each) for each in (predictions, self.optimum.predictions))
        found = {"ratio": float(mine.sum() / best.sum()), "optimum/ratio": 1.0}
        for name, shares in (("ratio", mine / best), ("excess", (mine - best) / best.sum())):
            found |= {f"{name}/row-{row}": share for row, share in enumerate(shares.tolist())}
        return found

    def _errors(self, predictions: Tensor) -> Float[Tensor, "rows"]:
        second = slice(self.stream // 2, None)
        return (predictions - self.evaluation.clean)[:, second].square().mean((0, 1))

    def describe(self) -> str:
        """What a sequence holds and what is evaluated; one line each."""
        lives = ", ".join(f"{life:g}" for life in self.half_lives)
        jumps = f", redrawn with probability {self.jumps:g} a token" if self.jumps else ""
        return (
            f"train: regressions of {len(self.half_lives)} rows on {self.features} features, half-lives {lives} tokens"
            f"{jumps}, noise {self.noise:g}\n"
            f"evaluation: {self.examples} streams of {self.stream:,} tokens, seed {self.seed}; errors over the Kalman "
            f"filter's"
        )


def inputs(drawn: Regression) -> Float[Tensor, "batch length inputs"]:
    """[x_t, x_{t−1}, y_{t−1}]: what a model sees at t; zeros before the first."""
    before = [functional.pad(each[:, :-1], (0, 0, 1, 0)) for each in (drawn.x, drawn.y)]
    return torch.cat([drawn.x, *before], -1)


def walk(
    steps: Float[Tensor, "batch time rows features"],
    decay: Float[Tensor, "rows"],
    redrawn: Bool[Tensor, "batch time rows"],
) -> Float[Tensor, "batch time rows features"]:
    """w_t = a w_{t−1} + √(1 − a²) ξ_t of ξ ~ N(0, 1); w_t = ξ_t at the first token, and where redrawn. By doubling:
    what the last 2^k steps left in w_t, then the last 2^{k+1} (Hillis and Steele 1986)."""
    fresh = redrawn.clone()
    fresh[:, 0] = True
    kept = torch.where(fresh, 0.0, decay).unsqueeze(-1)
    weights = torch.where(fresh, 1.0, (1 - decay.square()).sqrt()).unsqueeze(-1) * steps
    reach = 1
    while reach < steps.shape[1]:
        weights[:, reach:] += kept[:, reach:] * weights[:, :-reach]
        kept[:, reach:] = kept[:, reach:] * kept[:, :-reach]
        reach *= 2
    return weights


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values at the mean of theirs; nan where all of one are equal."""
    ranks = torch.stack([_ranks(torch.tensor(values, dtype=torch.float64)) for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Float[Tensor, "items"]) -> Float[Tensor, "items"]:
    below, equal = (compare(values, values[:, None]).sum(1) for compare in (torch.lt, torch.eq))
    return below + 0.5 * (equal + 1).double()
