"""Orthogonalisation of a matrix by Newton–Schulz iteration: what Muon makes of an accumulated update.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Matrix products only, so that it
batches, compiles, and can be differentiated any number of times.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Muon's coefficients: the slope at zero is as large as it can be while singular values stay near 1.
A, B, C = 3.4445, -4.7750, 2.0315
FLOOR = 1e-12  # a Frobenius norm below which nothing was written
WIDE = 2  # how many times wider than tall a matrix is where its Gram matrix is iterated instead


def orthogonalize(matrix: Float[Tensor, "*batch d_in d_out"], steps: int = 5) -> Float[Tensor, "*batch d_in d_out"]:
    """Near U Vᵀ of `matrix = U Σ Vᵀ`: the same singular vectors, singular values between 0.65 and 1.25.

        X ← X / ‖X‖_F,  then `steps` times  X ← a X + (b A + c A²) X,  A = X Xᵀ

    on the shorter side, in float32 or float64 also under autocast. Singular values below about 1e-3 of the norm stay
    small: five steps raise them by a⁵ = 485. A matrix of norm below 1e-12 gives zero, with gradient zero: what was
    never written has no direction.

    Raises ValueError where `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"Newton–Schulz steps must be at least 1, not {steps}")
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    x = x.reshape(math.prod(matrix.shape[:-2]), *matrix.shape[-2:])
    if tall:
        x = x.mT
    with torch.autocast(matrix.device.type, enabled=False):
        iterate = _gram_iteration if x.shape[-1] >= WIDE * x.shape[-2] else _iteration
        x = iterate(_normalized(x), steps)
    if tall:
        x = x.mT
    return x.reshape(matrix.shape).to(matrix.dtype)


def _normalized(x: Tensor) -> Tensor:
    squared = x.square().sum((-2, -1), keepdim=True)
    return x * torch.where(squared > FLOOR**2, squared.clamp(min=FLOOR**2).rsqrt(), 0.0)


def _iteration(x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


def _gram_iteration(x: Tensor, steps: int) -> Tensor:
    """The same, X_k = Q_k X: only small square matrices in the loop, since P = a I + b A + c A² commutes with A and
    the next Gram matrix is P A P."""
    gram = x @ x.mT
    identity = A * torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    left = factor = identity + torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = identity + torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        left = factor @ left
    return left @ x
