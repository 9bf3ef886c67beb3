"""Task `sort`: read numbers, then write them out in ascending order.

inputs    x_1 … x_n   sort   ·   …  ·              tokens: 0 … symbols − 1, `sort`, `·`
targets               x_(1)  x_(2) … x_(n)         the smallest first, equal ones as often as they came
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from metamem.registry import TASKS
from metamem.targets import IGNORE
from metamem.tasks.episodic import Episodes, OfLengths
from metamem.tasks.text import TaskError


@TASKS.register("sort")
class Sort(OfLengths):
    """Sorting numbers.

    Args:
        lengths: the fewest and the most numbers of a training episode.
        symbols: how many numbers there are.
        tested: how many numbers are evaluated besides the most of training: more than was trained.
        examples: episodes of the evaluation set, for each of them.
        seed: of the evaluation set, which is the same for all models and at all times.

    Raises `TaskError` for settings that cannot be, and where a sequence is too short for the longest episode.
    """

    activity, items = "sorting", "numbers"

    def __init__(
        self,
        *,
        lengths: tuple[int, int] = (4, 8),
        symbols: int = 16,
        tested: tuple[int, ...] = (12, 16),
        examples: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(lengths, tested, examples, seed)
        if symbols < 2:
            raise TaskError(f"symbols must be at least 2, not {symbols}")
        self.symbols, self.vocabulary = symbols, symbols + 2

    def positions(self, size: int) -> int:
        """The numbers, and the numbers again."""
        return 2 * size

    def lay_out(self, generator: torch.Generator, sizes: Int[Tensor, "batch"], length: int) -> Episodes:
        """Random numbers, and what is sorted of them."""
        place, sizes, (mark, blank) = torch.arange(length), sizes[:, None], (self.symbols, self.symbols + 1)
        shown, wanted = place < sizes, (place >= sizes) & (place < 2 * sizes)
        numbers = torch.randint(self.symbols, shown.shape, generator=generator)
        # What is not shown is larger than any number, and so sorted to the end.
        ordered = numbers.masked_fill(~shown, self.symbols).sort(1).values
        inputs = torch.where(shown, numbers, torch.where(place == sizes, mark, blank))
        targets = torch.full_like(inputs, IGNORE)
        targets[wanted] = ordered[shown]
        return inputs, targets

    def describe(self) -> str:
        """What an episode holds and what is evaluated; one line each."""
        return (
            f"train: {self.shortest} to {self.longest} numbers of {self.symbols}, then the same in ascending order\n"
            f"{self.evaluated()}"
        )
