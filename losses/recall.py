"""Recall objectives of an inner loop: how far is what a memory recalls (`pred`) from what it should (`target`)?

Each has its gradient with respect to `pred` written out beside it as `<name>_gradient`, per token: the error
signal at a memory network's last layer. It is finite everywhere, and so is its own gradient, which the outer loop
takes.

- `mse`          the delta rule; TTT, Titans
- `lp`           large errors count for more (p = 3: Moneta)
- `huber`        large errors count for less (Yaad)
- `l1`           the sign of an error only
- `cosine`       directions only
- `dot_product`  no error at all: linear attention, LaCT

A config names one without arguments. For another p or δ write two functions of your own beside each other, such as
`def l4(pred, target): return lp(pred, target, p=4.0)` and `l4_gradient`, and name theirs.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

Predictions = Float[Tensor, "*tokens dim"]
Losses = Float[Tensor, "*tokens"]
Delta = float | Float[Tensor, "*#tokens 1"]


def mse(pred: Predictions, target: Predictions) -> Losses:
    """½ Σ (pred − target)²: with the ½ and the sum over features, its gradient step is the delta rule."""
    return 0.5 * (pred - target).square().sum(-1)


def mse_gradient(pred: Predictions, target: Predictions) -> Predictions:
    """pred − target."""
    return pred - target


def lp(pred: Predictions, target: Predictions, p: float = 3.0) -> Losses:
    """(1/p) Σ |pred − target|^p, p ≥ 2, 3 in Moneta (Behrouz et al. 2025, Miras, arXiv 2504.13173, ℓ_p).

    With 1/p, so that p = 2 is `mse` and the rate means the same; the paper's gradient has the factor p. Raises
    ValueError for p below 2, whose gradient has no finite slope at zero: that is what `l1` and `huber` are for.
    """
    return (pred - target).abs().pow(_power(p)).sum(-1) / p


def lp_gradient(pred: Predictions, target: Predictions, p: float = 3.0) -> Predictions:
    """sign(e) |e|^{p−1}, e = pred − target."""
    error = pred - target
    return error if _power(p) == 2 else error.sign() * error.abs().pow(p - 1)


def l1(pred: Predictions, target: Predictions, epsilon: float = 1e-6) -> Losses:
    """Σ √(e² + ε) − √ε, e = pred − target: |e| as Behrouz et al. 2025 (Miras, value-less memory) smooth it, zero at
    zero."""
    squared = (pred - target).square()
    return (squared / ((squared + epsilon).sqrt() + math.sqrt(epsilon))).sum(-1)


def l1_gradient(pred: Predictions, target: Predictions, epsilon: float = 1e-6) -> Predictions:
    """e / √(e² + ε), a smooth sign(e)."""
    error = pred - target
    return error * (error.square() + epsilon).rsqrt()


def huber(pred: Predictions, target: Predictions, delta: Delta = 1.0) -> Losses:
    """Σ ½ e² where |e| ≤ δ, else δ (|e| − ½ δ), e = pred − target: Huber 1964; coordinate-wise as in Miras.

    δ may be a tensor, one per token, for a δ that depends on the data (Yaad).
    """
    bounded = huber_gradient(pred, target, delta)
    return (bounded * (pred - target - 0.5 * bounded)).sum(-1)


def huber_gradient(pred: Predictions, target: Predictions, delta: Delta = 1.0) -> Predictions:
    """e clipped to [−δ, δ]."""
    error = pred - target
    return (
        torch.maximum(torch.minimum(error, delta), -delta) if isinstance(delta, Tensor) else error.clamp(-delta, delta)
    )


def dot_product(pred: Predictions, target: Predictions) -> Losses:
    """−⟨pred, target⟩: linear attention (Katharopoulos et al. 2020) as a gradient step, LaCT (Zhang et al. 2025, arXiv
    2505.23884). Unbounded below: forgetting, weight normalisation or Muon holds it."""
    return -(pred * target).sum(-1)


def dot_product_gradient(pred: Predictions, target: Predictions) -> Predictions:
    """−target."""
    return -target


def cosine(pred: Predictions, target: Predictions, epsilon: float = 1e-6) -> Losses:
    """1 − cos(pred, target), with norms √(Σx² + ε) so that its gradient is finite at zero."""
    return 1 - (_direction(pred, epsilon) * _direction(target, epsilon)).sum(-1)


def cosine_gradient(pred: Predictions, target: Predictions, epsilon: float = 1e-6) -> Predictions:
    """−(t̂ − (p̂·t̂) p̂) / ‖pred‖, hats for directions."""
    direction, wanted = _direction(pred, epsilon), _direction(target, epsilon)
    agreement = (direction * wanted).sum(-1, keepdim=True)
    return (agreement * direction - wanted) / _norm(pred, epsilon)


def _power(p: float) -> float:
    if p < 2:
        raise ValueError(f"lp needs p of at least 2, not {p}; below it use l1 or huber")
    return p


def _norm(x: Predictions, epsilon: float) -> Float[Tensor, "*tokens 1"]:
    return torch.sqrt(x.square().sum(-1, keepdim=True) + epsilon)


def _direction(x: Predictions, epsilon: float) -> Predictions:
    return x / _norm(x, epsilon)
