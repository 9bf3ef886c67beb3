"""Task `repeat_copy`: read random bit vectors and a number, then write the vectors out that many times, and an end mark
(Graves et al. 2014, arXiv 1410.5401, section 4.2).

    inputs    start   v_1 … v_n   r   0 … 0                            channels: `width` bits, start, repeats
    targets                           v_1 … v_n  v_1 … v_n  …  end     bits and the end mark, as logits

The channel of repeats holds r / the most of training, so that a number never trained is one further on.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from metamem.registry import TASKS
from metamem.tasks.episodic import Episodes, Episodic, check_length, check_range, draw
from metamem.tasks.text import TaskError


@TASKS.register("repeat_copy")
class RepeatCopy(Episodic):
    """Copying bit vectors several times.

    Args:
        lengths: the fewest and the most vectors of a training episode.
        repeats: how often they are copied, at least and at most.
        width: bits of a vector.
        tested: (vectors, repeats) that are evaluated besides the most of training.
        examples: episodes of the evaluation set, for each of them.
        seed: of the evaluation set, which is the same for all models and at all times.

    Raises `TaskError` for settings that cannot be, and where a sequence is too short for the longest episode.
    """

    def __init__(
        self,
        *,
        lengths: tuple[int, int] = (1, 5),
        repeats: tuple[int, int] = (1, 4),
        width: int = 8,
        tested: tuple[tuple[int, int], ...] = ((10, 4), (5, 8)),
        examples: int = 128,
        seed: int = 0,
    ) -> None:
        self.lengths, self.repeats = check_range("lengths", lengths), check_range("repeats", repeats)
        if width < 1 or any(min(pair) < 1 for pair in tested):
            raise TaskError(f"width and tested must be at least 1, not {width} and {[list(pair) for pair in tested]}")
        pairs = dict.fromkeys([(self.lengths[1], self.repeats[1]), *tested])
        super().__init__({f"length-{n}-repeats-{r}": (n, r) for n, r in pairs}, examples, seed)
        self.width = width
        self.dim_in, self.dim_out = width + 2, width + 1

    def sample(self, generator: torch.Generator, batch: int, length: int) -> Episodes:
        """`batch` episodes, each of its own number of vectors and repeats."""
        (fewest, most), (once, often) = self.lengths, self.repeats
        check_length(needed(most, often), length, f"copying {most} vectors {often} times")
        sizes, repeats = draw(generator, batch, fewest, most), draw(generator, batch, once, often)
        return self._lay_out(generator, sizes, repeats, length)

    def episodes(self, generator: torch.Generator, batch: int, setting: tuple[int, int]) -> Episodes:
        """`batch` episodes of one number of vectors and repeats."""
        sizes, repeats = (torch.full((batch,), number) for number in setting)
        return self._lay_out(generator, sizes, repeats, needed(*setting))

    def _lay_out(
        self, generator: torch.Generator, sizes: Int[Tensor, "batch"], repeats: Int[Tensor, "batch"], length: int
    ) -> Episodes:
        place, sizes, repeats = torch.arange(length), sizes[:, None], repeats[:, None]
        shown = (place >= 1) & (place <= sizes)
        first, end = sizes + 2, (repeats + 1) * sizes + 2  # of the answer, and its end mark
        bits = torch.randint(2, (*shown.shape, self.width), generator=generator).float() * shown.unsqueeze(-1)
        inputs = torch.zeros(*shown.shape, self.dim_in)
        inputs[..., : self.width] = bits
        inputs[:, 0, self.width] = 1.0
        inputs[..., self.width + 1] = (place == sizes + 1) * repeats / self.repeats[1]
        copied = bits.gather(1, (1 + (place - first) % sizes).unsqueeze(-1).expand_as(bits))
        answer = torch.cat([copied * (place < end).unsqueeze(-1), (place == end).unsqueeze(-1)], -1)
        wanted = (place >= first) & (place <= end)
        return inputs, answer.masked_fill(~wanted.unsqueeze(-1), math.nan)

    def describe(self) -> str:
        """What an episode holds and what is evaluated; one line each."""
        (fewest, most), (once, often) = self.lengths, self.repeats
        tested = ", ".join(f"{n} × {r}" for n, r in self.settings.values())
        return (
            f"train: {fewest} to {most} vectors of {self.width} bits, the same {once} to {often} times and an end\n"
            f"evaluation: {self.examples} episodes each of {tested}, seed {self.seed}"
        )


def needed(size: int, repeats: int) -> int:
    """Positions of an episode."""
    return (repeats + 1) * size + 3
