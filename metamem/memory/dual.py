"""The dual form: how a segment's writes stand in the weights that its tokens read, without building those weights.

Inside a segment that starts at `Δ_0, S_0` (DESIGN section 2)

    Δ_t = ρ_t Δ_0 + c_t S_0 − Σ_{s≤t} A[t,s] in_s ⊗ δ_s
    D_α[t,s] = Π_{s<i≤t} α_i (lower triangular),   D_β likewise,   A = (D_α D_β) diag(η)
    ρ_t = Π_{i≤t} α_i,   c_t = Σ_j D_α[t,j] Π_{i≤j} β_i

so a read at t of the input a_t is `ρ_t a_t Δ_0 + c_t a_t S_0 − Σ_s A[t,s] (a_t · in_s) δ_s`: products of matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from metamem.memory.product import product, product_transposed, transposed_product

Gate = Float[Tensor, "*batch tokens"]
Matrix = Float[Tensor, "*batch tokens tokens"]


class Kernel(NamedTuple):
    """How a level's writes and its carried tensors stand in Δ_t, for every t of a segment.

    - `writes`         D_α D_β: the share of the write of s in Δ_t
    - `keep`           ρ: the share of Δ_0 in Δ_t; None where nothing is forgotten
    - `carry`          c: the share of S_0 in Δ_t; None without momentum
    - `last_writes`    D_β[last]: the share of the write of s in the S after the segment; None without momentum
    - `last_carry`     Π β: the share of S_0 in that S; None without momentum
    """

    writes: Matrix
    keep: Gate | None
    carry: Gate | None
    last_writes: Gate | None
    last_carry: Float[Tensor, "*batch"] | None


def decay_matrix(log_decay: Gate) -> Matrix:
    """`D[t,s] = Π_{s<i≤t} decay_i` for s ≤ t, else 0; masked before the exponential, which would overflow above."""
    total = log_decay.cumsum(-1)
    difference = total.unsqueeze(-1) - total.unsqueeze(-2)
    return difference.masked_fill(~causal_mask(log_decay), -torch.inf).exp()


def causal_mask(like: Gate) -> Bool[Tensor, "tokens tokens"]:
    """True where s ≤ t."""
    tokens = like.shape[-1]
    return torch.ones(tokens, tokens, dtype=torch.bool, device=like.device).tril()


def kernel(log_keep: Gate | None, log_momentum: Gate | None, like: Gate) -> Kernel:
    """The kernel of a level of period 1 over a segment; `like` gives shape and type where both gates are None."""
    keep = None if log_keep is None else log_keep.cumsum(-1).exp()
    fading = causal_mask(like).to(like.dtype).expand(*like.shape, -1) if log_keep is None else decay_matrix(log_keep)
    if log_momentum is None:
        return Kernel(fading, keep, None, None, None)
    momentum = decay_matrix(log_momentum)
    remaining = log_momentum.cumsum(-1).exp()
    carry = (fading @ remaining.unsqueeze(-1)).squeeze(-1)
    return Kernel(fading @ momentum, keep, carry, momentum[..., -1, :], remaining[..., -1])


def before(after: Float[Tensor, "*batch tokens any"], first: float) -> Float[Tensor, "*batch tokens any"]:
    """The rows one token earlier: what held before the write of t; `first` before the segment's first token."""
    return functional.pad(after[..., :-1, :], (0, 0, 1, 0), value=first)


def gate_before(after: Gate, first: float) -> Gate:
    """`before` for a gate."""
    return functional.pad(after[..., :-1], (1, 0), value=first)


def has_bias(weight: Float[Tensor, "*_batch _rows d_out"], x: Float[Tensor, "*batch tokens d_in"]) -> bool:
    """Whether W has a row more than x has features: the bias, which a 1 beside x would multiply."""
    return weight.shape[-2] > x.shape[-1]


def affine(x: Float[Tensor, "*batch tokens d_in"], weight: Float[Tensor, "*_batch _rows d_out"]) -> Tensor:
    """`x W`, or `[x, 1] W` where W has a bias that x lacks the 1 of."""
    if has_bias(weight, x):
        return product(x, weight[..., :-1, :]) + weight[..., -1:, :]
    return product(x, weight)


def local_read(
    strength: Float[Tensor, "*batch reads writes"],
    read: Float[Tensor, "*batch reads d_in"],
    written: Float[Tensor, "*batch writes d_in"],
    signal: Float[Tensor, "*batch writes d_out"],
    bias: bool = False,
) -> Float[Tensor, "*batch reads d_out"]:
    """`Σ_s A[t,s] (a_t · in_s) δ_s`: the segment's own writes, read back. With a bias both have a 1 beside them."""
    alike = product_transposed(read, written)
    return (strength * (alike + 1 if bias else alike)) @ signal


def outer_sum(
    weight: Float[Tensor, "*batch writes"],
    written: Float[Tensor, "*batch writes d_in"],
    signal: Float[Tensor, "*batch writes d_out"],
    bias: bool = False,
) -> Float[Tensor, "*batch rows d_out"]:
    """`Σ_s weight_s in_s ⊗ δ_s`; with a bias a last row more, `Σ_s weight_s δ_s`."""
    if bias:
        signal = signal * weight.unsqueeze(-1)
        return torch.cat([transposed_product(written, signal), signal.sum(-2, keepdim=True)], -2)
    if written.shape[-1] < signal.shape[-1]:
        return transposed_product(written * weight.unsqueeze(-1), signal)
    return transposed_product(written, signal * weight.unsqueeze(-1))
