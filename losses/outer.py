"""Outer objectives: what slow weights, and slow timescales, are trained for."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def next_token(pred: Float[Tensor, "*tokens vocabulary"], target: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """−log p(target | logits), in nats per token (divide by ln 2 for bits)."""
    flat = functional.cross_entropy(
        rearrange(pred, "... vocabulary -> (...) vocabulary"), target.reshape(-1), reduction="none"
    )
    return flat.reshape(target.shape)
