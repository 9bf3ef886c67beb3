"""Plan: all that a run of segments needs of its gates, computed for every segment at once.

Kernels depend on the gates only, so they are taken out of the loop over segments, which carries the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory.dual import Gate, gate_before, kernel
from metamem.memory.level import TokenLevel
from metamem.memory.schedule import Run
from metamem.memory.writer import Gates

Key = tuple  # a level's objectives: levels with equal ones share their signals


class Step(NamedTuple):
    """What moves a component over a segment.

    - `delta`, `momentum`  per write: its share in Δ and in S after the segment (its rate, for a level of period P)
    - `keep`, `carry`      the share of Δ and of S in the Δ after the segment
    - `momentum_keep`      the share of S in the S after it
    For a level of period P the last three are the boundary token's α and β (`carry` is None).
    """

    delta: Float[Tensor, "*batch writes"]
    momentum: Float[Tensor, "*batch writes"] | None
    keep: Float[Tensor, "*batch"] | None
    carry: Float[Tensor, "*batch"] | None
    momentum_keep: Float[Tensor, "*batch"] | None


class Term(NamedTuple):
    """One summand of the weights that a token sees, `share_t T`, T carried into the segment: the share after the
    token's own write, and before it; None for 1. In the order of `component.term_weights`."""

    after: Gate | None
    before: Gate | None


class Plan(NamedTuple):
    """The plan of a segment; `strengths`: A[t, write], summed over levels of equal objectives, per objectives."""

    terms: list[Term]
    strengths: dict[Key, Float[Tensor, "*batch tokens writes"]]
    steps: dict[str, Step]


def objective_key(level: TokenLevel) -> Key:
    """Levels with equal objectives share their signals."""
    return tuple(level.objectives.items())


def plan(levels: Sequence[TokenLevel], gates: dict[str, Gates], span: Run) -> Plan:
    """The plans of a run's segments, stacked on axis 2 (`unstack` gives the list)."""
    here = {name: _segments(gate, span) for name, gate in gates.items()}
    kernels = {
        level.name: kernel(here[level.name].log_keep, here[level.name].log_momentum, here[level.name].lr[..., 0])
        for level in levels
        if level.period == 1
    }
    strengths: dict[Key, Tensor] = {}
    steps: dict[str, Step] = {}
    for level in levels:
        gate = here[level.name]
        writers, rates = gate.lr.shape[-1], gate.lr.flatten(-2)
        if level.period > 1:
            keep, momentum = _last(gate.log_keep), _last(gate.log_momentum)
            steps[level.name] = Step(rates, None, keep, None, momentum)
            continue
        of = kernels[level.name]
        strength = of.writes.repeat_interleave(writers, -1) * rates.unsqueeze(-2)
        key = objective_key(level)
        strengths[key] = strengths[key] + strength if key in strengths else strength
        momentum = None if of.last_writes is None else of.last_writes.repeat_interleave(writers, -1) * rates
        keep = None if of.keep is None else of.keep[..., -1]
        carry = None if of.carry is None else of.carry[..., -1]
        steps[level.name] = Step(strength[..., -1, :], momentum, keep, carry, of.last_carry)
    terms = [_term(key, {name: (of.keep, of.carry) for name, of in kernels.items()}) for key in term_keys(levels)]
    return Plan(terms, strengths, steps)


def term_keys(levels: Sequence[TokenLevel]) -> list[tuple[str, ...]]:
    """The distinct shares of a token's weights: the levels whose forgetting they are, or a level's momentum."""
    keys = {initial_key(levels): None} | {delta_key(level): None for level in levels}
    keys |= {(level.name, "momentum"): None for level in levels if level.period == 1 and level.has_momentum}
    return list(keys)


def initial_key(levels: Sequence[TokenLevel]) -> tuple[str, ...]:
    """The levels that forget W_init inside a segment."""
    return tuple(level.name for level in levels if level.period == 1 and level.forgets_init)


def delta_key(level: TokenLevel) -> tuple[str, ...]:
    """The level that forgets its own Δ inside a segment, if it does."""
    return (level.name,) if level.period == 1 and level.forgets else ()


def _term(key: tuple[str, ...], shares: dict[str, tuple[Gate | None, Gate | None]]) -> Term:
    if not key:
        return Term(None, None)
    if key[-1] == "momentum":
        carry = shares[key[0]][1]
        assert carry is not None
        return Term(carry, gate_before(carry, 0.0))
    keeps = [keep for keep in (shares[name][0] for name in key) if keep is not None]
    share = torch.stack(keeps).prod(0) if len(keeps) > 1 else keeps[0]
    return Term(share, gate_before(share, 1.0))


def _last(log_gate: Gate | None) -> Tensor | None:
    return None if log_gate is None else log_gate[..., -1].exp()


def _segments(gates: Gates, span: Run) -> Gates:
    """Gates of a run, cut into its segments: [batch, heads, segments, tokens, …]."""
    return Gates(*(None if gate is None else cut(gate, span) for gate in gates))  # pyright: ignore[reportArgumentType]


def cut(x: Float[Tensor, "batch heads time *any"], span: Run) -> Float[Tensor, "batch heads segments tokens *any"]:
    """The tokens of a run, cut into its segments."""
    return x[:, :, span.start : span.stop].unflatten(2, (len(span.segments), span.length))


def unstack(tree: Any, count: int) -> list[Any]:
    """A list of trees from a tree of tensors stacked along axis 2. One unbind a tensor: slicing would cost its
    backward a full-size gradient a segment."""
    if tree is None:
        return [None] * count
    if isinstance(tree, Tensor):
        return list(tree.unbind(2))
    if isinstance(tree, dict):
        parts = {key: unstack(value, count) for key, value in tree.items()}
        return [{key: part[index] for key, part in parts.items()} for index in range(count)]
    parts = [unstack(value, count) for value in tree]
    rows = [[part[index] for part in parts] for index in range(count)]
    return rows if isinstance(tree, list) else [type(tree)(*row) for row in rows]
