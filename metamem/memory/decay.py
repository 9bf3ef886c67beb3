"""`decay_add`: share · weight + step, the one operation on whole weight matrices that an inner loop repeats.

One pass forward where a product and a sum are two; backward, the step's gradient is the output's own, uncopied.
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
        return (gradient * weight).sum((-2, -1)), share[..., None, None] * gradient, gradient


def decay_add(
    share: Float[Tensor, "batch heads"],
    weight: Float[Tensor, "batch heads d_in d_out"],
    step: Float[Tensor, "batch heads d_in d_out"],
) -> Float[Tensor, "batch heads d_in d_out"]:
    """share · weight + step."""
    return _DecayAdd.apply(share, weight, step)
