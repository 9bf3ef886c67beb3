"""Signals: the error δ at each layer of a memory network, from an objective at its output.

`backprop` writes the gradient out: a memory's inner loop then holds plain products only, one ordinary backward gives
the second-order outer gradient, and torch.compile takes all of it. An objective without a written-out gradient goes
through torch.func, per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.config.resolve import objective_gradient

Tokens = Float[Tensor, "*batch tokens features"]
Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Objectives: TypeAlias = Mapping[Objective, float]


def gradient(objective: Objective) -> Objective:
    """∂ objective / ∂ pred per token: written out where it is, else by autograd (tokens do not mix, so of the sum)."""
    return objective_gradient(objective) or torch.func.grad(lambda pred, target: objective(pred, target).sum())


def value(objectives: Objectives, pred: Tokens, target: Tokens) -> Float[Tensor, "*batch tokens"]:
    """Σ weight · objective(pred, target), per token."""
    terms = [weight * objective(pred, target) for objective, weight in objectives.items()]
    return torch.stack(terms).sum(0)


def output_error(objectives: Objectives, pred: Tokens, target: Tokens) -> Tokens:
    """Σ weight · ∂ objective / ∂ pred: the signal at the last layer."""
    errors = [weight * gradient(objective)(pred, target) for objective, weight in objectives.items()]
    return torch.stack(errors).sum(0) if len(errors) > 1 else errors[0]
