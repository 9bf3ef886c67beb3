"""Components of a fast weight: one per level, since a fast weight is a sum over timescales.

    W_t = keep_t W_init + Σ_levels Δ^level_t

The weights of now, a component's move over a segment (period 1), its sum within a period and its move at the
boundary (period P).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory.dual import outer_sum
from metamem.memory.level import TokenLevel
from metamem.memory.networks import Weights
from metamem.memory.plan import Step, delta_key, initial_key, term_keys
from metamem.memory.schedule import Rows
from metamem.state import align


class LevelState(TypedDict, total=False):
    """A component as a state; layers by number, each [batch, heads, d_in, d_out]."""

    delta: dict[str, Tensor]
    momentum: dict[str, Tensor]
    total: dict[str, Tensor]
    keep: Float[Tensor, "batch heads"]


class Component(NamedTuple):
    """One level's part of the fast weights: Δ and S per layer, the running sum of a level of period P, and the
    share of W_init that is left (`forget_to: zero`)."""

    delta: Weights
    momentum: Weights | None
    total: Weights | None
    keep: Float[Tensor, "batch heads"] | None


class Products(NamedTuple):
    """What a segment writes: each layer's inputs and signals, one row per write."""

    inputs: list[Float[Tensor, "batch heads writes d_in"]]
    signals: list[Float[Tensor, "batch heads writes d_out"]]


def fresh(level: TokenLevel, init: Weights, batch: int) -> Component:
    """A component before any write."""

    def zeros() -> Weights:
        return [weight.new_zeros(batch, *weight.shape) for weight in init]

    return Component(
        zeros(),
        zeros() if level.has_momentum else None,
        zeros() if level.period > 1 else None,
        init[0].new_ones(batch, init[0].shape[0]) if level.forgets_init else None,
    )


def to_state(component: Component) -> LevelState:
    """A component as a state."""
    state: LevelState = {"delta": by_layer(component.delta)}
    if component.momentum is not None:
        state["momentum"] = by_layer(component.momentum)
    if component.total is not None:
        state["total"] = by_layer(component.total)
    if component.keep is not None:
        state["keep"] = component.keep
    return state


def from_state(state: LevelState) -> Component:
    """A state as a component."""
    momentum, total = state.get("momentum"), state.get("total")
    return Component(
        in_order(state["delta"]),
        None if momentum is None else in_order(momentum),
        None if total is None else in_order(total),
        state.get("keep"),
    )


def by_layer(tensors: Weights) -> dict[str, Tensor]:
    """A list of tensors as a dict, keyed by the layer's number."""
    return {str(layer): tensor for layer, tensor in enumerate(tensors)}


def in_order(layers: dict[str, Tensor]) -> Weights:
    """The inverse of `by_layer`, whatever the order of the keys: a file has "10" before "2"."""
    return [layers[str(layer)] for layer in range(len(layers))]


def weights_now(init: Weights, components: Sequence[Component]) -> Weights:
    """`keep W_init + Σ Δ`, per layer: [batch, heads, d_in, d_out]."""
    now = _initial(init, components)
    for component in components:
        now = [weight + delta for weight, delta in zip(now, component.delta, strict=True)]
    return now


def term_weights(levels: Sequence[TokenLevel], init: Weights, components: Sequence[Component]) -> list[Weights]:
    """The summands of a token's weights, in the order of `Plan.terms`: carried Δ and S, and W_init, those of equal
    share added up."""
    summands: dict[tuple[str, ...], Weights] = {initial_key(levels): _initial(init, components)}
    for level, component in zip(levels, components, strict=True):
        key = delta_key(level)
        if key in summands:
            summands[key] = [a + b for a, b in zip(summands[key], component.delta, strict=True)]
        else:
            summands[key] = component.delta
        if level.period == 1 and component.momentum is not None:
            summands[level.name, "momentum"] = component.momentum
    return [summands[key] for key in term_keys(levels)]


def advance(component: Component, step: Step, products: Products) -> Component:
    """A component of period 1 after a segment: `Δ ← ρ Δ + c S − Σ share in ⊗ δ`, `S ← (Πβ) S − Σ share in ⊗ δ`."""
    delta, momentum = [], []
    for index, (inputs, signals) in enumerate(zip(*products, strict=True)):
        moved = _minus(_scale(step.keep, component.delta[index]), step.delta, inputs, signals)
        if component.momentum is not None and step.momentum is not None:
            before = component.momentum[index]
            moved = moved + _scale(step.carry, before)
            momentum.append(_minus(_scale(step.momentum_keep, before), step.momentum, inputs, signals))
        delta.append(moved)
    return Component(delta, momentum or None, None, _kept(component, step))


def accumulate(component: Component, step: Step, products: Products) -> Component:
    """A component of period P within its period: the products are summed, as they were computed at the time."""
    assert component.total is not None
    written = (outer_sum(step.delta, inputs, signals) for inputs, signals in zip(*products, strict=True))
    return component._replace(total=[total + new for total, new in zip(component.total, written, strict=True)])


def fire(component: Component, step: Step, rows: Rows) -> Component:
    """A component of period P at its boundary, for the rows that stand there (all for `()`):
    `S ← β S − total`, `Δ ← α Δ + S`, `total ← 0`, with the gates of the boundary token."""
    assert component.total is not None
    moves = [-total for total in component.total]
    if component.momentum is not None:
        moves = [move + _scale(step.momentum_keep, s) for move, s in zip(moves, component.momentum, strict=True)]
    delta = [move + _scale(step.keep, before) for move, before in zip(moves, component.delta, strict=True)]
    total = [torch.zeros_like(total) for total in component.total]
    fired = Component(delta, None if component.momentum is None else moves, total, _kept(component, step))
    return fired if not rows else _where(torch.tensor(rows), fired, component)


def _initial(init: Weights, components: Sequence[Component]) -> Weights:
    for component in components:
        if component.keep is not None:
            init = [_scale(component.keep, weight) for weight in init]
    return init


def _scale(share: Tensor | None, weight: Tensor) -> Tensor:
    return weight if share is None else share[..., None, None] * weight


def _minus(weight: Tensor, share: Tensor, inputs: Tensor, signals: Tensor) -> Tensor:
    return weight - outer_sum(share, inputs, signals)


def _kept(component: Component, step: Step) -> Tensor | None:
    return component.keep if component.keep is None or step.keep is None else component.keep * step.keep


def _where(rows: Tensor, new: Component, old: Component) -> Component:
    def each(a: Weights | None, b: Weights | None) -> Weights | None:
        return None if a is None or b is None else [torch.where(align(rows, x), x, y) for x, y in zip(a, b, strict=True)]

    delta = each(new.delta, old.delta)
    assert delta is not None
    keep = each(None if new.keep is None else [new.keep], None if old.keep is None else [old.keep])
    return Component(delta, each(new.momentum, old.momentum), each(new.total, old.total), keep[0] if keep else None)
