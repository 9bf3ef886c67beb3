"""Components of a fast weight: one per level, since a fast weight is a sum over timescales.

    W_t = keep_t W_init + Σ_levels Δ^level_t

The weights of now, a component's move over a segment (period 1), its sum within a period and its move at the
boundary (period P).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metamem.memory.decay import decay_add
from metamem.memory.dual import has_bias, outer_sum
from metamem.memory.level import SignalAt, TokenLevel
from metamem.memory.networks import MemoryNetwork, Weights
from metamem.memory.plan import Step, delta_key, initial_key, term_keys
from metamem.memory.schedule import Rows, Segment
from metamem.memory.signals import output_error
from metamem.memory.transforms import TRANSFORMS
from metamem.state import State, align, tree_map


class LevelState(TypedDict):
    """A component as a state; layers by number, each [batch, heads, d_in, d_out]."""

    delta: dict[str, Tensor]
    momentum: NotRequired[dict[str, Tensor]]
    pending: NotRequired[dict[str, Tensor]]
    transform: NotRequired[dict[str, dict[str, Tensor]]]
    keep: NotRequired[Float[Tensor, "batch heads"]]


class Component(NamedTuple):
    """One level's part of the fast weights: Δ and S per layer; the step `−Σ η in ⊗ δ` that a level of period P has
    gathered since its last boundary (None for nothing yet); the share of W_init that is left (`forget_to: zero`); what
    its transform carries."""

    delta: Weights
    momentum: Weights | None
    pending: Weights | None
    keep: Float[Tensor, "batch heads"] | None
    transform: State | None = None


class Learner(NamedTuple):
    """What learns inside a memory: the network, the levels that move its weights, the chunk, where signals are
    computed, whether the writes of a token happen in turn, W_init, and the matrices that predict targets (None where no
    level's signal needs them)."""

    network: MemoryNetwork
    levels: tuple[TokenLevel, ...]
    chunk: int
    signal_at: SignalAt
    in_turn: bool
    init: Weights
    feedback: Weights | None


class Past(NamedTuple):
    """The last writes, as far back as the largest window reaches: keys, values, and each level's rates, and what a
    router multiplies each by, part by part."""

    keys: Float[Tensor, "batch heads reach writers d_key"]
    values: Float[Tensor, "batch heads reach writers d_value"]
    rates: dict[str, Float[Tensor, "batch heads reach writers"]]
    parts: dict[str, Float[Tensor, "batch #heads reach layers blocks"]] | None = None


class Carry(NamedTuple):
    """What goes from segment to segment: W_init (None where it is folded into a component), the components, the anchor
    (the weights at which the signals of the chunk are computed; None for token signals), and the window's past."""

    init: Weights | None
    components: list[Component]
    anchor: Weights | None
    past: Past | None = None

    def now(self) -> Weights:
        """`keep W_init + Σ Δ`, per layer: [batch, heads, d_in, d_out]."""
        summands = [component.delta for component in self.components]
        if self.init is not None:
            summands.insert(0, _initial(self.init, self.components))
        return _sum(summands)


class Products(NamedTuple):
    """What a segment writes: each layer's inputs and signals, one row per write. Inputs may lack the 1 that a bias, the
    last row of a matrix, multiplies."""

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
    if carried := TRANSFORMS[level.transform].init(in_order(state["delta"])):
        state["transform"] = carried
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
    if component.transform:  # none, or one that carries nothing
        state["transform"] = component.transform
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
        state.get("transform"),
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
    if component.keep is None:
        moved = [torch.add(delta, weight, alpha=sign) for delta, weight in zip(component.delta, init, strict=True)]
    else:
        share = component.keep[..., None, None]
        pairs = zip(component.delta, init, strict=True)
        moved = [torch.addcmul(delta, share, weight, value=sign) for delta, weight in pairs]
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
        bias = has_bias(component.delta[index], inputs)
        moved = _fade(step.keep, component.delta[index], outer_sum(-step.delta, inputs, signals, bias))
        if component.momentum is not None and step.momentum is not None:
            before = component.momentum[index]
            moved = _fade(step.carry, before, moved)
            momentum.append(_fade(step.momentum_keep, before, outer_sum(-step.momentum, inputs, signals, bias)))
        delta.append(moved)
    return component._replace(delta=delta, momentum=momentum or None, keep=_kept(component, step))


def accumulate(component: Component, step: Step, products: Products) -> Component:
    """A component of period P within its period: the products are summed, as they were computed at the time."""
    written = [
        outer_sum(-step.delta, inputs, signals, has_bias(delta, inputs))
        for delta, inputs, signals in zip(component.delta, *products, strict=True)
    ]
    if component.pending is not None:
        written = [before + new for before, new in zip(component.pending, written, strict=True)]
    return component._replace(pending=written)


def fire(level: TokenLevel, component: Component, step: Step, rows: Rows, now: Weights, init: Weights) -> Component:
    """A component of period P at its boundary, for the rows that stand there (all for `()`), with the gates of the
    boundary token; nothing is pending after it.

        S ← β S + pending,   Δ ← α Δ + step · T(S) − Σ weight ∇R(W, W_init)

    `now`: W before it.
    """
    assert component.pending is not None
    moves = component.pending
    if component.momentum is not None:
        moves = [_fade(step.momentum_keep, s, move) for s, move in zip(component.momentum, moves, strict=True)]
    momentum, transform = None if component.momentum is None else moves, component.transform
    if level.transform != "none":
        moves, transform = TRANSFORMS[level.transform].update(moves, transform or {})
        moves = [level.step * move for move in moves]
    if level.retention:
        pulls = [output_error(level.retention, w, w_init.expand_as(w)) for w, w_init in zip(now, init, strict=True)]
        moves = [move - pull for move, pull in zip(moves, pulls, strict=True)]
    delta = [_fade(step.keep, before, move) for before, move in zip(component.delta, moves, strict=True)]
    fired = Component(delta, momentum, None, _kept(component, step), transform)
    if not rows:
        return fired
    fired = fired._replace(pending=[torch.zeros_like(pending) for pending in component.pending])
    return choose_rows(rows, fired, component)


def fire_all(learner: Learner, segment: Segment, steps: Mapping[str, Step], carry: Carry) -> Carry:
    """The components after the boundaries at which a segment ends: all levels that fire see the same W before."""
    if not segment.fire:
        return carry
    init, components = learner.init, list(carry.components)
    firing = [
        (i, level, segment.fire[level.name]) for i, level in enumerate(learner.levels) if level.name in segment.fire
    ]
    now = carry.now() if any(level.retention for _, level, _ in firing) else []
    for index, level, rows in firing:
        components[index] = fire(level, components[index], steps[level.name], rows, now, init)
    for index, level, rows in firing:
        if level.weight_norm:
            now = carry._replace(components=components).now()
            components[index] = normalise(components[index], rows, now, init)
    return carry._replace(components=components)


def normalise(component: Component, rows: Rows, now: Weights, init: Weights) -> Component:
    """A component that has fired, moved so that each column of `now`, W after it, has the length it has in W_init."""
    lengths = [torch.linalg.vector_norm(w, dim=-2, keepdim=True) for w in init]
    wanted = [w * (length / _length(w)) for w, length in zip(now, lengths, strict=True)]
    delta = [delta + (w - was) for delta, w, was in zip(component.delta, wanted, now, strict=True)]
    return component._replace(delta=choose_weights(torch.tensor(rows), delta, component.delta) if rows else delta)


def _length(w: Tensor) -> Tensor:
    return torch.sqrt(w.square().sum(-2, keepdim=True) + 1e-10)


def choose_rows(rows: Rows, new: Component, old: Component) -> Component:
    """The new component for the given rows, the old one for the others."""
    mask = torch.tensor(rows)

    def each(a: Weights | None, b: Weights | None) -> Weights | None:
        return None if a is None or b is None else choose_weights(mask, a, b)

    delta = each(new.delta, old.delta)
    assert delta is not None
    keep = each(None if new.keep is None else [new.keep], None if old.keep is None else [old.keep])
    transform = new.transform
    if transform is not None and old.transform is not None:
        transform = tree_map(lambda a, b: torch.where(align(mask, a), a, b), transform, old.transform)
    momentum, pending = each(new.momentum, old.momentum), each(new.pending, old.pending)
    return Component(delta, momentum, pending, keep[0] if keep else None, transform)


def choose_weights(rows: Bool[Tensor, "batch"], new: Weights, old: Weights) -> Weights:
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
