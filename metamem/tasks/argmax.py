"""Task `argmax`: read keys, each with a number, then name the key of the largest.

inputs    k_1 x_1  k_2 x_2  …  k_n x_n  ?      tokens: keys, then numbers, then `?`
target                                  k_i    i = argmax x
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from metamem.registry import TASKS
from metamem.targets import IGNORE
from metamem.tasks.episodic import Episodes, OfLengths
from metamem.tasks.text import TaskError


@TASKS.register("argmax")
class Argmax(OfLengths):
    """The key of the largest number.

    Args:
        lengths: the fewest and the most pairs of a training episode.
        symbols: how many keys there are, and how many numbers; in an episode none comes twice.
        tested: how many pairs are evaluated besides the most of training: more than was trained.
        examples: episodes of the evaluation set, for each of them.
        seed: of the evaluation set, which is the same for all models and at all times.

    Raises `TaskError` for settings that cannot be, and where a sequence is too short for the longest episode.
    """

    activity, items = "the argmax of", "pairs"

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
        most = max(self.settings.values())
        if symbols < max(most, 2):
            raise TaskError(f"symbols must be at least 2 and the most pairs of an episode, {most}, not {symbols}")
        self.symbols, self.vocabulary = symbols, 2 * symbols + 1

    def positions(self, size: int) -> int:
        """The pairs, and `?`."""
        return 2 * size + 1

    def lay_out(self, generator: torch.Generator, sizes: Int[Tensor, "batch"], length: int) -> Episodes:
        """Random pairs; after the `?` of an episode come more of them, not asked."""
        place, batch = torch.arange(length), len(sizes)
        keys, numbers = (torch.rand(batch, self.symbols, generator=generator).argsort(-1) for _ in range(2))
        shown = torch.arange(self.symbols) < sizes[:, None]
        largest = numbers.masked_fill(~shown, -1).argmax(1, keepdim=True)
        pairs = torch.stack([keys, self.symbols + numbers], 2).flatten(1)[:, :length]
        inputs = torch.full((batch, length), 2 * self.symbols)
        inputs[:, : pairs.shape[1]] = pairs
        inputs[place >= 2 * sizes[:, None]] = 2 * self.symbols
        targets = torch.full_like(inputs, IGNORE).scatter(1, 2 * sizes[:, None], keys.gather(1, largest))
        return inputs, targets

    def describe(self) -> str:
        """What an episode holds and what is evaluated; one line each."""
        return (
            f"train: {self.shortest} to {self.longest} keys with a number each, of {self.symbols}; then the key of the "
            f"largest\n{self.evaluated()}"
        )
