"""The plain recurrence: token by token, the weights of every token built. The reference for every faster executor.

    in, z = forward(k_t, W at the chunk's start)          δ by the level's signal
    S = β S − η in ⊗ δ      Δ = α Δ + S
    y_t = forward(q_t, keep W_init + Σ Δ)

A level of period P sums its products and moves after the read of its boundary token: seen from the next token on.

`written_out` computes signals by the written-out equations, `by_autograd` the same products by `torch.func.vmap(grad)`
of a loss with respect to the weights, for any objective.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap

from metamem.memory import signals
from metamem.memory.component import Carry, Component, Learner, Past, choose_weights, fire_all
from metamem.memory.level import TokenLevel
from metamem.memory.networks import Network, Weights
from metamem.memory.parts import columns, gated
from metamem.memory.plan import Parts, Step
from metamem.memory.reader import Queries
from metamem.memory.schedule import Run, Segment
from metamem.memory.writer import Gates, Writes
from metamem.state import align

Vectors = Float[Tensor, "batch heads writes _features"]
Rates = Float[Tensor, "batch heads writes"]
# weights, key, value, rate, parts -> per layer Σ_w rate in ⊗ (m ⊙ δ)
Products = Callable[[Learner, TokenLevel, Weights, Vectors, Vectors, Rates, Parts | None], Weights]


def run(
    products: Products, learner: Learner, span: Run, writes: Writes, queries: Queries, carry: Carry
) -> tuple[Tensor, Tensor, Carry]:
    """As `chunkwise.run`; without an anchor every token's signal is computed at the weights of that token."""
    levels = learner.levels
    reads, surprises = [], []
    for segment in span.segments:
        for token in range(segment.start, segment.start + segment.length):
            if carry.anchor is not None and token == segment.start and segment.refresh is not None:
                carry = carry._replace(anchor=_anchored(segment, carry.now(), carry.anchor))
            carry, recalled = write(products, learner, carry, writes, token, segment)
            surprises.append(signals.value(levels[0].objectives, recalled, writes.values[:, :, token]))
            now = carry.now()
            asked = queries[:, :, token]
            reads.append(learner.network.recall(now, asked))
        last = segment.start + segment.length - 1
        carry = fire_all(
            learner, segment, {name: boundary_gates(writes.gates[name], last) for name in segment.fire}, carry
        )
    return torch.stack(reads, 2), torch.stack(surprises, 2), carry


def write(
    products: Products, learner: Learner, carry: Carry, writes: Writes, token: int, segment: Segment
) -> tuple[Carry, Tensor]:
    """The token's writes, at once or in turn, and what was recalled for its keys before them."""
    key, value, gates = writes.keys[:, :, token], writes.values[:, :, token], writes.gates
    rates = {name: gate.lr[:, :, token] for name, gate in gates.items()}
    parts = {name: gate.parts[:, :, token] for name, gate in gates.items() if gate.parts is not None}
    starts = token == segment.start
    levels = learner.levels
    before = carry.now()
    decayed = [
        _decay(component, gates[level.name], token) if level.period == 1 else component
        for level, component in zip(levels, carry.components, strict=True)
    ]
    if learner.signal_at == "decayed":
        before = carry._replace(components=_without_momentum(levels, carry.components, gates, token)).now()
    at = before if carry.anchor is None else carry.anchor
    writers = key.shape[2]
    groups = [slice(i, i + 1) for i in range(writers)] if learner.in_turn else [slice(None)]
    components, recalled = list(decayed), []
    for number, group in enumerate(groups):
        if number:
            at = carry._replace(components=components).now()
        k, v = key[:, :, group], value[:, :, group]
        recalled.append(learner.network.recall(at, k))
        for index, level in enumerate(levels):
            rate, part = rates[level.name][:, :, group], parts.get(level.name)
            written = window(level, carry.past, k, v, rate, part, segment, starts)
            step = [-product for product in products(learner, level, at, *written)]
            components[index] = add_step(level, components[index], step)
    past = _later(carry.past, key, value, rates, parts)
    return carry._replace(components=components, past=past), torch.cat(recalled, 2)


