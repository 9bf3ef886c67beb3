"""Components of a fast weight: one per level, since a fast weight is a sum over timescales.

    W_t = keep_t W_init + Σ_levels Δ^level_t

The weights of now, a component's move over a segment (period 1), its sum within a period and its move at the
boundary (period P).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NotRequired, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory.decay import decay_add
from metamem.memory.dual import outer_sum
from metamem.memory.level import TokenLevel
from metamem.memory.networks import Network, Weights
from metamem.memory.plan import Step, delta_key, initial_key, term_keys
from metamem.memory.schedule import Rows
from metamem.state import align


class LevelState(TypedDict):
    """A component as a state; layers by number, each [batch, heads, d_in, d_out]."""

    delta: dict[str, Tensor]
    momentum: NotRequired[dict[str, Tensor]]
    pending: NotRequired[dict[str, Tensor]]
    keep: NotRequired[Float[Tensor, "batch heads"]]


class Component(NamedTuple):
    """One level's part of the fast weights: Δ and S per layer; the step `−Σ η in ⊗ δ` that a level of period P has
    gathered since its last boundary (None for nothing yet); the share of W_init that is left (`forget_to: zero`)."""

    delta: Weights
    momentum: Weights | None
    pending: Weights | None
    keep: Float[Tensor, "batch heads"] | None


class Learner(NamedTuple):
    """What learns inside a memory: the network, the levels that move its weights, the chunk."""

    network: Network
    levels: tuple[TokenLevel, ...]
    chunk: int


class Carry(NamedTuple):
    """What goes from segment to segment: W_init (None where it is folded into a component), the components, and the
    anchor, the weights at which the signals of the chunk are computed (None for token signals)."""

    init: Weights | None
    components: list[Component]
    anchor: Weights | None

    def now(self) -> Weights:
        """`keep W_init + Σ Δ`, per layer: [batch, heads, d_in, d_out]."""
        summands = [component.delta for component in self.components]
        if self.init is not None:
            summands.insert(0, _initial(self.init, self.components))
        return _sum(summands)


class Products(NamedTuple):
    """What a segment writes: each layer's inputs and signals, one row per write."""

    inputs: list[Float[Tensor, "batch heads writes d_in"]]
    signals: list[Float[Tensor, "batch heads writes d_out"]]


def fresh_state(level: TokenLevel, init: Weights, batch: int) -> LevelState:
    """A component's state before any write."""

    def zeros() -> dict[str, Tensor]:
        return by_layer([weight.new_zeros(batch, *weight.shape) for weight in init])

    state: LevelState = {"delta": zeros()}
    if level.has_momentum:
        state["momentum"] = zeros()
    if level.period > 1:
        state["pending"] = zeros()
    if level.forgets_init:
        state["keep"] = init[0].new_ones(batch, init[0].shape[0])
    return state


def to_state(level: TokenLevel, component: Component) -> LevelState:
    """A component as a state."""
    state: LevelState = {"delta": by_layer(component.delta)}
    if component.momentum is not None:
        state["momentum"] = by_layer(component.momentum)
    if level.period > 1:
        state["pending"] = by_layer(component.pending or [torch.zeros_like(delta) for delta in component.delta])
    if component.keep is not None:
        state["keep"] = component.keep
    return state


def from_state(state: LevelState) -> Component:
    """A state as a component."""
    momentum, pending = state.get("momentum"), state.get("pending")
    return Component(
        in_order(state["delta"]),
        None if momentum is None else in_order(momentum),
        None if pending is None else in_order(pending),
        state.get("keep"),
    )


def by_layer(tensors: Weights) -> dict[str, Tensor]:
    """A list of tensors as a dict, keyed by the layer's number."""
    return {str(layer): tensor for layer, tensor in enumerate(tensors)}


def in_order(layers: dict[str, Tensor]) -> Weights:
    """The inverse of `by_layer`, whatever the order of the keys: a file has "10" before "2"."""
    return [layers[str(layer)] for layer in range(len(layers))]


def fold(
    levels: Sequence[TokenLevel], init: Weights, components: Sequence[Component]
) -> tuple[Weights | None, list[Component]]:
    """W_init folded into the component that fades with it, where there is one: `Δ + keep W_init` then obeys the same
    recurrence as Δ, and nothing adds W_init up again at every segment. None is left of W_init; else it is untouched."""
    host = _host(levels)
    if host is None:
        return init, list(components)
    folded = list(components)
    folded[host] = _shift(folded[host], init, 1.0)
    return None, folded


def unfold(levels: Sequence[TokenLevel], init: Weights, components: Sequence[Component]) -> list[Component]:
    """The inverse of `fold`."""
    host = _host(levels)
    unfolded = list(components)
    if host is not None:
        unfolded[host] = _shift(unfolded[host], init, -1.0)
    return unfolded


