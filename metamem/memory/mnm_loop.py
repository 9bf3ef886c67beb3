"""The loop of Metalearned Neural Memory over tokens; `mnm` has its equations, `mnm_gradient` its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from metamem.memory import signals
from metamem.memory.level import TokenLevel

Row = Float[Tensor, "batch _features"]
Heads = Float[Tensor, "batch _heads width"]
Layers = Float[Tensor, "layers batch _heads width"]
Weights = Float[Tensor, "layers batch width width"]
Targets = Float[Tensor, "batch heads layers_width"]
Tokens = Float[Tensor, "batch tokens _features"]


class Rule(NamedTuple):
    """What the loop does at a token: the level's signal and rate, the heads, whether they write. `squared`: the c of an
    error that is c (pred − target), None of any other."""

    level: TokenLevel
    heads: int
    writing: bool
    squared: float | None


class Slow(NamedTuple):
    """Slow weights, as torch.nn.Linear has them: of `[h; r]` to the LSTM's gates, of h to the interaction vectors, of
    β' to the rate, of written values to the layers' targets."""

    recurrent: Tensor
    interface: Tensor
    interface_bias: Tensor
    rate: Tensor | None
    rate_bias: Tensor | None
    targets: Tensor | None
    targets_bias: Tensor | None


class Moment(NamedTuple):
    """What goes from token to token: h, c, the last read, the memory's weights."""

    hidden: Row
    cell: Row
    read: Row
    weights: Weights


class Trace(NamedTuple):
    """What a token computed, less the weights, which its steps can be taken off of again.

    `mixed`: [h; r] before it; `cell`: c before it; `gates`: σ of the LSTM's four; `candidate`: tanh of its third;
    `squashed`: tanh(c); `vectors`: the interaction vectors; `strength`: σ of the rate; `below`: z^0 … z^L of the write
    keys; `errors`: δ^{l+1} W^{l+1}ᵀ of backpropagation; `deltas`: δ of all layers; `steps`: η δ / heads; `passed`:
    z^0 … z^L of all keys under the new weights.
    """

    mixed: Row
    cell: Row
    gates: Row
    candidate: Row
    squashed: Row
    vectors: Row
    strength: Tensor | None
    below: list[Heads]
    errors: list[Heads]
    deltas: Layers | None
    steps: Layers | None
    passed: list[Heads]
    hidden: Row
    read: Row


class Read(NamedTuple):
    """The loop's outputs over all tokens: h, r; by head, what the write keys recalled before and after the write, and
    the values written; then c and the weights after the last token."""

    hidden: Tokens
    read: Tokens
    recalled: Float[Tensor, "batch tokens heads width"]
    rewritten: Float[Tensor, "batch tokens heads width"]
    values: Float[Tensor, "batch tokens heads width"]
    cell: Row
    weights: Weights


def trace(rule: Rule, inputs: Tokens, start: Moment, slow: Slow, overwrite: bool) -> tuple[list[Trace], Moment]:
    """Every token's, in order, and what is left at the end; `overwrite`: the weights of `start`, in place."""
    found, now = [], start
    for gates in inputs.unbind(1):
        one, now = token(rule, gates, now, slow, overwrite)
        found.append(one)
    return found, now


def token(rule: Rule, gates: Row, now: Moment, slow: Slow, overwrite: bool) -> tuple[Trace, Moment]:
    """One token, `gates` its share of the LSTM's: the controller moves, writes, and reads."""
    size, width = now.hidden.shape[1], now.read.shape[1]
    mixed = torch.cat([now.hidden, now.read], 1)
    gates = torch.addmm(gates, mixed, slow.recurrent.mT)
    candidate, gates = tanh(gates[:, 2 * size : 3 * size]), torch.sigmoid(gates)
    admit, keep, _, show = gates.chunk(4, 1)
    cell = torch.addcmul(keep * now.cell, admit, candidate)
    squashed = tanh(cell)
    hidden = show * squashed
    vectors = tanh(torch.addmm(slow.interface_bias, hidden, slow.interface.mT))
    keys, values = interaction(vectors, rule.heads, width)
    weights, below, errors, deltas, steps, strength = now.weights, [], [], None, None, None
    if rule.writing:
        below = forward(keys[:, : rule.heads], weights)
        errors, deltas = signal(rule, below, values, weights, slow)
        if slow.rate is not None and slow.rate_bias is not None:
            strength = torch.sigmoid(torch.addmm(slow.rate_bias, vectors[:, 3 * rule.heads * width :], slow.rate.mT))
        steps = rate(rule, strength) * deltas
        weights = write(weights, torch.stack(below[:-1]), steps, -1, overwrite)
    passed = forward(keys, weights)
    read = passed[-1][:, rule.heads :].mean(1)
    lstm = mixed, now.cell, gates, candidate, squashed
    one = Trace(*lstm, vectors, strength, below, errors, deltas, steps, passed, hidden, read)
    return one, Moment(hidden, cell, read, weights)


