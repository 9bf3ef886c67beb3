"""`solve`: (I + Λ)⁻¹ b for a strictly lower triangular Λ, all of a batch at once, by products of matrices.

torch's `solve_triangular` takes the matrices of a batch one after the other, on one thread; products are shared out.
The inverse is built from its diagonal blocks, doubling them:

    [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ C A⁻¹, B⁻¹]]

the blocks to begin with by substitution, row by row. No power of Λ is taken, which would overflow where the inverse
does not. The backward needs the same inverse, and no second solve.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

SMALLEST = 8  # rows of the blocks that substitution inverts: products of smaller ones cost more

Lower = Float[Tensor, "*batch n n"]
Rows = Float[Tensor, "*batch n _features"]


def solve(lower: Lower, *rights: Rows) -> list[Rows]:
    """(I + Λ)⁻¹ b for each b; of `lower`, Λ, what is not below the diagonal must be 0."""
    size = lower.shape[-1]
    if missing := _padded(size) - size:  # ones on the diagonal, apart from all else
        lower = functional.pad(lower, (0, missing, 0, missing))
        rights = tuple(functional.pad(right, (0, 0, 0, missing)) for right in rights)
    _, *solved = _Solve.apply(lower, *rights)
    return [x[..., :size, :] for x in solved] if missing else solved


def _padded(size: int) -> int:
    padded = SMALLEST
    while padded < size:
        padded *= 2
    return padded


class _Solve(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(lower: Tensor, *rights: Tensor) -> tuple[Tensor, ...]:
        inverse = _inverse(lower.detach())
        return inverse, *(inverse @ right for right in rights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # The inverse is an output, so that the gradient can be differentiated through it.
        inverse, *solved = ctx.saved_tensors
        of_inverse, *of_solved = gradients
        back = inverse.mT
        of_rights = [None if gradient is None else back @ gradient for gradient in of_solved]
        parts = [part @ x.mT for part, x in zip(of_rights, solved, strict=True) if part is not None]
        if of_inverse is not None:
            parts.append(back @ of_inverse @ back)
        of_lower = -functools.reduce(torch.add, parts).tril(-1) if parts else None
        return of_lower, *of_rights


# One operation for a compiled graph, which would take long to compile its steps, and gain nothing by it. The schema in
# words: the type checks of the tests hide the annotations that torch would read it from.
@torch.library.custom_op("metamem::unit_lower_inverse", mutates_args=(), schema="(Tensor lower) -> Tensor")
def _inverse(lower: Tensor) -> Tensor:
    inverse, size = torch.zeros_like(lower, memory_format=torch.contiguous_format), SMALLEST
    _diagonal(inverse, size).copy_(_substituted(_diagonal(lower, size)))
    while size < lower.shape[-1]:
        whole, corner = _diagonal(inverse, 2 * size), _diagonal(lower, 2 * size)[..., size:, :size]
        first, second = whole[..., :size, :size], whole[..., size:, size:]
        whole[..., size:, :size] = (second @ corner @ first).neg_()
        size *= 2
    return inverse


@_inverse.register_fake
def _shape(lower: Tensor) -> Tensor:
    return torch.empty_like(lower, memory_format=torch.contiguous_format)


@_inverse.register_vmap
def _vmap(info: Any, dims: tuple[int], lower: Tensor) -> tuple[Tensor, int]:
    return _inverse(lower.movedim(dims[0], 0)), 0


def _diagonal(x: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal: [*batch, blocks, size, size], a view."""
    return x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _substituted(blocks: Tensor) -> Tensor:
    """(I + Λ)⁻¹ row by row, `r_i = e_i − Σ_{j<i} Λ[i,j] r_j`, with the batch as the last axis."""
    size = blocks.shape[-1]
    blocks = blocks.movedim((-2, -1), (0, 1)).contiguous()
    rows = torch.zeros_like(blocks)
    for i in range(size):
        rows[i, i] = 1
        if i:
            rows[i, :i] = -(blocks[i, :i].unsqueeze(1) * rows[:i, :i]).sum(0)
    return rows.movedim((0, 1), (-2, -1))
