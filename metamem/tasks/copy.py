"""Task `copy`: read random bit vectors, then write them out again (Graves et al. 2014, arXiv 1410.5401, section 4.1).

    inputs    start   v_1 … v_n   recall   0 … 0          channels: `width` bits, start, recall
    targets                                v_1 … v_n      bits, as logits; nothing else is asked

A curriculum begins with the shortest and goes on to longer ones.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from metamem.registry import TASKS
from metamem.tasks.episodic import Episodes, OfLengths
from metamem.tasks.text import TaskError


@TASKS.register("copy")
class Copy(OfLengths):
    """Copying bit vectors.

    Args:
        lengths: the fewest and the most vectors of a training episode; each has its own number of them.
        width: bits of a vector.
        tested: numbers of vectors that are evaluated besides the most of training: more than was trained.
        curriculum: outer steps after which episodes may be one vector longer, from the fewest on; 0: all at once.
        examples: episodes of the evaluation set, for each number of vectors.
        seed: of the evaluation set, which is the same for all models and at all times.

    Raises `TaskError` for settings that cannot be, and where a sequence is too short for the longest episode.
    """

    activity, items = "copying", "vectors"

    def __init__(
        self,
        *,
        lengths: tuple[int, int] = (1, 8),
        width: int = 8,
        tested: tuple[int, ...] = (16, 32, 64),
        curriculum: int = 0,
        examples: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(lengths, tested, examples, seed)
        if width < 1 or curriculum < 0:
            raise TaskError(f"width must be at least 1 and curriculum 0, not {width} and {curriculum}")
        self.width, self.curriculum = width, curriculum
        self.dim_in, self.dim_out = width + 2, width

    def task_at(self, step: int) -> int:
        """The stage of the curriculum of an outer step, from 0: by how much the longest episode has grown."""
        stages = self.longest - self.shortest
        return min((step - 1) // self.curriculum, stages) if self.curriculum else stages

    def sample(self, generator: torch.Generator, batch: int, length: int, task: int | None = None) -> Episodes:
        """`batch` episodes, each of its own number of vectors, of those that stage `task` has."""
        return self.drawn(generator, batch, length, self.longest if task is None else self.shortest + task)

    def positions(self, size: int) -> int:
        """The start, the vectors, the recall, and the vectors again."""
        return 2 * size + 2

    def lay_out(self, generator: torch.Generator, sizes: Int[Tensor, "batch"], length: int) -> Episodes:
        """Random vectors, and the same after the recall."""
        place, sizes = torch.arange(length), sizes[:, None]
        shown = (place >= 1) & (place <= sizes)
        wanted = (place >= sizes + 2) & (place <= 2 * sizes + 1)
        bits = torch.randint(2, (*shown.shape, self.width), generator=generator).float()
        inputs = torch.zeros(*shown.shape, self.dim_in)
        inputs[..., : self.width] = bits * shown.unsqueeze(-1)
        inputs[:, 0, self.width] = 1.0
        inputs[..., self.width + 1] = (place == sizes + 1).float()
        targets = torch.full_like(bits, math.nan)
        targets[wanted] = bits[shown]  # both in the order of rows, then of places
        return inputs, targets

    def describe(self) -> str:
        """What an episode holds and what is evaluated; one line each."""
        grows = f", one longer every {self.curriculum} steps" if self.curriculum else ""
        return (
            f"train: {self.shortest} to {self.longest} vectors of {self.width} bits, then the same again{grows}\n"
            f"{self.evaluated()}"
        )
