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
from metamem.memory.dual import affine, has_bias, local_read
from metamem.memory.networks import Network, Weights
from metamem.memory.parts import gated
from metamem.memory.plan import Key, Plan, copies, cut, plan, signal_key, unstack, windows, write_key
from metamem.memory.reader import Queries
from metamem.memory.schedule import Run, Segment
from metamem.memory.writer import Writes


class Pieces(NamedTuple):
    """A run's tokens, cut into segments; keys and values with those of the window before each."""

    keys: Float[Tensor, "batch heads segments writes d_key"]
    values: Float[Tensor, "batch heads segments writes d_value"]
    queries: Float[Tensor, "batch heads segments reads d_key"]
    plan: Plan


class Chunk(NamedTuple):
    """What the work of one segment gives: what is carried on, the surprise of each of its tokens' writes, and either
    the reads or, for networks of one matrix, what all segments' reads are made of at once: the carried tensors and the
    signals."""

    carry: Carry
    surprise: Float[Tensor, "batch heads writes"]
    read: Float[Tensor, "batch heads reads d_value"] | None
    seen: list[Tensor]
    sent: dict[Key, Tensor]


def run(learner: Learner, span: Run, writes: Writes, queries: Queries, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
    """Reads [batch, heads, tokens, readers, d_value], surprises [batch, heads, tokens, writers], what is carried."""
    network, writers, readers = learner.network, writes.keys.shape[3], queries.shape[3]
    assert isinstance(network, Network)
    pieces, past = cut_pieces(learner, span, writes, queries, carry.past)
    carry, chunks = carry._replace(past=past), []
    for segment, piece in zip(span.segments, unstack(pieces, len(span.segments)), strict=True):
        chunks.append(one_segment(learner, segment, piece, carry, writers, readers))
        carry = chunks[-1].carry
    if chunks[0].seen:
        carried = [[torch.stack(of_term, -3)] for of_term in zip(*(chunk.seen for chunk in chunks), strict=True)]
        sent = {key: torch.stack([chunk.sent[key] for chunk in chunks], 2) for key in chunks[0].sent}
        products = {key: Products([network.given(pieces.keys, _ones())], [signal]) for key, signal in sent.items()}
        norm = [] if network.norm is None else [x.unsqueeze(1) for x in network.norm]  # an axis for the segments
        read_out = read(network.with_norm(norm), pieces.plan, pieces.queries, carried, products, readers)
    else:
        read_out = torch.stack([chunk.read for chunk in chunks if chunk.read is not None], 2)
    surprise = torch.stack([chunk.surprise for chunk in chunks], 2)
    shape = (span.length, -1)
    return read_out.unflatten(3, shape).flatten(2, 3), surprise.unflatten(3, shape).flatten(2, 3), carry


def one_segment(learner: Learner, segment: Segment, piece: Pieces, carry: Carry, writers: int, readers: int) -> Chunk:
    """The work of one segment; `piece` is one of `Pieces` without the axis of segments."""
    network, levels, chunk = learner.network, learner.levels, learner.chunk
    assert isinstance(network, Network)
    carry = carry._replace(anchor=(at := refresh(segment, carry)))
    # Where no level moves inside a chunk, reads see the weights of the signals: one pass serves both. Not where a call
    # goes on inside a chunk: the anchor may be cut from W_init, which the reads are not.
    lagging = all(level.period > 1 and level.period % chunk == 0 for level in levels)
    both = lagging and segment.refresh == ()
    together = torch.cat([piece.keys, piece.queries], -2) if both else piece.keys
    forward = network.forward(together, lambda layer, a: affine(a, at[layer]), _ones())
    read_out, seen, sent = None, [], {}
    if both:
        forward, recalled = forward.split(piece.keys.shape[-2])
        read_out = recalled.output
    deltas: dict[Key, list[Tensor]] = {}
    products: dict[Key, Products] = {}
    for level in levels:
        if (key := signal_key(level)) not in deltas:
            deltas[key] = signals.at_layers(
                level.signal, level.objectives, network, forward, at, piece.values, learner.feedback
            )
        parts = piece.plan.steps[level.name].parts
        products[write_key(level, parts)] = Products(forward.inputs, gated(deltas[key], parts))
    if network.depth == 1 and not lagging:
        seen = [weights[0] for weights in term_weights(levels, carry)]
        sent = {key: written.signals[0] for key, written in products.items()}
    elif not both:
        read_out = read(network, piece.plan, piece.queries, term_weights(levels, carry), products, readers)
    carry = move(learner, segment, piece.plan, carry, products)
    fresh = segment.length * writers  # not those of the window before it
    surprise = signals.value(levels[0].objectives, forward.output[..., -fresh:, :], piece.values[..., -fresh:, :])
    return Chunk(carry, surprise, read_out, seen, sent)


def cut_pieces(
    learner: Learner, span: Run, writes: Writes, queries: Queries, past: Past | None
) -> tuple[Pieces, Past | None]:
    """The run in segments, and the past of the run after it."""
    asked = cut(queries, span).flatten(3, 4)
    if past is None:
        keys, values = (cut(x, span).flatten(3, 4) for x in (writes.keys, writes.values))
        return Pieces(keys, values, asked, plan(learner.levels, writes.gates, span, learner.signal_at)), None
    reach = past.keys.shape[2]

    def later(before: Tensor, new: Tensor | None) -> Tensor:
        assert new is not None
        return torch.cat([before, new[:, :, span.start : span.stop]], 2)

    gates, of_parts = writes.gates, past.parts
    keys, values = later(past.keys, writes.keys), later(past.values, writes.values)
    rates = {name: later(before, gates[name].lr)[:, :, -reach:] for name, before in past.rates.items()}
    parts = of_parts and {name: later(before, gates[name].parts)[:, :, -reach:] for name, before in of_parts.items()}
    pieces = Pieces(
        windows(keys, span).flatten(3, 4),
        windows(values, span).flatten(3, 4),
        asked,
        plan(learner.levels, writes.gates, span, learner.signal_at, past.rates, past.parts),
    )
    return pieces, Past(keys[:, :, -reach:], values[:, :, -reach:], rates, parts)


def read(
    network: Network,
    step: Plan,
    queries: Float[Tensor, "*batch reads d_key"],
    carried: list[Weights],
    products: dict[Key, Products],
    readers: int,
) -> Float[Tensor, "*batch reads d_value"]:
    """`z^l_t = Σ_terms share_t a^l_t T − Σ_s A[t,s] (a^l_t · in^l_s) δ^l_s` through every layer."""
    shares = [None if term.after is None else copies(term.after, readers) for term in step.terms]
    strengths = {key: copies(strength, readers, -2) for key, strength in step.strengths.items()}

    def layer(index: int, a: Tensor) -> Tensor:
        parts = [affine(a, tensor[index]) for tensor in carried]
        bias = has_bias(carried[0][index], a)
        z, *more = (x if share is None else share.unsqueeze(-1) * x for share, x in zip(shares, parts, strict=True))
        for part in more:
            z = z + part
        for key, strength in strengths.items():
            z = z - local_read(strength, a, products[key].inputs[index], products[key].signals[index], bias)
        return z

    return network.forward(queries, layer, _ones()).output


def _ones() -> bool:
    # A compiled graph adds biases in passing; eager, a slice of the weights has a gradient of their full size.
    return not torch.compiler.is_compiling()


def move(learner: Learner, segment: Segment, step: Plan, carry: Carry, products: dict[Key, Products]) -> Carry:
    """Every component after the segment."""
    moved: list[Component] = []
    for level, component in zip(learner.levels, carry.components, strict=True):
        mine = step.steps[level.name]
        written = products[write_key(level, mine.parts)]
        moved.append((advance if level.period == 1 else accumulate)(component, mine, written))
    return fire_all(
        learner, segment, {name: step.steps[name] for name in segment.fire}, carry._replace(components=moved)
    )


def refresh(segment: Segment, carry: Carry) -> Weights:
    """The weights at which signals are computed: those of now, for rows that begin a chunk."""
    if segment.refresh is None and carry.anchor is not None:
        return carry.anchor
    now = carry.now()
    if not segment.refresh or carry.anchor is None:
        return now
    return choose_weights(torch.tensor(segment.refresh), now, carry.anchor)
