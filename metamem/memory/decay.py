"""`decay_add`: share · weight + step, the one operation on whole weight matrices that an inner loop repeats.

One pass forward where a product and a sum are two; backward, the step's gradient is the output's own, uncopied, and
the share's a dot product, which leaves no product of two weight matrices behind.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LARGE = 1 << 16  # elements of a matrix, below which a call for each costs more than the product of all


class _DecayAdd(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(share: Tensor, weight: Tensor, step: Tensor) -> Tensor:
        return torch.addcmul(step, share[..., None, None], weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        share, weight, _ = inputs
        ctx.save_for_backward(share, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (gradient,) = gradients
        share, weight = ctx.saved_tensors
        return _dot(gradient, weight), share[..., None, None] * gradient, gradient


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a b over each matrix. A compiled graph has its own way to sum a product that it does not keep."""
    if a.shape[-2:].numel() < LARGE or torch.compiler.is_compiling():
        return (a * b).sum((-2, -1))
    pairs = zip(a.flatten(0, -3).flatten(1), b.flatten(0, -3).flatten(1), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pairs]).unflatten(0, a.shape[:-2])


def decay_add(
    share: Float[Tensor, "batch heads"],
    weight: Float[Tensor, "batch heads d_in d_out"],
    step: Float[Tensor, "batch heads d_in d_out"],
) -> Float[Tensor, "batch heads d_in d_out"]:
    """share · weight + step."""
    return _DecayAdd.apply(share, weight, step)
