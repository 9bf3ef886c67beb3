"""Activations of memory networks: φ, and what a signal makes of φ' on its way back, error ⊙ φ'(z).

The second is torch's own backward of each, one operation, and differentiable: the inner loop's gradient is written
out, and the outer one goes through it with φ''.

    silu   φ' = s (1 + z (1 − s)),   φ'' = s (1 − s) (2 + z (1 − 2 s)),   s = σ(z)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten


class Activation(NamedTuple):
    """φ(z), and `(error, z) -> error ⊙ φ'(z)`."""

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


class _SiLUBackward(torch.autograd.Function):
    """torch's has no derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(error: Tensor, z: Tensor) -> Tensor:
        return aten.silu_backward(error, z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        error, z = ctx.saved_tensors
        gate = torch.sigmoid(z)
        curvature = (gate - gate.square()) * torch.addcmul(2 + z, z, gate, value=-2)
        return _silu_backward(gradient, z), gradient * error * curvature


def _silu_backward(error: Tensor, z: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # it fuses them
        gate = torch.sigmoid(z)
        return error * gate * (1 + z * (1 - gate))
    return _SiLUBackward.apply(error, z)


ACTIVATIONS = {
    "silu": Activation(functional.silu, _silu_backward),
    "gelu": Activation(functional.gelu, lambda error, z: aten.gelu_backward(error, z)),
    "tanh": Activation(torch.tanh, lambda error, z: aten.tanh_backward(error, torch.tanh(z))),
    "relu": Activation(functional.relu, lambda error, z: aten.threshold_backward(error, z, 0)),
}