def window(
    level: TokenLevel,
    past: Past | None,
    key: Vectors,
    value: Vectors,
    rate: Rates,
    parts: Float[Tensor, "batch #heads layers blocks"] | None,
    segment: Segment,
    starts: bool,
) -> tuple[
    Float[Tensor, "batch heads descended _features"],
    Float[Tensor, "batch heads descended _features"],
    Float[Tensor, "batch heads descended"],
    Float[Tensor, "batch #heads descended layers blocks"] | None,
]:
    """The keys, values, rates and a router's gates on whose objective a token's step descends: its own, and those of
    the level's window before it (for a level of period P, once, at the period's first token)."""
    reach, writers = level.window - level.period, key.shape[2]
    parts = None if parts is None else parts.unsqueeze(2).expand(-1, -1, writers, -1, -1)
    if past is None or reach < 1 or (level.period > 1 and not (starts and segment.refresh is not None)):
        return key, value, rate, parts
    if parts is not None and past.parts is not None:
        earlier = past.parts[level.name][:, :, -reach:].repeat_interleave(writers, 2)
        parts = torch.cat([earlier, parts], 2)
    before = past.rates[level.name][:, :, -reach:]
    if level.period > 1 and segment.refresh:
        before = align(torch.tensor(segment.refresh), before) * before
    return (
        torch.cat([past.keys[:, :, -reach:].flatten(2, 3), key], 2),
        torch.cat([past.values[:, :, -reach:].flatten(2, 3), value], 2),
        torch.cat([before.flatten(2, 3), rate], 2),
        parts,
    )


def _later(
    past: Past | None, key: Tensor, value: Tensor, rates: dict[str, Tensor], parts: dict[str, Tensor]
) -> Past | None:
    if past is None:
        return None
    reach = past.keys.shape[2]

    def roll(before: Tensor, new: Tensor) -> Tensor:
        return torch.cat([before, new.unsqueeze(2)], 2)[:, :, -reach:]

    rolled = {name: roll(before, rates[name]) for name, before in past.rates.items()}
    of_parts = past.parts and {name: roll(before, parts[name]) for name, before in past.parts.items()}
    return Past(roll(past.keys, key), roll(past.values, value), rolled, of_parts)


def _decay(component: Component, gates: Gates, token: int) -> Component:
    """`α Δ + β S`, to which the token's own step is added, and `β S`."""
    faded = _faded(component, gates, token)
    if component.momentum is None:
        return faded
    assert gates.log_momentum is not None
    beta = gates.log_momentum[:, :, token, None, None].exp()
    momentum = [beta * before for before in component.momentum]
    return faded._replace(delta=[d + s for d, s in zip(faded.delta, momentum, strict=True)], momentum=momentum)


def _faded(component: Component, gates: Gates, token: int) -> Component:
    if gates.log_keep is None:
        return component
    keep = gates.log_keep[:, :, token].exp()
    left = None if component.keep is None else component.keep * keep
    return component._replace(delta=[keep[..., None, None] * delta for delta in component.delta], keep=left)


def _without_momentum(
    levels: tuple[TokenLevel, ...], components: list[Component], gates: dict[str, Gates], token: int
) -> list[Component]:
    return [
        _faded(component, gates[level.name], token) if level.period == 1 else component
        for level, component in zip(levels, components, strict=True)
    ]


def add_step(level: TokenLevel, component: Component, step: Weights) -> Component:
    """The step added to Δ and S, or, for a level of period P, to what is pending."""
    if level.period > 1:
        before = component.pending or [torch.zeros_like(one) for one in step]
        return component._replace(pending=[a + b for a, b in zip(before, step, strict=True)])
    delta = [a + b for a, b in zip(component.delta, step, strict=True)]
    momentum = component.momentum
    if momentum is not None:
        momentum = [a + b for a, b in zip(momentum, step, strict=True)]
    return component._replace(delta=delta, momentum=momentum)


