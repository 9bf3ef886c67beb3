"""Compiled execution: the work of a few chunks as one graph, called along the tokens, whatever their number."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import optree
import torch
from torch import Tensor

from metamem.memory.component import Carry, Learner
from metamem.memory.plan import split
from metamem.memory.reader import Queries
from metamem.memory.routed import Executor
from metamem.memory.schedule import Run
from metamem.memory.writer import Writes

GRAPHS = 64  # in a process: a memory has two, of `TOGETHER` segments and of one, each with and without gradients
TOGETHER = 4  # segments of a graph: a call costs as much as some products; compiling four, twice as long as one


def run(
    executor: Executor, learner: Learner, span: Run, writes: Writes, queries: Queries, carry: Carry
) -> tuple[Tensor, Tensor, Carry]:
    """As the executor, its segments `TOGETHER` at a time and then one by one."""
    if torch.compiler.is_compiling():
        return executor(learner, span, writes, queries, carry)
    groups, alone = divmod(len(span.segments), TOGETHER)
    counts = [TOGETHER] * groups + [1] * alone
    before, after = span.start, queries.shape[2] - span.stop
    sizes = [before, *(count * span.length for count in counts), after]
    pieces = list(zip(split(writes, sizes), queries.split(sizes, 2), strict=True))[1:-1]
    # Without their places, which are no part of their work: one graph serves all of them.
    segments = iter([replace(segment, start=0) for segment in span.segments])
    reads, surprises = [], []
    for count, (mine, asked) in zip(counts, pieces, strict=True):
        part = Run(0, span.length, tuple(next(segments) for _ in range(count)))
        read, surprise, carry = _graph(executor)(learner, part, mine, asked, _uniform(learner, carry))
        reads.append(read)
        surprises.append(surprise)
    return torch.cat(reads, 2), torch.cat(surprises, 2), carry


@functools.cache
def _graph(executor: Executor) -> Executor:
    # Its overloads have not all of its arguments.
    return torch.compile(executor, fullgraph=True, dynamic=False, recompile_limit=GRAPHS)  # pyright: ignore[reportCallIssue]


def _uniform(learner: Learner, carry: Carry) -> Carry:
    """The carry in one form, so that one graph serves a call's first segment and those after it: zeros for nothing
    pending, None for a transform that carries nothing, rows in order, and a gradient for each tensor where W_init has
    one."""
    traced = torch.is_grad_enabled() and any(weight.requires_grad for weight in learner.init)
    transformed = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]

    def seen(x: Tensor) -> Tensor:
        x = x.contiguous()
        return x if x.requires_grad or not traced or transformed else x.detach().requires_grad_()

    components = []
    for level, component in zip(learner.levels, carry.components, strict=True):
        if level.period > 1 and component.pending is None:
            component = component._replace(pending=[torch.zeros_like(delta) for delta in component.delta])
        components.append(component._replace(transform=component.transform or None))
    tree: Any = components, carry.anchor, carry.past
    components, anchor, past = optree.tree_map(seen, tree)
    return carry._replace(components=components, anchor=anchor, past=past)
