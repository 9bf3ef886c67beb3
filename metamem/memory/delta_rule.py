"""Exact token signals of a linear memory, in parallel.

With a squared error the signal of token t, at the weights before its own write, is linear in the writes before it:

    δ_t = k_t W_{t−1} − v_t,   (I + Λ) δ = e0,   Λ[t,s] = A[t−1,s] (k_t · k_s) for s < t

with e0 the errors at the segment's first weights: one triangular solve gives the sequential rule exactly (DeltaNet,
gated DeltaNet, and the delta rule with momentum). The solve is taken on the keys and values of all segments at once
(the WY form), so that only products with the carried weights are left in the loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory import signals
from metamem.memory.chunkwise import move
from metamem.memory.component import Carry, Learner, Products, term_weights
from metamem.memory.dual import before
from metamem.memory.level import TokenLevel
from metamem.memory.plan import Key, Plan, cut, objective_key, plan, unstack
from metamem.memory.schedule import Run
from metamem.memory.writer import Writes

Keys = Float[Tensor, "batch heads segments writes d_key"]


def run(learner: Learner, span: Run, writes: Writes, queries: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
    """As `chunkwise.run`, with every signal at the weights of its own token."""
    levels = learner.levels
    stacked = plan(levels, writes.gates, span)
    keys, values = cut(writes.keys, span).flatten(3, 4), cut(writes.values, span).flatten(3, 4)
    asked = cut(queries, span).flatten(3, 4)
    scales = {objective_key(level): sum(level.objectives.values()) for level in levels}
    solved_keys, solved_values = solve(stacked, scales, keys, values, writes.keys.shape[3])
    errors, seen = [], []
    pieces = (x.unbind(2) for x in (keys, solved_keys, solved_values))
    plans = unstack(stacked, len(span.segments))
    for segment, step, key, solved_key, solved_value in zip(span.segments, plans, *pieces, strict=True):
        carried = (weights[0] for weights in term_weights(levels, carry))
        seen.append(torch.cat(torch.broadcast_tensors(*carried), -2))  # W_init alone has no batch
        errors.append(solved_key @ seen[-1] - solved_value)
        products = {name: Products([key], [scale * errors[-1]]) for name, scale in scales.items()}
        carry = carry._replace(components=move(levels, segment, step, carry.components, products))
    error = torch.stack(errors, 2)
    surprise = signals.value(levels[0].objectives, error + values, values)
    reads = _shared([term.after for term in stacked.terms], asked, queries.shape[3]) @ torch.stack(seen, 2)
    if stacked.strengths:
        strength = _strength(stacked.strengths, scales).repeat_interleave(queries.shape[3], -2)
        reads = reads - (strength * (asked @ keys.mT)) @ error
    shape = (span.length, -1)
    return reads.unflatten(3, shape).flatten(2, 3), surprise.unflatten(3, shape).flatten(2, 3), carry


def solve(stacked: Plan, scales: dict[Key, float], keys: Keys, values: Tensor, writers: int) -> tuple[Tensor, Tensor]:
    """`(I + Λ)⁻¹` of the keys, each scaled by its share of every carried tensor before its own write, and of the
    values: with the carried tensors stacked as W, δ = solved_keys W − solved_values."""
    shared = _shared([term.before for term in stacked.terms], keys, writers)
    if not stacked.strengths:
        return shared, values
    strength = before(_strength(stacked.strengths, scales), 0.0).repeat_interleave(writers, -2)
    both = torch.cat([shared, values], -1)
    both = torch.linalg.solve_triangular(strength * (keys @ keys.mT), both, upper=False, unitriangular=True)
    solved_keys, solved_values = both.split([shared.shape[-1], values.shape[-1]], -1)
    return solved_keys, solved_values


def check(levels: Sequence[TokenLevel]) -> None:
    """Raises ValueError for an objective whose gradient is not pred − target."""
    probe = torch.linspace(-1.0, 2.0, 12).reshape(2, 6)
    for level in levels:
        for objective in level.objectives:
            if not torch.allclose(signals.gradient(objective)(probe[:1], probe[1:]), probe[:1] - probe[1:]):
                raise ValueError(
                    f"level {level.name!r}: signal_at 'token' solves for a squared error, and the gradient of "
                    f"{objective.__module__}.{objective.__name__} is not pred - target; "
                    f"use losses.recall.mse, or set signal_at to 'chunk'"
                )


def _shared(shares: list[Tensor | None], x: Tensor, copies: int) -> Tensor:
    """x scaled by each share, side by side; `copies` rows of x to a token."""
    scaled = [x if share is None else share.repeat_interleave(copies, -1).unsqueeze(-1) * x for share in shares]
    return torch.cat(scaled, -1)


def _strength(strengths: dict[Key, Tensor], scales: dict[Key, float]) -> Tensor:
    return torch.stack([scales[key] * strength for key, strength in strengths.items()]).sum(0)
