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
from metamem.tasks.episodic import Episodes, Episodic, check_length, check_range, draw
from metamem.tasks.text import TaskError


@TASKS.register("argmax")
class Argmax(Episodic):
    """The key of the largest number.

    Args:
        lengths: the fewest and the most pairs of a training episode.
        symbols: how many keys there are, and how many numbers; in an episode none comes twice.
        tested: how many pairs are evaluated besides the most of training: more than was trained.
        examples: episodes of the evaluation set, for each of them.
        seed: of the evaluation set, which is the same for all models and at all times.

    Raises `TaskError` for settings that cannot be, and where a sequence is too short for the longest episode.
    """

    def __init__(
        self,
        *,
        lengths: tuple[int, int] = (4, 8),
        symbols: int = 16,
        tested: tuple[int, ...] = (12, 16),
        examples: int = 256,
        seed: int = 0,
    ) -> None:
        self.shortest, self.longest = check_range("lengths", lengths)
        most = max((self.longest, *tested))
        if min((1, *tested)) < 1 or symbols < max(most, 2):
            raise TaskError(
                f"tested must be at least 1, and symbols at least 2 and the most pairs of an episode, {most}, not "
                f"{list(tested)} and {symbols}"
            )
        super().__init__({f"length-{n}": n for n in dict.fromkeys((self.longest, *tested))}, examples, seed)
        self.symbols, self.vocabulary = symbols, 2 * symbols + 1

    def sample(self, generator: torch.Generator, batch: int, length: int) -> Episodes:
        """`batch` episodes, each of its own number of pairs; after its `?` come more of them, not asked."""
        check_length(2 * self.longest + 1, length, f"the argmax of {self.longest} numbers")
        return self._lay_out(generator, draw(generator, batch, self.shortest, self.longest), length)

    def episodes(self, generator: torch.Generator, batch: int, setting: int) -> Episodes:
        """`batch` episodes of one number of pairs."""
        return self._lay_out(generator, torch.full((batch,), setting), 2 * setting + 1)

    def _lay_out(self, generator: torch.Generator, sizes: Int[Tensor, "batch"], length: int) -> Episodes:
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
        tested = ", ".join(str(n) for n in self.settings.values())
        return (
            f"train: {self.shortest} to {self.longest} keys with a number each, of {self.symbols}; then the key of the "
            f"largest\nevaluation: {self.examples} episodes each of {tested} pairs, seed {self.seed}"
        )
