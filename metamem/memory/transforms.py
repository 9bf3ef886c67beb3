"""Transforms of an accumulated matrix: what a level of period P makes of its sum of products before it applies it.

    step, state = transform.update(accumulated, state)

A pair of pure functions over the layers of a memory network, each [batch, *heads, d_in, d_out]:

- `none`     the sum itself
- `sign`     its signs
- `clip`     each matrix at a Frobenius norm of at most 1
- `rmsprop`  over the root of a running mean of squares, without bias correction
- `adam`     running mean over the root of the running mean of squares, both with bias correction
- `muon`     each matrix orthogonalised (`newton_schulz`); its momentum is the level's

All are odd, so that the sign of what is accumulated is that of the step. All but `none` and `clip` forget the scale of
what is accumulated, a rate that is common to a period included: a step's size is then the caller's to set.

State is batch first, the count of steps too, so that chosen rows can be reset in mid-stream; it is float32 at least,
since a running mean in bfloat16 stands still. An entry that was never written moves nothing and has gradient zero,
where Adam's slope would be 1 / ε and a root's infinite.

Why not torchopt's own functions, which the tests compare these with: `scale_by_adam` cannot be compiled
(`pow(float, Tensor)`) and gives NaN for the gradient at zero unless `eps_root` changes the step, and so does
`scale_by_rms`, which has none; `clip_grad_norm` takes one norm over the whole batch, off the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.gating import straight_through
from metamem.memory.newton_schulz import orthogonalize

Matrices: TypeAlias = Float[Tensor, "batch *heads d_in d_out"]
LayerState: TypeAlias = dict[str, Tensor]  # name -> tensor
TransformState: TypeAlias = dict[str, dict[str, Tensor]]  # name -> layer -> tensor


class Transform(NamedTuple):
    """`init(weights) -> state`, `update(accumulated, state) -> (step, state)`; lists hold one tensor a layer."""

    init: Callable[[list[Tensor]], TransformState]
    update: Callable[[list[Tensor], TransformState], tuple[list[Tensor], TransformState]]


def stateless(function: Callable[[Tensor], Tensor]) -> Transform:
    """`step = function(accumulated)`, layer by layer."""
    return Transform(lambda weights: {}, lambda accumulated, state: ([function(x) for x in accumulated], state))


def stateful(
    init: Callable[[Tensor], LayerState], update: Callable[[Tensor, LayerState], tuple[Tensor, LayerState]]
) -> Transform:
    """A transform from its functions for one layer, which are given, and give back, at least float32."""

    def init_layers(weights: list[Tensor]) -> TransformState:
        return _by_name([init(_wide(weight)) for weight in weights])

    def update_layers(accumulated: list[Tensor], state: TransformState) -> tuple[list[Tensor], TransformState]:
        steps, states = [], []
        for layer, x in enumerate(accumulated):
            step, after = update(_wide(x), {name: layers[str(layer)] for name, layers in state.items()})
            steps.append(step.to(x.dtype))
            states.append(after)
        return steps, _by_name(states)

    return Transform(init_layers, update_layers)


def sign(accumulated: Matrices) -> Matrices:
    """sign(G), with the gradient of G (straight-through): its own is zero, and nothing would learn to write."""
    return straight_through(torch.sign(accumulated), accumulated)


def clip(accumulated: Matrices, norm: float = 1.0) -> Matrices:
    """min(1, norm / ‖G‖_F) G, per matrix (Pascanu et al. 2013, algorithm 1)."""
    squared = _wide(accumulated).square().sum((-2, -1), keepdim=True)
    share = (norm**2 / squared.clamp(min=norm**2)).sqrt()  # clamped before the root: its gradient is finite at zero
    return accumulated * share.to(accumulated.dtype)


def rmsprop(decay: float = 0.9, epsilon: float = 1e-8) -> Transform:
    """`v ← ρ v + (1 − ρ) G²`, `step = G / (√v + ε)` (Tieleman and Hinton 2012, lecture 6e)."""

    def init(weight: Tensor) -> LayerState:
        return {"second": torch.zeros_like(weight)}

    def update(gradient: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        second = torch.lerp(gradient.square(), state["second"], decay)
        return _over_root(gradient, second, epsilon), {"second": second}

    return stateful(init, update)


def adam(first_decay: float = 0.9, second_decay: float = 0.999, epsilon: float = 1e-8) -> Transform:
    """`m ← β₁ m + (1 − β₁) G`, `v ← β₂ v + (1 − β₂) G²`, `step = m̂ / (√v̂ + ε)`, `m̂ = m / (1 − β₁ⁿ)`, v̂ alike,
    n the row's own count of steps (Kingma and Ba 2015, algorithm 1)."""

    def init(weight: Tensor) -> LayerState:
        zeros = torch.zeros_like(weight)
        return {"first": zeros, "second": zeros.clone(), "count": weight.new_zeros(weight.shape[0])}

    def update(gradient: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        first = torch.lerp(gradient, state["first"], first_decay)
        second = torch.lerp(gradient.square(), state["second"], second_decay)
        count = state["count"] + 1
        steps = count.reshape(-1, *[1] * (gradient.ndim - 1))
        step = _over_root(first / (1 - first_decay**steps), second / (1 - second_decay**steps), epsilon)
        return step, {"first": first, "second": second, "count": count}

    return stateful(init, update)


TRANSFORMS: dict[str, Transform] = {
    "none": stateless(lambda accumulated: accumulated),
    "sign": stateless(sign),
    "clip": stateless(clip),
    "rmsprop": rmsprop(),
    "adam": adam(),
    "muon": stateless(orthogonalize),
}


def _over_root(x: Tensor, second: Tensor, epsilon: float) -> Tensor:
    written = second > 0
    return torch.where(written, x / (torch.where(written, second, 1.0).sqrt() + epsilon), 0.0)


def _by_name(layers: list[LayerState]) -> TransformState:
    return {name: {str(index): layer[name] for index, layer in enumerate(layers)} for name in layers[0]}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
