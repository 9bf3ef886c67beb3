"""Runs of an executor over a call's tokens, with a router's gates on their writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory import digest as digests
from metamem.memory.component import Carry, Learner
from metamem.memory.digest import Digest
from metamem.memory.reader import Queries
from metamem.memory.schedule import Run, Segment
from metamem.memory.writer import Gates, Writes
from metamem.routing import Router, Routing

Executor = Callable[[Learner, Run, Writes, Tensor, Carry], tuple[Tensor, Tensor, Carry]]


class Done(NamedTuple):
    """What a call's tokens gave: reads [batch, heads, tokens, readers, d_value], surprises [batch, heads, tokens,
    writers], what is carried on, and, with a router, its gates and its digest."""

    read: Tensor
    surprise: Tensor
    carry: Carry
    routing: Routing | None = None
    digest: Digest | None = None


def run(
    executor: Executor,
    learner: Learner,
    spans: Sequence[Run],
    x: Float[Tensor, "batch tokens dim"],
    writes: Writes,
    queries: Queries,
    carry: Carry,
    router: Router | None,
    digest: Digest | None,
) -> Done:
    """All runs of a call, one after the other."""
    if router is not None and digest is not None:
        return _by_chunk(executor, learner, spans, x, writes, queries, carry, router, digest)
    routing = None
    if router is not None:
        routing = router(x, writes.keys.dtype)
        writes = gated(writes, router, routing)
    reads, surprises = [], []
    for span in spans:
        read, surprise, carry = executor(learner, span, writes, queries, carry)
        reads.append(read)
        surprises.append(surprise)
    if len(spans) == 1:
        return Done(reads[0], surprises[0], carry, routing)
    return Done(torch.cat(reads, 2), torch.cat(surprises, 2), carry, routing)


def gated(writes: Writes, router: Router, routing: Routing) -> Writes:
    """The writes with a router's gates on them: in the rates, where a gate is one for all of a head."""
    by_part = router.by_part(routing.gates).movedim(1, 2)  # batch, heads, tokens, layers, blocks, levels
    named = zip(router.names, by_part.unbind(-1), strict=True)
    return writes._replace(gates={name: _gated(writes.gates[name], parts) for name, parts in named})


def _gated(gates: Gates, parts: Float[Tensor, "batch #heads tokens layers blocks"]) -> Gates:
    if parts.shape[3:] == (1, 1):
        return gates._replace(lr=gates.lr * parts[..., 0])
    return gates._replace(parts=parts)


def _by_chunk(
    executor: Executor,
    learner: Learner,
    spans: Sequence[Run],
    x: Tensor,
    writes: Writes,
    queries: Queries,
    carry: Carry,
    router: Router,
    digest: Digest,
) -> Done:
    """Segment by segment: the gates of a chunk come from what the chunk before it left."""
    reads, surprises, routings = [], [], []
    by, dtype = (router.heads, router.layers, router.blocks), writes.keys.dtype
    for segment in (segment for span in spans for segment in span.segments):
        here = slice(segment.start, segment.start + segment.length)
        if segment.refresh is not None:
            digest = digests.begin(digest, segment.refresh, carry.now(), learner.chunk, by)
        routing = router(digest.features.unsqueeze(1).expand(-1, segment.length, -1), dtype)
        mine = gated(_cut(writes, here), router, routing)
        read, surprise, carry = executor(learner, _alone(segment), mine, queries[:, :, here], carry)
        digest = digests.gather(digest, x[:, here].to(dtype), surprise.mean((1, 3)), routing.gates)
        reads.append(read)
        surprises.append(surprise)
        routings.append(routing)
    gates, logits = (torch.cat(parts, 1) for parts in zip(*routings, strict=True))
    return Done(torch.cat(reads, 2), torch.cat(surprises, 2), carry, Routing(gates, logits), digest)


def _cut(writes: Writes, here: slice) -> Writes:
    gates = {
        name: Gates(*(None if gate is None else gate[:, :, here] for gate in of))  # pyright: ignore[reportArgumentType]
        for name, of in writes.gates.items()
    }
    return Writes(writes.keys[:, :, here], writes.values[:, :, here], gates)


def _alone(segment: Segment) -> Run:
    return Run(0, segment.length, (replace(segment, start=0),))
