"""Recall objectives of an inner loop: how far is what a memory recalls (`pred`) from what it should (`target`)?

Each has its gradient with respect to `pred` written out beside it as `<name>_gradient`, per token: the error
signal at a memory network's last layer.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Predictions = Float[Tensor, "*tokens dim"]
Losses = Float[Tensor, "*tokens"]


def mse(pred: Predictions, target: Predictions) -> Losses:
    """½ Σ (pred − target)²: with the ½ and the sum over features, its gradient step is the delta rule."""
    return 0.5 * (pred - target).square().sum(-1)


def mse_gradient(pred: Predictions, target: Predictions) -> Predictions:
    """pred − target."""
    return pred - target


def cosine(pred: Predictions, target: Predictions, epsilon: float = 1e-6) -> Losses:
    """1 − cos(pred, target), with norms √(Σx² + ε) so that its gradient is finite at zero."""
    return 1 - (_direction(pred, epsilon) * _direction(target, epsilon)).sum(-1)


def cosine_gradient(pred: Predictions, target: Predictions, epsilon: float = 1e-6) -> Predictions:
    """−(t̂ − (p̂·t̂) p̂) / ‖pred‖, hats for directions."""
    direction, wanted = _direction(pred, epsilon), _direction(target, epsilon)
    agreement = (direction * wanted).sum(-1, keepdim=True)
    return (agreement * direction - wanted) / _norm(pred, epsilon)


def _norm(x: Predictions, epsilon: float) -> Float[Tensor, "*tokens 1"]:
    return torch.sqrt(x.square().sum(-1, keepdim=True) + epsilon)


def _direction(x: Predictions, epsilon: float) -> Predictions:
    return x / _norm(x, epsilon)
