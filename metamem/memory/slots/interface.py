"""The interface: one linear map from the input to all that a memory's writers and readers need, and its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from metamem.memory.slots.content import SHARPNESS, Strengths
from metamem.memory.slots.options import ReadOptions, SlotOptions

Shapes = Mapping[str, tuple[int, ...]]  # part -> its shape: (heads, word) of keys, (heads,) of numbers
Parts = dict[str, Tensor]


class Interface(nn.Linear):
    """x W + b, clipped to ± `clip`: the parts of `shapes`, one after the other."""

    def __init__(self, dim: int, shapes: Shapes, clip: float | None) -> None:
        super().__init__(dim, sum(math.prod(shape) for shape in shapes.values()))
        self.clip = clip

    def forward(self, input: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch size"]:
        """In the type of the input."""
        vectors = functional.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))
        return vectors if self.clip is None else vectors.clamp(-self.clip, self.clip)


def parts_of(vectors: Float[Tensor, "batch size"], shapes: Shapes) -> Parts:
    """Each part, in its shape."""
    parts = vectors.split([math.prod(shape) for shape in shapes.values()], -1)
    return {
        name: part if len(shape) == 1 else part.unflatten(-1, shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def strength_shapes(options: ReadOptions, heads: int) -> Shapes:
    """β of each head, where it is learned."""
    return {"strengths": (heads,)} if isinstance(options.sharpness, str) else {}


def strengths(options: ReadOptions, parts: Parts, heads: slice) -> Strengths:
    """β of some heads: learned, or the constant."""
    if isinstance(options.sharpness, str):
        return SHARPNESS[options.sharpness](parts["strengths"][:, heads])
    return float(options.sharpness)


def erase_shapes(options: SlotOptions) -> Shapes:
    """The erase vector of each write head, where writes erase."""
    return {"erase": (options.write_heads, options.word)} if options.erase else {}


def erase(parts: Parts) -> Float[Tensor, "batch heads word"] | None:
    """What each write head erases, in [0, 1]."""
    return torch.sigmoid(parts["erase"]) if "erase" in parts else None
