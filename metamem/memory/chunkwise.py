"""Chunkwise execution: signals at the chunk's first weights, reads in the dual form; networks of any depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metamem.memory import signals
from metamem.memory.component import (
    Carry,
    Component,
    Learner,
    Products,
    accumulate,
    advance,
    choose_weights,
    fire,
    term_weights,
)
from metamem.memory.dual import local_read
from metamem.memory.level import TokenLevel
from metamem.memory.networks import Network, Weights
from metamem.memory.plan import Key, Plan, cut, objective_key, plan, unstack
from metamem.memory.product import product
from metamem.memory.schedule import Run, Segment
from metamem.memory.writer import Writes


def run(learner: Learner, span: Run, writes: Writes, queries: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
    """Reads [batch, heads, tokens, readers, d_value], surprises [batch, heads, tokens, writers], what is carried."""
    network, levels, chunk = learner
    reads, surprises = [], []
    stacked = (cut(x, span).flatten(3, 4).unbind(2) for x in (writes.keys, writes.values, queries))
    lagging = all(level.period > 1 and level.period % chunk == 0 for level in levels)
    plans = unstack(plan(levels, writes.gates, span), len(span.segments))
    for segment, step, keys, values, asked in zip(span.segments, plans, *stacked, strict=True):
        carry = carry._replace(anchor=(at := refresh(segment, carry)))
        # Where no level moves inside a chunk, reads see the weights of the signals: one pass serves both.
        together = torch.cat([keys, asked], -2) if lagging else keys
        forward = network.forward(together, lambda layer, a, at=at: product(a, at[layer]))
        if lagging:
            forward, recalled = forward.split(keys.shape[-2])
            reads.append(recalled.output)
        products = {}
        for level in levels:
            if (key := objective_key(level)) not in products:
                error = signals.output_error(level.objectives, forward.output, values)
                products[key] = Products(forward.inputs, network.backward(error, at, forward.preactivations))
        surprises.append(signals.value(levels[0].objectives, forward.output, values))
        if not lagging:
            reads.append(read(network, step, asked, term_weights(levels, carry), products, queries.shape[3]))
        carry = carry._replace(components=move(levels, segment, step, carry.components, products))
    read_out = torch.stack(reads, 2).unflatten(3, (span.length, -1)).flatten(2, 3)
    return read_out, torch.stack(surprises, 2).unflatten(3, (span.length, -1)).flatten(2, 3), carry


def read(
    network: Network,
    step: Plan,
    queries: Tensor,
    carried: list[Weights],
    products: dict[Key, Products],
    readers: int,
) -> Tensor:
    """`z^l_t = Σ_terms share_t a^l_t T − Σ_s A[t,s] (a^l_t · in^l_s) δ^l_s` through every layer."""
    shares = [None if term.after is None else term.after.repeat_interleave(readers, -1) for term in step.terms]
    strengths = {key: strength.repeat_interleave(readers, -2) for key, strength in step.strengths.items()}

    def layer(index: int, a: Tensor) -> Tensor:
        parts = [product(a, tensor[index]) for tensor in carried]
        z, *more = (x if share is None else share.unsqueeze(-1) * x for share, x in zip(shares, parts, strict=True))
        for part in more:
            z = z + part
        for key, strength in strengths.items():
            z = z - local_read(strength, a, products[key].inputs[index], products[key].signals[index])
        return z

    return network.forward(queries, layer).output


def move(
    levels: Sequence[TokenLevel],
    segment: Segment,
    step: Plan,
    components: list[Component],
    products: dict[Key, Products],
) -> list[Component]:
    """Every component after the segment."""
    moved = []
    for level, component in zip(levels, components, strict=True):
        mine, written = step.steps[level.name], products[objective_key(level)]
        if level.period == 1:
            component = advance(component, mine, written)
        else:
            component = accumulate(component, mine, written)
            if level.name in segment.fire:
                component = fire(component, mine, segment.fire[level.name])
        moved.append(component)
    return moved


def refresh(segment: Segment, carry: Carry) -> Weights:
    """The weights at which signals are computed: those of now, for rows that begin a chunk."""
    if segment.refresh is None and carry.anchor is not None:
        return carry.anchor
    now = carry.now()
    if not segment.refresh or carry.anchor is None:
        return now
    return choose_weights(torch.tensor(segment.refresh), now, carry.anchor)
