"""Signals: the error δ at each layer of a memory network, in the direction that a write steps against.

    backprop            δ^L = ∂ objective / ∂ z^L, propagated back through the network
    predicted_targets   δ^l = z^l − v P^l: each layer has a target of its own, predicted from the written value by a
                        slow matrix P^l (Munkhdalai et al. 2019, section 3.2); no gradient goes back through the memory
    hebbian             δ = −v
    a function          your own, `(network, forward, weights, values) -> δ at each layer`

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
OwnSignal: TypeAlias = Callable[[Network, Pass, Weights, Tensor], list[Tensor]]


def gradient(objective: Objective) -> Objective:
    """∂ objective / ∂ pred per token: written out where it is, else by autograd (tokens do not mix, so of the sum)."""
    return objective_gradient(objective) or torch.func.grad(lambda pred, target: objective(pred, target).sum())


def value(objectives: Objectives, pred: Tokens, target: Tokens) -> Float[Tensor, "*batch tokens"]:
    """Σ weight · objective(pred, target), per token."""
    terms = [scaled(weight, objective(pred, target)) for objective, weight in objectives.items()]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def output_error(objectives: Objectives, pred: Tokens, target: Tokens) -> Tokens:
    """Σ weight · ∂ objective / ∂ pred: the signal at the last layer."""
    errors = [scaled(weight, gradient(objective)(pred, target)) for objective, weight in objectives.items()]
    return torch.stack(errors).sum(0) if len(errors) > 1 else errors[0]


def squared_error(objectives: Objectives) -> float | None:
    """The c of objectives whose gradient is c (pred − target), as squared errors have it; None of others."""
    pred, target = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).view(2, 1, 6)
    weight = float(sum(objectives.values()))
    same = torch.allclose(output_error(objectives, pred, target), weight * (pred - target))
    return weight if same else None


def name_of(signal: Signal | OwnSignal) -> str:
    """A signal as errors name it: one of a user's own by its path."""
    return signal if isinstance(signal, str) else f"{signal.__module__}.{signal.__qualname__}"


def check_own(signal: Signal | OwnSignal, network: Network) -> None:
    """Raises ValueError where a signal of a user's own is not a δ for each layer, as wide as what the layer gives."""
    if isinstance(signal, str):
        return
    weights = [torch.zeros(1, *shape) for shape in network.shapes]
    forward = network.forward(torch.zeros(1, 3, network.dims[0]), lambda layer, a: a @ weights[layer])
    with torch.no_grad():
        made = [list(delta.shape) for delta in signal(network, forward, weights, torch.zeros(1, 3, network.dims[-1]))]
    wanted = [list(z.shape) for z in forward.preactivations]
    if made != wanted:
        raise ValueError(f"the signal {name_of(signal)} has to give a δ for each layer, {wanted}, and gives {made}")


def at_layers(
    signal: Signal | OwnSignal,
    objectives: Objectives,
    network: Network,
    forward: Pass,
    weights: Weights,
    values: Tokens,
    feedback: Weights | None,
) -> list[Float[Tensor, "*batch tokens _features"]]:
    """δ at every layer, for the values written at the keys of a forward pass; `feedback`: the matrices P^l."""
    if not isinstance(signal, str):
        return signal(network, forward, weights, values)
    if signal == "hebbian":
        return [-values]
    if signal == "predicted_targets":
        assert feedback is not None
        return [z - values @ matrix for z, matrix in zip(forward.preactivations, feedback, strict=True)]
    return network.backward(output_error(objectives, forward.output, values), weights, forward)


def scaled(weight: float, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """weight · x, without a product where it is 1."""
    return x if weight == 1 else weight * x
