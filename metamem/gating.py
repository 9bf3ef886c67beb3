"""Gating functions: how logits over choices become the gates that a router or a mixture multiplies by.

    dense    m = softmax(z)                    the k-th choice of the last axis is gated by m_k
    topk     m = softmax(z) where among its k largest, else 0; backward as dense
    binary   m = 1 where z ≥ 0, else 0; backward as m = z

Top-k weights are not renormalised: of one choice they would be 1, a constant, and the logits without a gradient (Fedus
et al. 2021, Switch Transformers, eq. 2). A gate that is closed has a gradient nevertheless, that of the open one in its
place: straight through (Bengio et al. 2013), so that it can open. `binary` is sparse-MAML's (von Oswald et al. 2021,
eq. 4), open at zero.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Logits = Float[Tensor, "*tokens choices"]


def straight_through(value: Float[Tensor, "*shape"], surrogate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`value`, to the last bit, with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def dense(logits: Logits) -> Logits:
    """softmax."""
    return logits.softmax(-1)


def top_k(logits: Logits, k: int) -> Logits:
    """The k largest of the softmax, of equal ones the first, and zero elsewhere; straight through to the softmax."""
    weights = logits.softmax(-1)
    largest = weights.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return straight_through(weights * torch.zeros_like(weights).scatter(-1, largest, 1.0), weights)


def binary(logits: Logits) -> Logits:
    """1 where a logit is at least 0, else 0; straight through to the logit."""
    return straight_through((logits >= 0).to(logits.dtype), logits)


def entropy(logits: Logits) -> Float[Tensor, "*tokens"]:
    """−Σ p log p of p = softmax, in nats."""
    log = logits.log_softmax(-1)
    return -(log.exp() * log).sum(-1)
