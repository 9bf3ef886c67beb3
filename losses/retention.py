"""Retention objectives: how far have a memory's fast weights gone from where they started?

`(weights, initial) -> loss per matrix`, each with its gradient with respect to `weights` written out beside it as
`<name>_gradient`. A step down it is a way to forget (Behrouz et al. 2025, Miras, arXiv 2504.13173, section on retention
gates). `initial` may be one matrix for a whole batch; zero, where what is kept small is the weights themselves.

- `l2`           to W_init by a constant share: what a forget gate does
- `elastic_net`  and by a constant amount, so that small changes vanish
- `kl`           of the distributions that the rows of softmax-normalised memories are
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

Weights = Float[Tensor, "*batch d_in d_out"]
Initial = Float[Tensor, "*#batch d_in d_out"]
Losses = Float[Tensor, "*batch"]


def l2(weights: Weights, initial: Initial) -> Losses:
    """½ ‖W − W_init‖²_F: a gradient step of rate r keeps the share 1 − r of what was written."""
    return 0.5 * (weights - initial).square().sum((-2, -1))


def l2_gradient(weights: Weights, initial: Initial) -> Weights:
    """W − W_init."""
    return weights - initial


def elastic_net(weights: Weights, initial: Initial, mix: float = 0.5, epsilon: float = 1e-6) -> Losses:
    """μ Σ |D|_ε + (1 − μ) ½ Σ D², D = W − W_init, |x|_ε = √(x² + ε) − √ε: Zou and Hastie 2005; Miras, elastic net.

    The smooth form, not the subgradient: |x|_ε is the paper's own smoothing of |x|, and the outer gradient needs its
    curvature. A gradient step of rate r settles at zero where μ r < 2 √ε, else it stays within μ r of it.
    """
    squared = (weights - initial).square()
    absolute = squared / ((squared + epsilon).sqrt() + math.sqrt(epsilon))
    return (mix * absolute + (1 - mix) * 0.5 * squared).sum((-2, -1))


def elastic_net_gradient(weights: Weights, initial: Initial, mix: float = 0.5, epsilon: float = 1e-6) -> Weights:
    """μ D / √(D² + ε) + (1 − μ) D."""
    change = weights - initial
    return change * (mix * (change.square() + epsilon).rsqrt() + (1 - mix))


def kl(weights: Weights, initial: Initial) -> Losses:
    """Σ_rows KL(p ‖ p_init), p = softmax(W) over the last axis: Miras, KL retention (Memora).

    W are the logits here, where the paper writes the update of p itself.
    """
    log_p, log_initial = torch.log_softmax(weights, -1), torch.log_softmax(initial, -1)
    return (log_p.exp() * (log_p - log_initial)).sum((-2, -1))


def kl_gradient(weights: Weights, initial: Initial) -> Weights:
    """p ⊙ (log p − log p_init − KL), KL that of the row."""
    log_p = torch.log_softmax(weights, -1)
    p, ratio = log_p.exp(), log_p - torch.log_softmax(initial, -1)
    return p * (ratio - (p * ratio).sum(-1, keepdim=True))
