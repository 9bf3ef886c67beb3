"""The plain recurrence: token by token, the weights of every token built. The reference for every faster executor.

    in, z = forward(k_t, W at the chunk's start)          δ by the level's objective
    S = β S − η in ⊗ δ      Δ = α Δ + S
    y_t = forward(q_t, keep W_init + Σ Δ)

A level of period P sums its products and moves after the read of its boundary token: seen from the next token on.

`written_out` computes signals by the written-out backpropagation, `vmap_grad` the same outer products by
`torch.func.vmap(grad)` of the objective with respect to the weights, for any objective.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from metamem.memory import signals
from metamem.memory.component import Carry, Component, Learner, choose_rows, choose_weights
from metamem.memory.networks import Network, Weights
from metamem.memory.schedule import Rows, Run
from metamem.memory.signals import Objectives
from metamem.memory.writer import Gates, Writes

# network, objectives, weights [b h i o], key [b h w i], value [b h w o], rate [b h w] -> per layer Σ_w rate in ⊗ δ
Gradient = Callable[[Network, Objectives, Weights, Tensor, Tensor, Tensor], Weights]


def run(
    gradient: Gradient, learner: Learner, span: Run, writes: Writes, queries: Tensor, carry: Carry
) -> tuple[Tensor, Tensor, Carry]:
    """As `chunkwise.run`; without an anchor every token's signal is computed at the weights of that token."""
    network, levels, _ = learner
    reads, surprises = [], []
    components, anchor = list(carry.components), carry.anchor
    carry = carry._replace(components=components)
    for segment in span.segments:
        for token in range(segment.start, segment.start + segment.length):
            now = carry.now()
            if anchor is None:
                at = now
            else:
                begins = segment.refresh if token == segment.start else None
                at = anchor = anchor if begins is None else _anchored(begins, now, anchor)
            key, value = writes.keys[:, :, token], writes.values[:, :, token]
            recalled = network.forward(key, lambda layer, a, at=at: a @ at[layer]).output
            surprises.append(signals.value(levels[0].objectives, recalled, value))
            for index, level in enumerate(levels):
                gates = writes.gates[level.name]
                products = gradient(network, level.objectives, at, key, value, gates.lr[:, :, token])
                if level.period == 1:
                    components[index] = _apply(components[index], products, gates, token)
                else:
                    before = components[index].pending or [torch.zeros_like(product) for product in products]
                    pending = [a - b for a, b in zip(before, products, strict=True)]
                    components[index] = components[index]._replace(pending=pending)
            now = carry.now()
            asked = queries[:, :, token]
            reads.append(network.forward(asked, lambda layer, a, now=now: a @ now[layer]).output)
        for index, level in enumerate(levels):
            rows, before = segment.fire.get(level.name), components[index]
            if rows is not None:
                gates, last = writes.gates[level.name], segment.start + segment.length - 1
                pending = before.pending or []
                fired = _apply(before, [-step for step in pending], gates, last)
                fired = fired._replace(pending=[torch.zeros_like(step) for step in pending])
                components[index] = choose_rows(rows, fired, before) if rows else fired
    return torch.stack(reads, 2), torch.stack(surprises, 2), carry._replace(anchor=anchor)


def _apply(component: Component, products: Weights, gates: Gates, token: int) -> Component:
    """`S = β S − products`, `Δ = α Δ + S`."""
    keep = 1.0 if gates.log_keep is None else gates.log_keep[:, :, token, None, None].exp()
    beta = 0.0 if gates.log_momentum is None else gates.log_momentum[:, :, token, None, None].exp()
    steps = [-product for product in products]
    if component.momentum is not None:
        steps = [beta * momentum + step for momentum, step in zip(component.momentum, steps, strict=True)]
    return component._replace(
        delta=[keep * delta + step for delta, step in zip(component.delta, steps, strict=True)],
        momentum=None if component.momentum is None else steps,
        keep=None if component.keep is None else component.keep * torch.as_tensor(keep).squeeze((-1, -2)),
    )


def _anchored(rows: Rows, now: Weights, anchor: Weights) -> Weights:
    return choose_weights(torch.tensor(rows), now, anchor) if rows else now


def written_out(
    network: Network, objectives: Objectives, weights: Weights, key: Tensor, value: Tensor, rate: Tensor
) -> Weights:
    """Per layer `Σ_w rate in ⊗ δ`, δ by the written-out backpropagation."""
    forward = network.forward(key, lambda layer, a: a @ weights[layer])
    error = signals.output_error(objectives, forward.output, value)
    deltas = network.backward(error, weights, forward.preactivations)
    return [(rate.unsqueeze(-1) * a).mT @ delta for a, delta in zip(forward.inputs, deltas, strict=True)]


def vmap_grad(
    network: Network, objectives: Objectives, weights: Weights, key: Tensor, value: Tensor, rate: Tensor
) -> Weights:
    """The same by torch.func: the gradient of Σ_w rate · objective."""

    def loss(weights: Weights, key: Tensor, value: Tensor, rate: Tensor) -> Tensor:
        recalled = network.forward(key, lambda layer, a: a @ weights[layer]).output
        return (rate * signals.value(objectives, recalled, value)).sum()

    return vmap(vmap(grad(loss)))(weights, key, value, rate)