def tanh(x: Tensor) -> Tensor:
    """2 σ(2x) − 1: on the CPU torch takes four times as long for its own."""
    return torch.rsub(torch.sigmoid(2 * x), -1.0, alpha=-2.0)


def interaction(vectors: Row, heads: int, width: int) -> tuple[Heads, Heads]:
    """Keys (write keys, then read keys) and written values."""
    keys, values = vectors[:, : 2 * heads * width], vectors[:, 2 * heads * width : 3 * heads * width]
    return keys.unflatten(1, (2 * heads, width)), values.unflatten(1, (heads, width))


def forward(keys: Heads, weights: Weights) -> list[Heads]:
    """`[z^0, …, z^L]`: the keys, and each layer's output."""
    *inner, last = weights.unbind(0)
    passed = [keys]
    for weight in inner:
        passed.append(tanh(torch.bmm(passed[-1], weight)))
    return [*passed, torch.bmm(passed[-1], last)]


def signal(rule: Rule, below: list[Heads], values: Heads, weights: Weights, slow: Slow) -> tuple[list[Heads], Layers]:
    """δ of each layer, and what backpropagation brings each hidden layer before its slope, δ^{l+1} W^{l+1}ᵀ."""
    if slow.targets is not None:
        targets = functional.linear(values, slow.targets, slow.targets_bias).chunk(len(weights), -1)
        return [], torch.stack([z - target for z, target in zip(below[1:], targets, strict=True)])
    deltas, errors = [signals.output_error(rule.level.objectives, below[-1], values)], []
    for layer in range(len(weights) - 1, 0, -1):
        errors.append(torch.bmm(deltas[-1], weights[layer].mT))
        deltas.append(torch.addcmul(errors[-1], errors[-1] * below[layer], below[layer], value=-1))
    return errors[::-1], torch.stack(deltas[::-1])


def rate(rule: Rule, strength: Tensor | None) -> Tensor | float:
    """η / heads: the writes of a token's heads are averaged."""
    if strength is None:
        return float(rule.level.lr) / rule.heads
    return (rule.level.lr_max / rule.heads) * strength.unsqueeze(-1)


def write(weights: Weights, inputs: Layers, signals: Layers, sign: int, overwrite: bool = True) -> Weights:
    """`weights + sign · inputs ⊗ signals`, summed over heads; all layers in one product."""
    both = inputs.flatten(0, 1).mT, signals.flatten(0, 1)
    if overwrite:
        weights.flatten(0, 1).baddbmm_(*both, alpha=sign)
        return weights
    return torch.baddbmm(weights.flatten(0, 1), *both, alpha=sign).unflatten(0, weights.shape[:2])


def gather(rule: Rule, traces: Sequence[Trace], end: Moment) -> Read:
    """The loop's outputs, from what its tokens computed."""
    values = [interaction(one.vectors, rule.heads, end.read.shape[1])[1] for one in traces]
    columns = (
        [one.hidden for one in traces],
        [one.read for one in traces],
        [one.below[-1] for one in traces] if rule.writing else values,
        [one.passed[-1][:, : rule.heads] for one in traces],
        values,
    )
    return Read._make([*(torch.stack(column, 1) for column in columns), end.cell, end.weights])
