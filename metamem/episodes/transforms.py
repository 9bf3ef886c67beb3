"""Inner optimizers as pairs `init / update`: the step that a rate multiplies, `θ ← θ − rate · direction`.

Differentiable in the gradients and the parameters, elementwise, and so the same for one task as for a batch of them.
Options mean what they mean to torch.optim, whose steps these take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.episodes.level import InnerOptimizer, Parameters


class Transform(NamedTuple):
    """`init(parameters) -> state`; `update(gradients, state, parameters) -> (directions, state)`."""

    init: Callable[[Parameters], Any]
    update: Callable[[Parameters, Any, Parameters], tuple[Parameters, Any]]


class Moments(NamedTuple):
    """Running means of a gradient and its square, and the updates that made them."""

    first: Tensor | float
    second: Tensor | float
    count: int


def transform(optimizer: InnerOptimizer) -> Transform:
    """The pair of an optimizer."""
    return TRANSFORMS[optimizer.name](optimizer)


def sgd(optimizer: InnerOptimizer) -> Transform:
    """g' = g + weight_decay θ; b = momentum b + g', b = g' at first; the direction is b, or g' + momentum b (nesterov;
    Sutskever et al. 2013, as torch has it)."""
    momentum, nesterov = optimizer.momentum, optimizer.nesterov

    def update(gradients: Parameters, state: Parameters, parameters: Parameters) -> tuple[Parameters, Parameters]:
        decayed = _decayed(gradients, parameters, optimizer.weight_decay)
        if not momentum:
            return decayed, state
        after = {name: momentum * state[name] + g if name in state else g for name, g in decayed.items()}
        return {name: g + momentum * after[name] for name, g in decayed.items()} if nesterov else after, after

    return Transform(lambda parameters: {}, update)


def adam(optimizer: InnerOptimizer) -> Transform:
    """m̂ / (√v̂ + eps) of g + weight_decay θ (Kingma and Ba 2015)."""

    def update(gradients: Parameters, state: dict, parameters: Parameters) -> tuple[Parameters, dict]:
        return _moments(_decayed(gradients, parameters, optimizer.weight_decay), state, optimizer)

    return Transform(_no_moments, update)


def adamw(optimizer: InnerOptimizer) -> Transform:
    """m̂ / (√v̂ + eps) of g, + weight_decay θ (Loshchilov and Hutter 2019)."""

    def update(gradients: Parameters, state: dict, parameters: Parameters) -> tuple[Parameters, dict]:
        directions, after = _moments(gradients, state, optimizer)
        return _decayed(directions, parameters, optimizer.weight_decay), after

    return Transform(_no_moments, update)


TRANSFORMS: Mapping[str, Callable[[InnerOptimizer], Transform]] = {"sgd": sgd, "adam": adam, "adamw": adamw}


def adam_direction(
    gradient: Float[Tensor, "*shape"], before: Moments, optimizer: InnerOptimizer
) -> tuple[Float[Tensor, "*shape"], Moments]:
    """m̂ / (√v̂ + eps) of one tensor. Where v is 0 its root has no slope: the outer gradient through it is taken as 0."""
    beta1, beta2 = optimizer.betas
    count = before.count + 1
    first = beta1 * before.first + (1 - beta1) * gradient
    second = beta2 * before.second + (1 - beta2) * gradient.square()
    still = second == 0
    root = torch.where(still, 0.0, torch.where(still, 1.0, second / (1 - beta2**count)).sqrt())
    return first / (1 - beta1**count) / (root + optimizer.eps), Moments(first, second, count)


def _moments(gradients: Parameters, state: dict, optimizer: InnerOptimizer) -> tuple[Parameters, dict]:
    found = {name: adam_direction(g, state[name], optimizer) for name, g in gradients.items()}
    return {name: direction for name, (direction, _) in found.items()}, {name: m for name, (_, m) in found.items()}


def _no_moments(parameters: Parameters) -> dict[str, Moments]:
    return dict.fromkeys(parameters, Moments(0.0, 0.0, 0))


def _decayed(gradients: Parameters, parameters: Parameters, decay: float) -> Parameters:
    return {name: g + decay * parameters[name] for name, g in gradients.items()} if decay else gradients
