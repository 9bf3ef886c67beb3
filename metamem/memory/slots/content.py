"""Content addressing: how much each slot is like a key (Graves et al. 2014, arXiv 1410.5401, section 3.3.1).

    d_i = k · m_i / (‖k‖ ‖m_i‖ + ε),   w_i = softmax_i(β d_i),   ‖x‖ = √(Σ x² + ε)

with ε = 1e-6 as DeepMind's released DNC has it. The sharpness β ≥ 0 is learned per token and head or fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

Sharpness = Literal["softplus", "oneplus"]
Slots = Float[Tensor, "batch slots word"]
Keys = Float[Tensor, "batch heads word"]
Weights = Float[Tensor, "batch heads slots"]
Strengths = Float[Tensor, "batch heads"] | float  # β, learned or fixed

EPSILON = 1e-6


def oneplus(x: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """1 + log(1 + eˣ) (Graves et al. 2016, Methods)."""
    return 1 + functional.softplus(x)


SHARPNESS: dict[Sharpness, Callable[[Tensor], Tensor]] = {"softplus": functional.softplus, "oneplus": oneplus}


def norm(x: Float[Tensor, "*batch word"]) -> Float[Tensor, "*batch"]:
    """√(Σ x² + ε): a length with a gradient at zero."""
    return torch.sqrt(x.square().sum(-1) + EPSILON)


def similarity(memory: Slots, keys: Keys) -> Weights:
    """The cosine of every key with every slot."""
    lengths = norm(keys).unsqueeze(-1) * norm(memory).unsqueeze(-2)
    return torch.bmm(keys, memory.mT) / (lengths + EPSILON)


def similarity_of(rows: Float[Tensor, "batch heads k word"], keys: Keys) -> Float[Tensor, "batch heads k"]:
    """The cosine of every key with rows of its own."""
    lengths = norm(keys).unsqueeze(-1) * norm(rows)
    return (rows @ keys.unsqueeze(-1)).squeeze(-1) / (lengths + EPSILON)


def scores_of(alike: Float[Tensor, "batch heads _slots"], strengths: Strengths) -> Float[Tensor, "batch heads _slots"]:
    """β d of each head."""
    return alike * (strengths.unsqueeze(-1) if isinstance(strengths, Tensor) else strengths)


def content_weights(memory: Slots, keys: Keys, strengths: Strengths, top_k: int | None = None) -> Weights:
    """softmax(β d) over all slots, or over the `top_k` most similar alone."""
    alike = similarity(memory, keys)
    scores = scores_of(alike, strengths)
    if top_k is not None:
        scores = scores.masked_fill(~largest(alike.detach(), top_k), -torch.inf)
    return torch.softmax(scores, -1)


def largest(scores: Float[Tensor, "*batch slots"], k: int) -> Bool[Tensor, "*batch slots"]:
    """Where the k largest of the last axis are, of equal ones those of the lowest number."""
    least = scores.topk(k).values[..., -1:]
    above, level = scores > least, scores == least
    return above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
