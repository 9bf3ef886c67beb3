"""Exact token signals of a linear memory, in parallel.

With a squared error the signal of token t, at the weights before its own write, is linear in the writes before it:

    δ_t = k_t W_{t−1} − v_t,   (I + Λ) δ = e0,   Λ[t,s] = A[t−1,s] (k_t · k_s) for s < t

with e0 the errors at the segment's first weights: one triangular solve gives the sequential rule exactly (DeltaNet,
gated DeltaNet, and the delta rule with momentum). The solve is taken on the keys and values of all segments at once
(the WY form), so that only products with the carried weights are left in the loop.

    signal_at: decayed   the signal of t is computed after its decay: A[t−1,s] α_t in the place of A[t−1,s]
                         (Gated DeltaNet, Yang et al. 2024, eq. 10)
    writes: in_turn      each write of a token sees those before it: Λ has η (k_i · k_j) inside a token, for j < i
                         (DeltaProduct, Siems et al. 2025, eq. 5)

Predicted targets v P stand in the place of v. A Hebbian signal, −v, needs no solve. Where a router gates blocks of
columns, each block solves as a head of its own (`metamem.memory.parts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory import signals, triangular
from metamem.memory.chunkwise import move
from metamem.memory.component import Carry, Learner, Products, fire_all, term_weights
from metamem.memory.level import TokenLevel
from metamem.memory.networks import Network
from metamem.memory.parts import blocks_as_heads, carry_by_block, carry_whole, join_rows, split_rows
from metamem.memory.plan import Key, Plan, Step, copies, cut, plan, signal_key, unstack
from metamem.memory.reader import Queries
from metamem.memory.schedule import Run, Segment
from metamem.memory.writer import Gates, Writes

Rows = Float[Tensor, "batch heads segments writes _features"]


def run(learner: Learner, span: Run, writes: Writes, queries: Queries, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
    """As `chunkwise.run`, with every signal at the weights of its own token."""
    network, levels, writers, readers = learner.network, learner.levels, writes.keys.shape[3], queries.shape[3]
    assert isinstance(network, Network)
    gates, blocks = _by_block(writes.gates)
    stacked = plan(levels, gates, span, learner.signal_at)
    values = cut(writes.values, span).flatten(3, 4)
    keys, asked = (copies(network.given(cut(x, span).flatten(3, 4)), blocks, 1) for x in (writes.keys, queries))
    scales = {signal_key(level): _scale(level) for level in levels}
    targets = values if learner.feedback is None else values @ learner.feedback[0].unsqueeze(1)
    targets = split_rows(targets, blocks)
    hebbian = levels[0].signal == "hebbian"
    shared = _shared([term.before for term in stacked.terms], keys, writers)
    strength = _seen(learner, stacked, scales, writers) if stacked.before else None
    solved_keys, solved_targets = (shared, targets) if hebbian else solve(strength, keys, shared, targets)
    errors, seen, carry = [], [], carry_by_block(carry, blocks)
    pieces = (x.unbind(2) for x in (keys, solved_keys, solved_targets))
    plans = unstack(stacked, len(span.segments))
    for segment, step, key, solved_key, solved_target in zip(span.segments, plans, *pieces, strict=True):
        carried = [weights[0] for weights in term_weights(levels, carry)]
        # W_init alone has no batch
        seen.append(torch.cat(torch.broadcast_tensors(*carried), -2) if len(carried) > 1 else carried[0])
        errors.append(-solved_target if hebbian else solved_key @ seen[-1] - solved_target)
        products = {name: Products([key], [signals.scaled(scale, errors[-1])]) for name, scale in scales.items()}
        carry = _moved(learner, segment, step, carry, products, blocks)
    error, weights = torch.stack(errors, 2), torch.stack(seen, 2)
    recalled = error + targets
    if hebbian:
        recalled = shared @ weights
        if strength is not None:
            recalled = recalled - (strength * (keys @ keys.mT)) @ error
    surprise = signals.value(levels[0].objectives, join_rows(recalled, blocks), values)
    reads = _shared([term.after for term in stacked.terms], asked, readers) @ weights
    if stacked.strengths:
        after = copies(_strength(stacked.strengths, scales), readers, -2)
        reads = reads - (after * (asked @ keys.mT)) @ error
    reads, carry, shape = join_rows(reads, blocks), carry_whole(carry, blocks), (span.length, -1)
    return reads.unflatten(3, shape).flatten(2, 3), surprise.unflatten(3, shape).flatten(2, 3), carry


def solve(
    strength: Float[Tensor, "batch heads segments writes writes"] | None, keys: Rows, shared: Rows, targets: Rows
) -> tuple[Rows, Rows]:
    """`(I + Λ)⁻¹` of `shared` (the keys, scaled by their shares of every carried tensor) and of the targets: with the
    carried tensors stacked as W, δ = solved_keys W − solved_targets. Λ = `strength` ⊙ K Kᵀ; None for 0."""
    if strength is None:
        return shared, targets
    solved_keys, solved_targets = triangular.solve(strength * (keys @ keys.mT), shared, targets)
    return solved_keys, solved_targets


def check(levels: Sequence[TokenLevel]) -> None:
    """Raises ValueError for signals that are not linear in the weights, or not one for all levels."""
    if own := [level for level in levels if not isinstance(level.signal, str)]:
        raise ValueError(
            f"level {own[0].name!r}: signal_at 'token' and 'decayed' solve for the signals backprop, predicted_targets "
            f"and hebbian, not for {signals.name_of(own[0].signal)}; set signal_at to 'chunk', with chunk 1 for the "
            f"signal at every token's own weights"
        )
    if len({level.signal for level in levels}) > 1:
        kinds = ", ".join(f"{level.name}: {level.signal}" for level in levels)
        raise ValueError(
            f"token signals are solved for all levels at once, so theirs must be of one kind ({kinds}); "
            f"set signal_at to 'chunk', or one signal for all"
        )
    probe = torch.linspace(-1.0, 2.0, 12).reshape(2, 6)
    for level in levels:
        for objective in level.objectives if level.signal == "backprop" else ():
            if not torch.allclose(signals.gradient(objective)(probe[:1], probe[1:]), probe[:1] - probe[1:]):
                raise ValueError(
                    f"level {level.name!r}: signal_at 'token' solves for a squared error, and the gradient of "
                    f"{objective.__module__}.{objective.__name__} is not pred - target; "
                    f"set objective to {{losses.recall.mse: 1.0}}, or signal_at to 'chunk'"
                )


def _by_block(gates: dict[str, Gates]) -> tuple[dict[str, Gates], int]:
    """The gates, with blocks of columns as heads, and how many blocks a head has."""
    parts = next(iter(gates.values())).parts
    if parts is None:
        return gates, 1
    return {name: blocks_as_heads(gate) for name, gate in gates.items()}, parts.shape[-1]


def _moved(
    learner: Learner, segment: Segment, step: Plan, carry: Carry, products: dict[Key, Products], blocks: int
) -> Carry:
    """As `chunkwise.move`: a boundary acts on whole matrices."""
    if blocks == 1 or not segment.fire:
        return move(learner, segment, step, carry, products)
    carry = carry_whole(move(learner, replace(segment, fire={}), step, carry, products), blocks)
    steps = {name: _whole(step.steps[name], blocks) for name in segment.fire}
    return carry_by_block(fire_all(learner, segment, steps, carry), blocks)


def _whole(step: Step, blocks: int) -> Step:
    """A boundary's gates, which the blocks of a head share."""
    return Step(*(None if gate is None else gate[:, ::blocks] for gate in step))  # pyright: ignore[reportArgumentType]