def _host(levels: Sequence[TokenLevel]) -> int | None:
    """The level whose Δ fades as W_init does: the only one that forgets W_init, or one that forgets nothing."""
    forgetting = [index for index, level in enumerate(levels) if level.forgets_init]
    if len(forgetting) > 1:
        return None
    lasting = [index for index, level in enumerate(levels) if not level.forgets]
    return forgetting[0] if forgetting else next(iter(lasting), None)


def _shift(component: Component, init: Weights, sign: float) -> Component:
    left = _initial(init, [component])
    moved = [delta + sign * weight for delta, weight in zip(component.delta, left, strict=True)]
    return component._replace(delta=moved)


def term_weights(levels: Sequence[TokenLevel], carry: Carry) -> list[Weights]:
    """The summands of a token's weights, in the order of `Plan.terms`: carried Δ and S, and W_init, those of equal
    share added up."""
    summands: dict[tuple[str, ...], list[Weights]] = {key: [] for key in term_keys(levels)}
    if carry.init is not None:
        summands[initial_key(levels)].append(_initial(carry.init, carry.components))
    for level, component in zip(levels, carry.components, strict=True):
        summands[delta_key(level)].append(component.delta)
        if level.period == 1 and component.momentum is not None:
            summands[level.name, "momentum"].append(component.momentum)
    return [_sum(summand) for summand in summands.values()]


def advance(component: Component, step: Step, products: Products) -> Component:
    """A component of period 1 after a segment: `Δ ← ρ Δ + c S − Σ share in ⊗ δ`, `S ← (Πβ) S − Σ share in ⊗ δ`."""
    delta, momentum = [], []
    for index, (inputs, signals) in enumerate(zip(*products, strict=True)):
        moved = _fade(step.keep, component.delta[index], outer_sum(-step.delta, inputs, signals))
        if component.momentum is not None and step.momentum is not None:
            before = component.momentum[index]
            moved = _fade(step.carry, before, moved)
            momentum.append(_fade(step.momentum_keep, before, outer_sum(-step.momentum, inputs, signals)))
        delta.append(moved)
    return Component(delta, momentum or None, None, _kept(component, step))


def accumulate(component: Component, step: Step, products: Products) -> Component:
    """A component of period P within its period: the products are summed, as they were computed at the time."""
    written = [outer_sum(-step.delta, inputs, signals) for inputs, signals in zip(*products, strict=True)]
    if component.pending is not None:
        written = [before + new for before, new in zip(component.pending, written, strict=True)]
    return component._replace(pending=written)


def fire(component: Component, step: Step, rows: Rows) -> Component:
    """A component of period P at its boundary, for the rows that stand there (all for `()`):
    `S ← β S + pending`, `Δ ← α Δ + S`, nothing pending, with the gates of the boundary token."""
    assert component.pending is not None
    moves = component.pending
    if component.momentum is not None:
        moves = [_fade(step.momentum_keep, s, move) for s, move in zip(component.momentum, moves, strict=True)]
    delta = [_fade(step.keep, before, move) for before, move in zip(component.delta, moves, strict=True)]
    fired = Component(delta, None if component.momentum is None else moves, None, _kept(component, step))
    if not rows:
        return fired
    fired = fired._replace(pending=[torch.zeros_like(pending) for pending in component.pending])
    return choose_rows(rows, fired, component)


def choose_rows(rows: Rows, new: Component, old: Component) -> Component:
    """The new component for the given rows, the old one for the others."""
    mask = torch.tensor(rows)

    def each(a: Weights | None, b: Weights | None) -> Weights | None:
        return None if a is None or b is None else choose_weights(mask, a, b)

    delta = each(new.delta, old.delta)
    assert delta is not None
    keep = each(None if new.keep is None else [new.keep], None if old.keep is None else [old.keep])
    return Component(delta, each(new.momentum, old.momentum), each(new.pending, old.pending), keep[0] if keep else None)


def choose_weights(rows: Tensor, new: Weights, old: Weights) -> Weights:
    """Per row of the batch the new weights or the old."""
    return [torch.where(align(rows, x), x, y) for x, y in zip(new, old, strict=True)]


def _initial(init: Weights, components: Sequence[Component]) -> Weights:
    for component in components:
        if component.keep is not None:
            init = [component.keep[..., None, None] * weight for weight in init]
    return init


def _sum(summands: list[Weights]) -> Weights:
    total = summands[0]
    for summand in summands[1:]:
        total = [a + b for a, b in zip(total, summand, strict=True)]
    return total


def _fade(share: Tensor | None, weight: Tensor, step: Tensor) -> Tensor:
    return weight + step if share is None else decay_add(share, weight, step)


def _kept(component: Component, step: Step) -> Tensor | None:
    return component.keep if component.keep is None or step.keep is None else component.keep * step.keep
