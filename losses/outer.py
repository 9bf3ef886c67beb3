"""Outer objectives: what slow weights, and slow timescales, are trained for.

- `next_token`, `bits`   losses per token, of its symbol or of its bits
- `router_balance`, `router_z`, `update_budget`   of what routers measure, as their parameters' names say: `gates`,
  `logits` and `costs` (`metamem.routing`); each adds the mean over all routers
"""

from __future__ import annotations

import torch
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


def bits(
    pred: Float[Tensor, "*tokens features"], target: Float[Tensor, "*tokens features"]
) -> Float[Tensor, "*tokens"]:
    """−log p(target | logits) of a vector of bits, each by itself: binary cross-entropy, in nats, summed over them."""
    return functional.binary_cross_entropy_with_logits(pred, target, reduction="none").sum(-1)


def router_balance(gates: Float[Tensor, "*tokens groups levels"]) -> Float[Tensor, ""]:
    """The squared coefficient of variation of the levels' importance, their mean gates over tokens and groups: 0 where
    all levels write alike, n − 1 where only one of n does (Shazeer et al. 2017, arXiv 1701.06538, eq. 6 and 7; with
    shares f_i of the importance it is n Σ f_i² − 1, the balance loss of Switch Transformers, Fedus et al. 2021, eq. 4).

    Over all groups together: each may keep to a timescale of its own.
    """
    importance = gates.flatten(0, -2).mean(0)
    mean = importance.mean()
    return (importance - mean).square().mean() / (mean.square() + torch.finfo(gates.dtype).tiny)


def router_z(logits: Float[Tensor, "*tokens cases choices"]) -> Float[Tensor, ""]:
    """The mean squared log Σ exp of the logits: it keeps them small (ST-MoE, Zoph et al. 2022, arXiv 2202.08906,
    eq. 5)."""
    return logits.logsumexp(-1).square().mean()


def update_budget(
    gates: Float[Tensor, "*tokens groups levels"], costs: Float[Tensor, "*tokens groups levels"]
) -> Float[Tensor, ""]:
    """Σ gates · costs, mean over tokens: with each group's share of the weights as its cost, how many copies of all
    weights a token's write moves; 0 where all holds."""
    return (gates * costs).sum((-2, -1)).mean()
