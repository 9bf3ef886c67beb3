"""Chunkwise execution: signals at the chunk's first weights, reads in the dual form; networks of any depth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory import signals
from metamem.memory.component import (
    Carry,
    Component,
    Learner,
    Past,
    Products,
    accumulate,
    advance,
    choose_weights,
    fire_all,
    term_weights,
)
from metamem.memory.dual import local_read
from metamem.memory.networks import Network, Weights
from metamem.memory.plan import Key, Plan, cut, plan, signal_key, unstack, windows
from metamem.memory.product import product
from metamem.memory.schedule import Run, Segment
from metamem.memory.writer import Writes


class Pieces(NamedTuple):
    """A run's tokens, cut into segments; keys and values with those of the window before each."""

    keys: Float[Tensor, "batch heads segments writes d_key"]
    values: Float[Tensor, "batch heads segments writes d_value"]
    queries: Float[Tensor, "batch heads segments reads d_key"]
    plan: Plan


def run(learner: Learner, span: Run, writes: Writes, queries: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
    """Reads [batch, heads, tokens, readers, d_value], surprises [batch, heads, tokens, writers], what is carried."""
    network, levels, chunk = learner.network, learner.levels, learner.chunk
    assert isinstance(network, Network)
    fresh = span.length * writes.keys.shape[3]  # writes of a segment's own tokens
    reads, recalls, seen, sent = [], [], [], []
    pieces, past = cut_pieces(learner, span, writes, queries, carry.past)
    carry = carry._replace(past=past)
    lagging = all(level.period > 1 and level.period % chunk == 0 for level in levels)
    at_once = network.depth == 1 and not lagging  # the reads of all segments, after the loop
    for segment, piece in zip(span.segments, unstack(pieces, len(span.segments)), strict=True):
        carry = carry._replace(anchor=(at := refresh(segment, carry)))
        # Where no level moves inside a chunk, reads see the weights of the signals: one pass serves both. Not where a
        # call goes on inside a chunk: the anchor may be cut from W_init, which the reads are not.
        both = lagging and segment.refresh == ()
        together = torch.cat([piece.keys, piece.queries], -2) if both else piece.keys
        forward = network.forward(together, lambda layer, a, at=at: product(a, at[layer]))
        if both:
            forward, recalled = forward.split(piece.keys.shape[-2])
            reads.append(recalled.output)
        products = {}
        for level in levels:
            if (key := signal_key(level)) not in products:
                deltas = signals.at_layers(
                    level.signal, level.objectives, network, forward, at, piece.values, learner.feedback
                )
                products[key] = Products(forward.inputs, deltas)
        recalls.append(forward.output)
        if at_once:
            seen.append([weights[0] for weights in term_weights(levels, carry)])
            sent.append({key: written.signals[0] for key, written in products.items()})
        elif not both:
            carried = term_weights(levels, carry)
            reads.append(read(network, piece.plan, piece.queries, carried, products, queries.shape[3]))
        carry = move(learner, segment, piece.plan, carry, products)
    if at_once:
        carried = [[torch.stack(of_term, -3)] for of_term in zip(*seen, strict=True)]
        keys = [network.given(pieces.keys)]
        products = {key: Products(keys, [torch.stack([one[key] for one in sent], 2)]) for key in sent[0]}
        norm = [] if network.norm is None else [x.unsqueeze(1) for x in network.norm]  # an axis for the segments
        of_segments = network.with_norm(norm)
        read_out = read(of_segments, pieces.plan, pieces.queries, carried, products, queries.shape[3])
    else:
        read_out = torch.stack(reads, 2)
    recalled, values = torch.stack(recalls, 2)[..., -fresh:, :], pieces.values[..., -fresh:, :]
    surprise = signals.value(levels[0].objectives, recalled, values)
    shape = (span.length, -1)
    return read_out.unflatten(3, shape).flatten(2, 3), surprise.unflatten(3, shape).flatten(2, 3), carry


def cut_pieces(
    learner: Learner, span: Run, writes: Writes, queries: Tensor, past: Past | None
) -> tuple[Pieces, Past | None]:
    """The run in segments, and the past of the run after it."""
    asked = cut(queries, span).flatten(3, 4)
    if past is None:
        keys, values = (cut(x, span).flatten(3, 4) for x in (writes.keys, writes.values))
        return Pieces(keys, values, asked, plan(learner.levels, writes.gates, span, learner.signal_at)), None
    reach, here = past.keys.shape[2], slice(span.start, span.stop)
    keys, values = (
        torch.cat([before, x[:, :, here]], 2) for before, x in ((past.keys, writes.keys), (past.values, writes.values))
    )
    rates = {
        name: torch.cat([before, writes.gates[name].lr[:, :, here]], 2)[:, :, -reach:]
        for name, before in past.rates.items()
    }
    pieces = Pieces(
        windows(keys, span).flatten(3, 4),
        windows(values, span).flatten(3, 4),
        asked,
        plan(learner.levels, writes.gates, span, learner.signal_at, past.rates),
    )
    return pieces, Past(keys[:, :, -reach:], values[:, :, -reach:], rates)


def read(
    network: Network,
    step: Plan,
    queries: Tensor,
    carried: list[Weights],
    products: dict[Key, Products],
    readers: int,
) -> Tensor:
    """`z^l_t = Σ_terms share_t a^l_t T − Σ_s A[t,s] (a^l_t · in^l_s) δ^l_s` through every layer."""
    shares = [None if term.after is None else _copies(term.after, readers, -1) for term in step.terms]
    strengths = {key: _copies(strength, readers, -2) for key, strength in step.strengths.items()}

    def layer(index: int, a: Tensor) -> Tensor:
        parts = [product(a, tensor[index]) for tensor in carried]
        z, *more = (x if share is None else share.unsqueeze(-1) * x for share, x in zip(shares, parts, strict=True))
        for part in more:
            z = z + part
        for key, strength in strengths.items():
            z = z - local_read(strength, a, products[key].inputs[index], products[key].signals[index])
        return z

    return network.forward(queries, layer).output


def move(learner: Learner, segment: Segment, step: Plan, carry: Carry, products: dict[Key, Products]) -> Carry:
    """Every component after the segment."""
    moved: list[Component] = []
    for level, component in zip(learner.levels, carry.components, strict=True):
        mine, written = step.steps[level.name], products[signal_key(level)]
        moved.append((advance if level.period == 1 else accumulate)(component, mine, written))
    return fire_all(
        learner, segment, {name: step.steps[name] for name in segment.fire}, carry._replace(components=moved)
    )


def _copies(share: Tensor, readers: int, axis: int) -> Tensor:
    return share if readers == 1 else share.repeat_interleave(readers, axis)


def refresh(segment: Segment, carry: Carry) -> Weights:
    """The weights at which signals are computed: those of now, for rows that begin a chunk."""
    if segment.refresh is None and carry.anchor is not None:
        return carry.anchor
    now = carry.now()
    if not segment.refresh or carry.anchor is None:
        return now
    return choose_weights(torch.tensor(segment.refresh), now, carry.anchor)
