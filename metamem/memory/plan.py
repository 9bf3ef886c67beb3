"""Plan: all that a run of segments needs of its gates, computed for every segment at once.

Kernels depend on the gates only, so they are taken out of the loop over segments, which carries the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory.dual import Gate, before, gate_before, kernel
from metamem.memory.level import SignalAt, TokenLevel
from metamem.memory.schedule import Run, Segment
from metamem.memory.writer import Gates

Key = tuple  # of a signal: levels with equal objectives share theirs; of what is written: a gate may tell them apart
Parts = Float[Tensor, "batch #heads *segments writes layers blocks"]


class Step(NamedTuple):
    """What moves a component over a segment.

    - `delta`, `momentum`  per write: its share in Δ and in S after the segment (its rate, for a level of period P)
    - `keep`, `carry`      the share of Δ and of S in the Δ after the segment
    - `momentum_keep`      the share of S in the S after it
    - `parts`              per write, what a router multiplies it by in each layer and block of columns
    For a level of period P the last three are the boundary token's α and β (`carry` is None).
    """

    delta: Float[Tensor, "*batch writes"]
    momentum: Float[Tensor, "*batch writes"] | None
    keep: Float[Tensor, "*batch"] | None
    carry: Float[Tensor, "*batch"] | None
    momentum_keep: Float[Tensor, "*batch"] | None
    parts: Parts | None = None


class Term(NamedTuple):
    """One summand of the weights that a token sees, `share_t T`, T carried into the segment: the share after the
    token's own write, and where its signal is computed; None for 1. In the order of `component.term_weights`."""

    after: Gate | None
    before: Gate | None


class Plan(NamedTuple):
    """The plan of a segment; `strengths`: A[t, write], summed over levels that write the same; `before`: the same
    where the token's signal is computed (none for signals of the chunk). Writes are those of the window's tokens before
    the segment, where a level has a window, and those of the segment."""

    terms: list[Term]
    strengths: dict[Key, Float[Tensor, "*batch tokens writes"]]
    before: dict[Key, Float[Tensor, "*batch tokens writes"]]
    steps: dict[str, Step]


def signal_key(level: TokenLevel) -> Key:
    """Levels with equal objectives and kind of signal share their signals."""
    return (level.signal, *level.objectives.items())


def write_key(level: TokenLevel, parts: Parts | None) -> Key:
    """Levels that write the same: those that share their signals, unless a router scales each one's part by part."""
    return signal_key(level) if parts is None else (level.name, *signal_key(level))


def plan(
    levels: Sequence[TokenLevel],
    gates: dict[str, Gates],
    span: Run,
    signal_at: SignalAt,
    past: dict[str, Tensor] | None = None,
    past_parts: dict[str, Tensor] | None = None,
) -> Plan:
    """The plans of a run's segments, stacked on axis 2 (`unstack` gives the list). `past`: per level, the rates of
    the tokens before the run that the largest window reaches back to; `past_parts`: what a router made of each."""
    here = {name: _segments(gate, span) for name, gate in gates.items()}
    rates = {name: here[name].lr if past is None else _windows(gates[name].lr, span, past[name]) for name in here}
    kernels = {
        level.name: kernel(here[level.name].log_keep, here[level.name].log_momentum, here[level.name].lr[..., 0])
        for level in levels
        if level.period == 1
    }
    strengths: dict[Key, Tensor] = {}
    earlier: dict[Key, Tensor] = {}
    steps: dict[str, Step] = {}
    for level in levels:
        gate, rate = here[level.name], rates[level.name]
        writers, reach = rate.shape[-1], rate.shape[-2] - span.length
        parts = gates[level.name].parts
        if parts is not None:
            parts = _windows(parts, span, past_parts[level.name]) if past_parts else cut(parts, span)
            parts = copies(parts, writers, 3)
        if level.period > 1:
            keep, momentum = _last(gate.log_keep), _last(gate.log_momentum)
            if reach:
                rate = rate * _first_writes(level, span.segments, reach, rate)
            steps[level.name] = Step(rate.flatten(-2), None, keep, None, momentum, parts)
            continue
        rate = rate.flatten(-2)
        of = kernels[level.name]
        written, last_written = of.writes, of.last_writes
        if reach:
            window = _window(level.window, span.length, reach, written)
            written = written @ window
            last_written = None if last_written is None else last_written @ window
        strength = copies(written, writers) * rate.unsqueeze(-2)
        key = write_key(level, parts)
        strengths[key] = strengths[key] + strength if key in strengths else strength
        if signal_at != "chunk":
            seen = before(strength, 0.0)
            if signal_at == "decayed" and gate.log_keep is not None:
                seen = gate.log_keep.exp().unsqueeze(-1) * seen
            earlier[key] = earlier[key] + seen if key in earlier else seen
        momentum = None if last_written is None else copies(last_written, writers) * rate
        keep = None if of.keep is None else of.keep[..., -1]
        carry = None if of.carry is None else of.carry[..., -1]
        steps[level.name] = Step(strength[..., -1, :], momentum, keep, carry, of.last_carry, parts)
    shares = {name: (of.keep, of.carry) for name, of in kernels.items()}
    terms = [_term(key, shares, here, signal_at) for key in term_keys(levels)]
    return Plan(terms, strengths, earlier, steps)


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


