"""Task `digits`: scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, five to train on and five to be asked."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metamem.episodes.registry import EPISODES
from metamem.episodes.tasks.few_shot import FewShot
from metamem.tasks.text import TaskError


@EPISODES.register("digits")
class Digits(FewShot):
    """`ways` digits to tell apart from `shots` examples of each; those of `evaluated` are never trained on."""

    def __init__(
        self, *, ways: int = 3, shots: int = 5, query: int = 10, evaluated: tuple[int, ...] = (1, 3, 5, 7, 9)
    ) -> None:
        unknown = sorted(set(evaluated) - set(range(10)))
        if unknown or not evaluated:
            raise TaskError(f"evaluated must be digits of 0 to 9, not {list(evaluated)}")
        trained = [digit for digit in range(10) if digit not in evaluated]
        super().__init__(ways, shots, query, torch.tensor(trained), torch.tensor(sorted(set(evaluated))))
        images, labels = load()
        self.images = [images[labels == digit] for digit in range(10)]
        if shots + query > (fewest := min(map(len, self.images))):
            raise TaskError(f"shots and query are {shots + query} examples of a digit, and there are {fewest}")

    def draw(
        self, generator: torch.Generator, classes: Int[Tensor, "classes"], examples: int
    ) -> Float[Tensor, "classes examples 1 8 8"]:
        """Random images of each digit, no image twice."""
        rows = []
        for digit in classes.tolist():
            rows.append(self.images[digit][torch.randperm(len(self.images[digit]), generator=generator)[:examples]])
        return torch.stack(rows)

    def describe(self) -> str:
        """The setting."""
        trained, evaluated = ("".join(map(str, digits.tolist())) for digits in (self.trained, self.evaluated))
        return f"{self.ways} digits, {self.shots} examples of each: of {trained} in training, of {evaluated} evaluated"


def load() -> tuple[Float[Tensor, "images 1 8 8"], Int[Tensor, "images"]]:
    """The images [1797, 1, 8, 8], in 0 … 1, and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise TaskError("the task 'digits' needs scikit-learn: install the extra metamem-torch[few-shot]") from None
    data: Any = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
