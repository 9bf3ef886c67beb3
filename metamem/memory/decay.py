"""`decay_add`: share · weight + step, the one operation on whole weight matrices that an inner loop repeats.

Autograd's own rule for the product would write `gradient · weight` in full to sum it up; a dot product reads it once.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


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
        return dot(gradient, weight), share[..., None, None] * gradient, gradient


def decay_add(
    share: Float[Tensor, "batch heads"],
    weight: Float[Tensor, "batch heads d_in d_out"],
    step: Float[Tensor, "batch heads d_in d_out"],
) -> Float[Tensor, "batch heads d_in d_out"]:
    """share · weight + step."""
    return _DecayAdd.apply(share, weight, step)


def dot(
    a: Float[Tensor, "batch heads d_in d_out"], b: Float[Tensor, "batch heads d_in d_out"]
) -> Float[Tensor, "batch heads"]:
    """Σ a ⊙ b over each matrix, as a product, so that a ⊙ b is never written."""
    return (a.flatten(2).unsqueeze(2) @ b.flatten(2).unsqueeze(3)).squeeze((2, 3))