def _scale(level: TokenLevel) -> float:
    return sum(level.objectives.values()) if level.signal == "backprop" else 1.0


def _seen(learner: Learner, stacked: Plan, scales: dict[Key, float], writers: int) -> Tensor:
    """The strength of every write where each write's signal is computed, write by write."""
    strength = _strength(stacked.before, scales)
    if not learner.in_turn or writers == 1:
        return copies(strength, writers, -2)
    write = torch.arange(strength.shape[-1], device=strength.device)
    token = write // writers
    earlier = (token.unsqueeze(1) == token) & (write.unsqueeze(1) > write)
    earlier = earlier.to(strength.dtype).unflatten(0, (-1, writers))
    within = _strength(stacked.strengths, scales)
    return torch.addcmul(strength.unsqueeze(-2), within.unsqueeze(-2), earlier).flatten(-3, -2)


def _shared(shares: list[Tensor | None], x: Tensor, copies: int) -> Tensor:
    """x scaled by each share, side by side; `copies` rows of x to a token."""
    scaled = []
    for share in shares:
        wide = share if share is None or copies == 1 else share.repeat_interleave(copies, -1)
        scaled.append(x if wide is None else wide.unsqueeze(-1) * x)
    return torch.cat(scaled, -1) if len(scaled) > 1 else scaled[0]


def _strength(strengths: dict[Key, Tensor], scales: dict[Key, float]) -> Tensor:
    first, *rest = [signals.scaled(scales[key], strength) for key, strength in strengths.items()]
    return torch.stack([first, *rest]).sum(0) if rest else first
