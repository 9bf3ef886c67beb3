"""LayerNorm and its gradient as one operation each, the gradient differentiable: what a norm costs an inner loop.

With `ẑ = (z − mean z) / σ` and `P(g) = g − mean g − ẑ mean(g ⊙ ẑ)`, a gradient g at ẑ is `P(g) / σ` at z. Its own
gradients, for u at the result:

    at g   P(u) / σ
    at z   σ⁻² [ẑ (3 a b − mean(u ⊙ g) + mean u · mean g) − a (u − mean u) − b (g − mean g)]
           a = mean(g ⊙ ẑ),  b = mean(u ⊙ ẑ)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-6

Tokens = Float[Tensor, "*batch features"]
Statistic = Float[Tensor, "*batch 1"]


class Normalised(NamedTuple):
    """ẑ, mean z and 1 / σ. Through the last two no gradient flows but in a compiled graph: `normalise_backward` has
    what is missing."""

    unit: Tokens
    mean: Statistic
    scale: Statistic


def normalise(z: Tokens) -> Normalised:
    """(z − mean z) / σ over the last axis, σ² = variance + ε."""
    if torch.compiler.is_compiling():  # it fuses them, forward and backward
        return _plain(z)
    unit, mean, scale = torch.native_layer_norm(z, z.shape[-1:], None, None, EPSILON)
    return Normalised(unit, mean.detach(), scale.detach())


def normalise_backward(gradient: Tokens, z: Tokens, normalised: Normalised) -> Tokens:
    """P(gradient) / σ: the gradient at z of what has `gradient` at ẑ."""
    if torch.compiler.is_compiling():
        unit, _, scale = normalised
        along = (gradient * unit).mean(-1, keepdim=True)
        return (gradient - gradient.mean(-1, keepdim=True) - unit * along) * scale
    return _NormaliseBackward.apply(gradient, z, normalised.unit.detach(), normalised.mean, normalised.scale)


def _plain(z: Tokens) -> Normalised:
    mean = z.mean(-1, keepdim=True)
    centred = z - mean
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPSILON)
    return Normalised(centred * scale, mean, scale)


def _project(gradient: Tensor, z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    # It reads its arguments as if they were contiguous, without asking.
    gradient, z, mean, scale = (x.contiguous() for x in (gradient, z, mean, scale))
    of_input = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(gradient, z, z.shape[-1:], mean, scale, None, None, of_input)[0]


class _NormaliseBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, z: Tensor, unit: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        return _project(gradient, z, mean, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (u,) = upstream
        g, z, unit, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates this too: from z again, by operations that remember it
            unit, mean, scale = _plain(z)
        a, b = (g * unit).mean(-1, keepdim=True), (u * unit).mean(-1, keepdim=True)
        mean_u, mean_g = u.mean(-1, keepdim=True), g.mean(-1, keepdim=True)
        along = 3 * a * b - (u * g).mean(-1, keepdim=True) + mean_u * mean_g
        at_z = unit * along - a * (u - mean_u) - b * (g - mean_g)
        return normalise_backward(u, z, Normalised(unit, mean, scale)), scale.square() * at_z, None, None, None
