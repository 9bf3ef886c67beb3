"""Task `adding`: read numbers, two of them marked, and give the sum of these two at the end (Hochreiter and Schmidhuber
1997, Long Short-Term Memory, section 5.4).

    inputs    (u_1, m_1)  (u_2, m_2)  …  (u_n, m_n)      u ~ U(0, 1); m is 1 at one place of each half, else 0
    target                               u_i + u_j       at the last number
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from metamem.registry import TASKS
from metamem.targets import Targets, asked
from metamem.tasks.episodic import Episodes, OfLengths, Predictions

NEAR = 0.04  # an answer this near to the sum is right, as in the paper


@TASKS.register("adding")
class Adding(OfLengths):
    """The sum of two marked numbers.

    Args:
        lengths: the fewest and the most numbers of a training episode, at least 2.
        tested: how many numbers are evaluated besides the most of training: more than was trained.
        examples: episodes of the evaluation set, for each of them.
        seed: of the evaluation set, which is the same for all models and at all times.

    Raises `TaskError` for settings that cannot be, and where a sequence is too short for the longest episode.
    """

    activity, items = "adding among", "numbers"
    dim_in, dim_out = 2, 1

    def __init__(
        self,
        *,
        lengths: tuple[int, int] = (20, 50),
        tested: tuple[int, ...] = (100, 200),
        examples: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(lengths, tested, examples, seed, least=2)

    def positions(self, size: int) -> int:
        """The numbers; the sum is asked at the last."""
        return size

    def lay_out(self, generator: torch.Generator, sizes: Int[Tensor, "batch"], length: int) -> Episodes:
        """Random numbers, two of them marked, and their sum."""
        sizes, half = sizes[:, None], sizes[:, None] // 2
        uniform = torch.rand(len(sizes), length + 2, generator=generator)
        numbers = uniform[:, :length] * (torch.arange(length) < sizes)
        first = (uniform[:, -2:-1] * half).long()
        marked = torch.cat([first, half + (uniform[:, -1:] * (sizes - half)).long()], 1)
        marks = torch.zeros_like(numbers).scatter(1, marked, 1.0)
        sums = (numbers * marks).sum(1, keepdim=True)
        targets = torch.full_like(numbers, math.nan).scatter(1, sizes - 1, sums)
        return torch.stack([numbers, marks], -1), targets.unsqueeze(-1)

    def measure(self, predictions: Predictions, targets: Targets) -> dict[str, float]:
        """`accuracy`, the share of sums that are met within 0.04; `squared_error`, its mean: 0.167 for who says 1."""
        error = (predictions - targets)[asked(targets)]
        return {"accuracy": float((error.abs() < NEAR).double().mean()), "squared_error": float(error.square().mean())}

    def describe(self) -> str:
        """What an episode holds and what is evaluated; one line each."""
        return (
            f"train: {self.shortest} to {self.longest} numbers between 0 and 1, then the sum of the two marked ones\n"
            f"{self.evaluated()}"
        )