def copies(share: Float[Tensor, "*shape"], count: int, axis: int = -1) -> Float[Tensor, "*repeated"]:
    """Each entry of an axis `count` times, one beside the other: what several writes, reads or blocks have alike."""
    return share if count == 1 else share.repeat_interleave(count, axis)


def _windows(gate: Tensor, span: Run, past: Tensor) -> Tensor:
    """A gate of the run's segments, each with that of the `past.shape[2]` tokens before it."""
    return windows(torch.cat([past, gate[:, :, span.start : span.stop]], 2), span)


def windows(x: Float[Tensor, "batch heads time *any"], span: Run) -> Float[Tensor, "batch heads segments tokens *any"]:
    """The segments of a run, each with the tokens before it: x holds the run's tokens and some before them."""
    reach = x.shape[2] - (span.stop - span.start)
    return x.unfold(2, reach + span.length, span.length).movedim(-1, 3)


def _window(window: int, tokens: int, reach: int, like: Tensor) -> Float[Tensor, "tokens reach_and_tokens"]:
    """B[j, s]: 1 where the step of token j descends on the objective of token s, one of the last `window`."""
    j = torch.arange(reach, reach + tokens, device=like.device).unsqueeze(1)
    age = j - torch.arange(reach + tokens, device=like.device)
    return ((age >= 0) & (age < window)).to(like.dtype)


def _first_writes(level: TokenLevel, segments: Sequence[Segment], reach: int, like: Tensor) -> Tensor:
    """1 for the writes of the segment, and at a period's first segment for those of its window before it."""
    tokens = like.shape[3]
    age = torch.arange(reach, reach - tokens, -1, device=like.device)  # 1 for the last token before the segment
    before = (age >= 1) & (age <= level.window - level.period)
    begins = [torch.tensor([True] if segment.refresh == () else segment.refresh or [False]) for segment in segments]
    rows = torch.stack([row.expand(max(map(len, begins))) for row in begins], 1).to(like.device)
    mask = (rows.unsqueeze(-1) & before) | (age < 1)
    return mask[:, None, :, :, None].to(like.dtype)


def _term(
    key: tuple[str, ...],
    shares: dict[str, tuple[Gate | None, Gate | None]],
    gates: dict[str, Gates],
    signal_at: SignalAt,
) -> Term:
    if not key:
        return Term(None, None)
    if key[-1] == "momentum":
        carry, log_keep = shares[key[0]][1], gates[key[0]].log_keep
        assert carry is not None
        earlier = gate_before(carry, 0.0)
        return Term(carry, earlier * log_keep.exp() if signal_at == "decayed" and log_keep is not None else earlier)
    keeps = [keep for keep in (shares[name][0] for name in key) if keep is not None]
    share = torch.stack(keeps).prod(0) if len(keeps) > 1 else keeps[0]
    return Term(share, share if signal_at == "decayed" else gate_before(share, 1.0))


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
    return _spread(tree, count, lambda x: x.unbind(2))


def split(tree: Any, sizes: Sequence[int]) -> list[Any]:
    """A tree of tensors, cut along axis 2 into trees of the given sizes; as `unstack`."""
    return _spread(tree, len(sizes), lambda x: x.split(list(sizes), 2))


def _spread(tree: Any, count: int, cut: Callable[[Tensor], Sequence[Tensor]]) -> list[Any]:
    if tree is None:
        return [None] * count
    if isinstance(tree, Tensor):
        return list(cut(tree))
    if isinstance(tree, dict):
        parts = {key: _spread(value, count, cut) for key, value in tree.items()}
        return [{key: part[index] for key, part in parts.items()} for index in range(count)]
    parts = [_spread(value, count, cut) for value in tree]
    rows = [[part[index] for part in parts] for index in range(count)]
    return rows if isinstance(tree, list) else [type(tree)(*row) for row in rows]
