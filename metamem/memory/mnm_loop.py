"""The loop of Metalearned Neural Memory over tokens, as autograd, torch.func and torch.compile take it; `mnm` has its
equations, `mnm_tape` the same loop in place, with what its written-out gradient needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from metamem.memory import signals
from metamem.memory.level import TokenLevel

Row = Float[Tensor, "batch _features"]
Heads = Float[Tensor, "batch _heads width"]
Weights = Float[Tensor, "layers batch width width"]
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


def plain(rule: Rule, inputs: Tokens, start: Moment, slow: Slow) -> Read:
    """The loop over tokens whose share of the LSTM's gates is `inputs`."""
    found, now = [], start
    for gates in inputs.unbind(1):
        outputs, now = token(rule, gates, now, slow)
        found.append(outputs)
    return Read(*(torch.stack(column, 1) for column in zip(*found, strict=True)), now.cell, now.weights)  # pyright: ignore[reportArgumentType, reportCallIssue]


def token(rule: Rule, gates: Row, now: Moment, slow: Slow) -> tuple[tuple[Tensor, ...], Moment]:
    """One token, `gates` its share of the LSTM's: the controller moves, writes, and reads. The first five of `Read`."""
    width, heads = now.read.shape[1], rule.heads
    gates = torch.addmm(gates, torch.cat([now.hidden, now.read], 1), slow.recurrent.mT)
    admit, keep, candidate, show = gates.chunk(4, 1)
    cell = torch.sigmoid(keep) * now.cell + torch.sigmoid(admit) * torch.tanh(candidate)
    hidden = torch.sigmoid(show) * torch.tanh(cell)
    vectors = torch.tanh(torch.addmm(slow.interface_bias, hidden, slow.interface.mT))
    keys, values = interaction(vectors, heads, width)
    weights, recalled = now.weights, values
    if rule.writing:
        below = forward(keys[:, :heads], weights)
        deltas = signal(rule, below, values, weights, slow)
        strength = None
        if slow.rate is not None and slow.rate_bias is not None:
            strength = torch.sigmoid(torch.addmm(slow.rate_bias, vectors[:, 3 * heads * width :], slow.rate.mT))
        steps = rate(rule, strength) * torch.stack(deltas)
        weights, recalled = weights - torch.stack(below[:-1]).mT @ steps, below[-1]
    passed = forward(keys, weights)[-1]
    read = passed[:, heads:].mean(1)
    return (hidden, read, recalled, passed[:, :heads], values), Moment(hidden, cell, read, weights)


def interaction(
    vectors: Float[Tensor, "*batch features"], heads: int, width: int
) -> tuple[Float[Tensor, "*batch two_heads width"], Float[Tensor, "*batch heads width"]]:
    """Keys (write keys, then read keys) and written values."""
    keys, values = vectors[..., : 2 * heads * width], vectors[..., 2 * heads * width : 3 * heads * width]
    return keys.unflatten(-1, (2 * heads, width)), values.unflatten(-1, (heads, width))


def forward(keys: Heads, weights: Weights) -> list[Heads]:
    """`[z^0, …, z^L]`: the keys, and each layer's output."""
    *inner, last = weights.unbind(0)
    passed = [keys]
    for weight in inner:
        passed.append(torch.tanh(torch.bmm(passed[-1], weight)))
    return [*passed, torch.bmm(passed[-1], last)]


def signal(rule: Rule, below: list[Heads], values: Heads, weights: Weights, slow: Slow) -> list[Heads]:
    """δ of each layer."""
    if slow.targets is not None:
        targets = functional.linear(values, slow.targets, slow.targets_bias).chunk(len(weights), -1)
        return [z - target for z, target in zip(below[1:], targets, strict=True)]
    deltas = [signals.output_error(rule.level.objectives, below[-1], values)]
    for layer in range(len(weights) - 1, 0, -1):
        error = torch.bmm(deltas[-1], weights[layer].mT)
        deltas.append(error * (1 - below[layer].square()))
    return deltas[::-1]


def rate(rule: Rule, strength: Float[Tensor, "batch 1"] | None) -> Float[Tensor, "batch 1 1"] | float:
    """η / heads, of σ of the rate: the writes of a token's heads are averaged."""
    if strength is None:
        return float(rule.level.lr) / rule.heads
    return (rule.level.lr_max / rule.heads) * strength.unsqueeze(-1)
