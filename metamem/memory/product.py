"""`product`: batched matrix product, through oneDNN where torch's own takes the slower of two libraries.

MKL, which serves float32 `bmm`, keeps to 256-bit units on processors that are not Intel's; oneDNN, which also ships
with torch, does not. Where the processor computes 512 bits at once (AMD since Zen 5) that is twice the speed for
matrices the size of an inner network's weights. On Zen 4, which computes them in halves, both run alike and a batch's
results, copied into one tensor, cost what is left: there, elsewhere, for other types, and for small matrices, this is
`a @ b`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

WORTH = 1 << 24  # operations of one matrix product, below which a call costs more than it saves
FULL_WIDTH = 26  # AMD's family Zen 5, the first with units of 512 bits


def product(a: Float[Tensor, "*a n k"], b: Float[Tensor, "*b k m"]) -> Float[Tensor, "*c n m"]:
    """a @ b, differentiable any number of times."""
    if not (_AVAILABLE and _worthwhile(a, b)):
        return a @ b
    return _onednn(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])


def product_transposed(a: Float[Tensor, "*a n k"], b: Float[Tensor, "*b m k"]) -> Float[Tensor, "*c n m"]:
    """a bᵀ. The gradient of b comes in b's own layout: as that of `b.mT` it would be transposed, and adding it to the
    others of b as slow as a product."""
    if a.shape[:-2] != b.shape[:-2]:
        return product(a, b.mT)
    return _TransposedSecond.apply(a, b)


def transposed_product(a: Float[Tensor, "*a k n"], b: Float[Tensor, "*b k m"]) -> Float[Tensor, "*c n m"]:
    """aᵀ b, with the gradient of a in a's own layout."""
    return _TransposedFirst.apply(a, b)


class _OfTwo(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class _TransposedSecond(_OfTwo):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return product(a, b.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        a, b = ctx.saved_tensors
        return product(gradient, b), product(gradient.mT, a)


class _TransposedFirst(_OfTwo):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return product(a.mT, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        a, b = ctx.saved_tensors
        return product(b, gradient.mT), product(a, gradient)


class Projection(nn.Linear):
    """x W without a bias, by `product`."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, bias=False)

    def forward(self, input: Float[Tensor, "batch tokens dim_in"]) -> Float[Tensor, "batch tokens dim_out"]:
        """x W."""
        return product(input.flatten(0, 1).unsqueeze(0), self.weight.mT.unsqueeze(0)).reshape(*input.shape[:-1], -1)


def _worthwhile(a: Tensor, b: Tensor) -> bool:
    plain = a.device.type == b.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    batched = a.ndim == b.ndim > 2 and a.shape[:-2] == b.shape[:-2]
    return plain and batched and 2 * a.shape[-2] * a.shape[-1] * b.shape[-1] >= WORTH


def _faster() -> bool:
    """Whether oneDNN is there and the faster of the two: by the processor's make and family, and by no timing, so that
    two processes on one machine compute the same bits."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    information = Path("/proc/cpuinfo")
    return information.is_file() and _full_width_amd(information.read_text())


def _full_width_amd(information: str) -> bool:
    """Whether /proc/cpuinfo describes an AMD processor with units of 512 bits."""
    family = re.search(r"^cpu family\s*:\s*(\d+)", information, re.MULTILINE)
    return "AuthenticAMD" in information and family is not None and int(family[1]) >= FULL_WIDTH


# The schema in words: the type checks of the tests hide the annotations that torch would read it from.
@torch.library.custom_op("metamem::batched_product", mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor")
def _onednn(a: Tensor, b: Tensor) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    if a.shape[0] == 1:
        return linear(a[0], b[0].mT, None, "none", [], "").unsqueeze(0)
    return torch.stack([linear(x, y.mT, None, "none", [], "") for x, y in zip(a.unbind(), b.unbind(), strict=True)])


@_onednn.register_fake
def _shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


@_onednn.register_vmap
def _vmap(info: Any, dims: tuple[int | None, ...], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    moved = [x if dim is None else x.movedim(dim, 0) for x, dim in zip((a, b), dims, strict=True)]
    return moved[0] @ moved[1], 0


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return product(gradient, b.mT) if wanted[0] else None, product(a.mT, gradient) if wanted[1] else None


_onednn.register_autograd(_backward, setup_context=_save)
_AVAILABLE = _faster()