def boundary_gates(gates: Gates, token: int) -> Step:
    """The boundary token's α and β."""
    keep = None if gates.log_keep is None else gates.log_keep[:, :, token].exp()
    momentum = None if gates.log_momentum is None else gates.log_momentum[:, :, token].exp()
    return Step(gates.lr[:, :, token], None, keep, None, momentum)


def _anchored(segment: Segment, now: Weights, anchor: Weights) -> Weights:
    return choose_weights(torch.tensor(segment.refresh), now, anchor) if segment.refresh else now


def written_out(
    learner: Learner,
    level: TokenLevel,
    weights: Weights,
    key: Vectors,
    value: Vectors,
    rate: Rates,
    parts: Parts | None = None,
) -> Weights:
    """Per layer `Σ_w rate in ⊗ (m ⊙ δ)`, δ written out."""
    network = learner.network
    assert isinstance(network, Network)
    forward = network.forward(key, lambda layer, a: a @ weights[layer])
    deltas = signals.at_layers(level.signal, level.objectives, network, forward, weights, value, learner.feedback)
    pairs = zip(forward.inputs, gated(deltas, parts), strict=True)
    return [(rate.unsqueeze(-1) * a).mT @ delta for a, delta in pairs]


def by_autograd(
    learner: Learner,
    level: TokenLevel,
    weights: Weights,
    key: Vectors,
    value: Vectors,
    rate: Rates,
    parts: Parts | None = None,
) -> Weights:
    """The same by torch.func: the gradient of Σ_w rate · loss. Backprop's is the objective; predicted targets have
    `½ ‖in^l W^l − v P^l‖²` at each layer, no gradient through in^l; Hebbian is `−(k W) · v`, a signal of a user's own
    `(in^l W^l) · δ^l`. Where a router's gates
    tell parts of the weights apart, the gradient of every write by itself."""
    feedback = learner.feedback or []

    def loss(
        moved: Weights, still: Weights, norm: Weights, feedback: Weights, key: Tensor, value: Tensor, rate: Tensor
    ) -> Tensor:
        network = learner.network.with_norm(norm)
        if level.signal == "backprop":
            return (rate * signals.value(level.objectives, network.recall(moved, key), value)).sum()
        assert isinstance(network, Network)
        forward = network.forward(key, lambda layer, a: a @ still[layer])
        layers = list(zip(forward.inputs, moved, strict=True))
        if not isinstance(level.signal, str):
            deltas = level.signal(network, forward, still, value)
            losses = [((a @ weight) * delta).sum(-1) for (a, weight), delta in zip(layers, deltas, strict=True)]
        elif level.signal == "hebbian":
            losses = [-((a @ weight) * value).sum(-1) for a, weight in layers]
        else:
            targets = [value @ matrix for matrix in feedback]
            losses = [0.5 * (a @ weight - t).square().sum(-1) for (a, weight), t in zip(layers, targets, strict=True)]
        return (rate * torch.stack(losses).sum(0)).sum()

    norm = [] if learner.network.norm is None else list(learner.network.norm)
    per_head = grad(loss)
    if parts is not None:
        key, value, rate = key.unsqueeze(3), value.unsqueeze(3), rate.unsqueeze(3)
        per_head = vmap(per_head, in_dims=(None, None, None, None, 0, 0, 0))
    per_row = vmap(per_head)
    steps = vmap(per_row, in_dims=(0, 0, None, None, 0, 0, 0))(weights, weights, norm, feedback, key, value, rate)
    if parts is None:
        return steps
    open_columns = (columns(parts, layer, step.shape[-1]).unsqueeze(3) for layer, step in enumerate(steps))
    return [(of_layer * step).sum(2) for of_layer, step in zip(open_columns, steps, strict=True)]
