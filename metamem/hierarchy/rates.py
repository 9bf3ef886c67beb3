"""Learned rates of an inner level: a vector of slow weights, of which each tensor that the level moves takes its part.

`optimizer.lr: learned`, and `lr_per`

    level     one rate
    group     one for each group of the level; a tensor is in the first that names it
    tensor    one for each parameter tensor
    row       one for each entry of a tensor's first axis: each output of a linear layer
    element   one for each number (Meta-SGD, Li et al. 2017, arXiv 1707.09835)

`lr_sign: positive` keeps logarithms, and a rate never reaches zero; `any` keeps the rates, which may cross it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

RatesPer: TypeAlias = Literal["level", "group", "tensor", "row", "element"]


@dataclass(frozen=True)
class LearnedRates:
    """What each tensor takes of the vector, and in which shape it broadcasts against the tensor."""

    parts: tuple[slice, ...]
    shapes: tuple[tuple[int, ...], ...]
    size: int
    initial: float
    positive: bool

    def fresh(self) -> Float[Tensor, "size"]:
        """The vector before it learned: every rate `initial`."""
        start = torch.full((self.size,), self.initial)
        return start.log() if self.positive else start

    def of_each(self, vector: Float[Tensor, "size"]) -> list[Tensor]:
        """The rates of each tensor."""
        rates = vector.exp() if self.positive else vector
        return [rates[part].reshape(shape) for part, shape in zip(self.parts, self.shapes, strict=True)]


def learned_rates_over(
    per: RatesPer, tensors: Sequence[Tensor], groups: Sequence[int], initial: float, positive: bool
) -> LearnedRates:
    """The rates over tensors, of which `groups` says in which group each is."""
    if per in ("row", "element"):
        shapes = [t.shape if per == "element" else (*t.shape[:1], *(1 for _ in t.shape[1:])) for t in tensors]
        bounds = [0, *accumulate(math.prod(shape) for shape in shapes)]
        parts = [slice(start, stop) for start, stop in pairwise(bounds)]
        return LearnedRates(tuple(parts), tuple(map(tuple, shapes)), bounds[-1], initial, positive)
    owner = {"level": [0] * len(tensors), "group": list(groups), "tensor": list(range(len(tensors)))}[per]
    parts = [slice(index, index + 1) for index in owner]
    return LearnedRates(tuple(parts), ((),) * len(tensors), max(owner) + 1, initial, positive)
