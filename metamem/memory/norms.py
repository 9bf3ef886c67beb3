"""Norms of one factor a vector, `x · scale(x)`, with their gradient in a few operations instead of a dozen (eager; a
compiled graph fuses those anyway).

    unit   scale = 1 / max(‖x‖, floor)            rms   scale = 1 / √(mean x² + ε)

With y the result and g its gradient, the gradient at x is `scale (g − y Σ(g ⊙ y))` for `unit` (`scale g` below the
floor), and the same with the mean in the place of the sum for `rms`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Features = Float[Tensor, "*batch features"]

FLOOR = 1e-3


def unit(x: Features) -> Features:
    """x / max(‖x‖, 1e-3): of unit length, with a gradient that stays bounded where x is zero."""
    return _Unit.plain(x) if torch.compiler.is_compiling() else _Unit.apply(x)


def rms(x: Features) -> Features:
    """x / √(mean x² + ε), ε the type's own."""
    return _RMS.plain(x) if torch.compiler.is_compiling() else _RMS.apply(x)


class _Norm(torch.autograd.Function):
    generate_vmap_rule = True

    @classmethod
    def differentiated(cls, x: Tensor, gradient: Tensor) -> Tensor:
        """The same gradient by operations that remember x, for whoever differentiates it again."""
        with torch.enable_grad():
            return torch.autograd.grad(cls.plain(x), x, gradient, create_graph=True)[0]

    @staticmethod
    def plain(x: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class _Unit(_Norm):
    @staticmethod
    def plain(x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1, eps=FLOOR)

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _Unit.plain(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled():
            return _Unit.differentiated(x, gradient)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.clamp(min=FLOOR).reciprocal()
        along = (gradient * x).sum(-1, keepdim=True) * scale.square() * (length > FLOOR)
        return torch.addcmul(gradient, x, along, value=-1).mul_(scale)


class _RMS(_Norm):
    @staticmethod
    def plain(x: Tensor) -> Tensor:
        return x * _scale(x)

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _RMS.plain(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled():
            return _RMS.differentiated(x, gradient)
        scale = _scale(x)
        along = (gradient * x).mean(-1, keepdim=True) * scale.square()
        return torch.addcmul(gradient, x, along, value=-1).mul_(scale)


def _scale(x: Tensor) -> Tensor:
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return torch.rsqrt(mean + torch.finfo(x.dtype).eps)
