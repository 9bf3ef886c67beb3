"""Signals: the error δ at each layer of a memory network, in the direction that a write steps against.

    backprop            δ^L = ∂ objective / ∂ z^L, propagated back through the network
    predicted_targets   δ^l = z^l − v P^l: each layer has a target of its own, predicted from the written value by a
                        slow matrix P^l (Munkhdalai et al. 2019, section 3.2); no gradient goes back through the memory
    hebbian             δ = −v

All are written out: a memory's inner loop then holds plain products only, one ordinary backward gives the second-order
outer gradient, and torch.compile takes all of it. An objective without a written-out gradient goes through torch.func,
per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.config.resolve import objective_gradient
from metamem.memory.networks import Network, Pass, Weights

Tokens = Float[Tensor, "*batch tokens features"]
Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Objectives: TypeAlias = Mapping[Objective, float]
Signal = Literal["backprop", "predicted_targets", "hebbian"]


def gradient(objective: Objective) -> Objective:
    """∂ objective / ∂ pred per token: written out where it is, else by autograd (tokens do not mix, so of the sum)."""
    return objective_gradient(objective) or torch.func.grad(lambda pred, target: objective(pred, target).sum())


def value(objectives: Objectives, pred: Tokens, target: Tokens) -> Float[Tensor, "*batch tokens"]:
    """Σ weight · objective(pred, target), per token."""
    terms = [_scaled(weight, objective(pred, target)) for objective, weight in objectives.items()]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def output_error(objectives: Objectives, pred: Tokens, target: Tokens) -> Tokens:
    """Σ weight · ∂ objective / ∂ pred: the signal at the last layer."""
    errors = [_scaled(weight, gradient(objective)(pred, target)) for objective, weight in objectives.items()]
    return torch.stack(errors).sum(0) if len(errors) > 1 else errors[0]


def squared_error(objectives: Objectives) -> float | None:
    """The c of objectives whose gradient is c (pred − target), as squared errors have it; None of others."""
    pred, target = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).view(2, 1, 6)
    weight = float(sum(objectives.values()))
    same = torch.allclose(output_error(objectives, pred, target), weight * (pred - target))
    return weight if same else None


def at_layers(
    signal: Signal,
    objectives: Objectives,
    network: Network,
    forward: Pass,
    weights: Weights,
    values: Tokens,
    feedback: Weights | None,
) -> list[Float[Tensor, "*batch tokens _features"]]:
    """δ at every layer, for the values written at the keys of a forward pass; `feedback`: the matrices P^l."""
    if signal == "hebbian":
        return [-values]
    if signal == "predicted_targets":
        assert feedback is not None
        return [z - values @ matrix for z, matrix in zip(forward.preactivations, feedback, strict=True)]
    return network.backward(output_error(objectives, forward.output, values), weights, forward)


def _scaled(weight: float, x: Tensor) -> Tensor:
    return x if weight == 1 else weight * x
