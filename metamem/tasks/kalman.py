"""The Kalman filter of a linear regression whose weights drift: the least squared error that any learner can expect.

For one output row, with weights w that are an AR(1) walk of stationary variance 1,

    w_t = a w_{t−1} + √(1 − a²) ξ_t,   ξ_t ~ N(0, I)      y_t = x_t · w_t + σ ε_t,   ε_t ~ N(0, 1)

the posterior of w_t given all before it is N(m_t, P_t), from m_1 = 0, P_1 = I by

    K_t = P_t x_t / (x_t · P_t x_t + σ²)
    m_{t+1} = a (m_t + K_t (y_t − x_t · m_t))
    P_{t+1} = a² (P_t − K_t (P_t x_t)ᵀ) + (1 − a²) I      (Kalman 1960; Haykin, Adaptive Filter Theory, chapter 14)

and x_t · m_t is the best prediction of y_t. Where a row's weights are drawn anew before t, and the filter knows when,
m_t = 0 and P_t = I.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Filtered(NamedTuple):
    """What the filter predicts of y_t from x_t and all before it, and how far off it expects to be: E (x_t · w_t −
    prediction)²."""

    predictions: Float[Tensor, "batch time rows"]
    variances: Float[Tensor, "batch time rows"]


def kalman_filter(
    x: Float[Tensor, "batch time features"],
    y: Float[Tensor, "batch time rows"],
    decay: Float[Tensor, "rows"],
    noise: float,
    redrawn: Bool[Tensor, "batch time rows"] | None = None,
) -> Filtered:
    """The exact filter of every row, in float64. `decay`: a of each row; `redrawn`: where its weights are drawn anew
    before t, as the filter knows."""
    x, y, decay = x.double(), y.double(), decay.double()
    batch, time, features = x.shape
    rows = len(decay)
    # P and, below it, m: both are multiplied by x, and both move along P x.
    prior = torch.eye(features + 1, features, dtype=x.dtype, device=x.device)
    moments = prior.expand(batch, rows, -1, -1)
    shrink = torch.cat([decay.square().expand(features, -1), decay.expand(1, -1)]).T.unsqueeze(-1)
    grow = (1 - decay.square())[:, None, None] * prior
    predictions, variances = (x.new_empty(time, batch, rows) for _ in range(2))
    for t in range(time):
        if redrawn is not None and redrawn[:, t].any():
            moments = torch.where(redrawn[:, t, :, None, None], prior, moments)
        input = x[:, t, None, :]
        along = torch.matmul(moments, input.unsqueeze(-1)).squeeze(-1)
        predictions[t], spread = along[..., -1], along[..., :-1]
        torch.sum(spread * input, -1, out=variances[t])
        along[..., -1] -= y[:, t]
        gain = spread / (variances[t] + noise**2).unsqueeze(-1)
        moments = torch.addcmul(moments, along.unsqueeze(-1), gain.unsqueeze(-2), value=-1)
        moments = torch.addcmul(grow, shrink, moments)
    return Filtered(predictions.transpose(0, 1), variances.transpose(0, 1))
