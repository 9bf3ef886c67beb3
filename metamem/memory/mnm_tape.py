"""MNM's loop in place, and the tape of it that `mnm_gradient` runs backward.

Everything that a token computes goes where it stays, in tensors of all tokens that are made once, so that nothing is
stacked or copied afterwards; the weights are one copy, written in place. tanh is 2 σ(2x) − 1, its argument doubled
where it is made: on the CPU torch takes four times as long for its own. Nothing here is seen by autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from metamem.memory import signals
from metamem.memory.mnm_loop import Heads, Moment, Read, Row, Rule, Slow, Tokens, Weights, interaction, rate

Layers = Float[Tensor, "layers batch _heads width"]

through_tanh = torch.ops.aten.tanh_backward.grad_input  # (gradient of tanh(x), tanh(x)) -> gradient of x
through_sigmoid = torch.ops.aten.sigmoid_backward.grad_input


class Slot(NamedTuple):
    """What a token computed, less the weights, which its steps can be taken off of again; None where nothing writes.

    `gates`: σ of the LSTM's four (its third of twice); `candidate`: tanh of its third; `squashed`: tanh(c); `vectors`:
    the interaction vectors; `passed`: z^0 … z^{L−1} of all keys under the new weights, `reread` their z^L; `below`,
    `recalled`: the same of the write keys under the old ones; `errors`: δ^{l+1} W^{l+1}ᵀ of backpropagation; `deltas`:
    δ of all layers; `strength`: σ of the rate; `steps`: η δ / heads.
    """

    gates: Row
    candidate: Row
    squashed: Row
    vectors: Row
    passed: Layers
    reread: Heads
    below: Layers | None
    recalled: Heads | None
    errors: Layers | None
    deltas: Layers | None
    strength: Row | None
    steps: Layers | None


class Tape(NamedTuple):
    """`mixed`: [h; r] and `cell`: c before the first token and after each; a `Slot` of tensors over all tokens."""

    mixed: Float[Tensor, "one_more batch _mixed"]
    cell: Float[Tensor, "one_more batch hidden"]
    slots: Slot


def record(rule: Rule, inputs: Tokens, start: Moment, slow: Slow, keep: bool) -> tuple[Tape, Weights]:
    """The loop, and the weights after it; without `keep`, a tape that holds only what `gather` takes."""
    size, heads, width = start.hidden.shape[1], rule.heads, start.read.shape[1]
    tape = _blank(rule, inputs, start, slow, keep)
    torch.cat([start.hidden, start.read], 1, out=tape.mixed[0])
    tape.cell[0].copy_(start.cell)
    gates = twice(inputs.transpose(0, 1), 2)
    recurrent, interface = twice(slow.recurrent.mT, 2), slow.interface.mT
    weights = start.weights.clone(memory_format=torch.contiguous_format)
    layers, all_layers = weights.unbind(0), weights.flatten(0, 1)
    backs = [layer.mT for layer in layers]
    minus = inputs.new_tensor(-1.0)

    def tanh(halves: Tensor, out: Tensor) -> Tensor:
        """Of half of what is given, which is overwritten."""
        return torch.add(minus, halves.sigmoid_(), alpha=2, out=out)

    def forward(passed: Sequence[Tensor], last: Tensor) -> None:
        """z^1 … z^L, behind z^0."""
        for layer, before, after in zip(layers, passed[:-1], passed[1:], strict=False):
            tanh(after.baddbmm_(before, layer, beta=0, alpha=2), after)
        torch.bmm(passed[-1], layers[-1], out=last)

    def write(one: Slot, write_keys: Tensor, values: Tensor) -> None:
        """Of each layer `z ⊗ η δ / heads`, taken off the weights."""
        assert one.below is not None and one.recalled is not None and one.deltas is not None and one.steps is not None
        below, deltas = one.below.unbind(0), one.deltas.unbind(0)
        below[0].copy_(write_keys)
        forward(below, one.recalled)
        if slow.targets is not None:
            targets = functional.linear(values, slow.targets, slow.targets_bias).chunk(len(layers), -1)
            for z, target, delta in zip([*below[1:], one.recalled], targets, deltas, strict=True):
                torch.sub(z, target, out=delta)
        else:
            output_error(rule, one.recalled, values, deltas[-1])
            for layer in range(len(layers) - 1, 0, -1):
                assert one.errors is not None
                error = torch.bmm(deltas[layer], backs[layer], out=one.errors[layer - 1])
                through_tanh(error, below[layer], grad_input=deltas[layer - 1])
        if one.strength is not None:
            assert slow.rate is not None and slow.rate_bias is not None
            rest = one.vectors[:, 3 * heads * width :]
            torch.addmm(slow.rate_bias, rest, slow.rate.mT, out=one.strength).sigmoid_()
        torch.mul(one.deltas, rate(rule, one.strength), out=one.steps)
        all_layers.baddbmm_(one.below.flatten(0, 1).mT, one.steps.flatten(0, 1), alpha=-1)

    steps = zip(
        gates.unbind(0), tape.mixed[:-1], tape.mixed[1:], tape.cell[:-1], tape.cell[1:], slots(tape), strict=True
    )
    for given, mixed, after, cell, cell_after, one in steps:
        torch.addmm(given, mixed, recurrent, out=one.gates).sigmoid_()
        admit, keep_cell, candidate, show = one.gates.chunk(4, 1)
        torch.add(minus, candidate, alpha=2, out=one.candidate)
        torch.mul(keep_cell, cell, out=cell_after).addcmul_(admit, one.candidate)
        tanh(torch.mul(cell_after, 2, out=one.squashed), one.squashed)
        hidden = torch.mul(show, one.squashed, out=after[:, :size])
        tanh(torch.addmm(slow.interface_bias, hidden, interface, beta=2, alpha=2, out=one.vectors), one.vectors)
        keys, values = interaction(one.vectors, heads, width)
        if rule.writing:
            write(one, keys[:, :heads], values)
        passed = one.passed.unbind(0)
        passed[0].copy_(keys)
        forward(passed, one.reread)
        torch.mean(one.reread[:, heads:], 1, out=after[:, size:])
    return tape, weights


def output_error(rule: Rule, pred: Heads, target: Heads, out: Heads) -> None:
    """∂ objective / ∂ pred, into `out`."""
    if rule.squared is None:
        out.copy_(signals.output_error(rule.level.objectives, pred, target))
    elif rule.squared == 1:
        torch.sub(pred, target, out=out)
    else:
        torch.sub(pred, target, out=out).mul_(rule.squared)


def twice(gates: Float[Tensor, "*rows four_hidden"], factor: float) -> Float[Tensor, "*rows four_hidden"]:
    """The third of four parts times a factor: the candidate's, whose tanh is made of the σ of twice as much."""
    scaled = gates.clone(memory_format=torch.contiguous_format)
    scaled.chunk(4, -1)[2].mul_(factor)
    return scaled


def slots(tape: Tape) -> Iterator[Slot]:
    """One token's after the other."""
    parts: list[Any] = [repeat(None) if part is None else part.unbind(0) for part in tape.slots]
    return (Slot(*one) for one in zip(*parts, strict=False))


def gather(rule: Rule, tape: Tape, weights: Weights) -> Read:
    """The loop's outputs."""
    size, heads, width = tape.cell.shape[2], rule.heads, tape.slots.reread.shape[-1]
    values = interaction(tape.slots.vectors, heads, width)[1]
    recalled = values if tape.slots.recalled is None else tape.slots.recalled
    columns = tape.mixed[1:, :, :size], tape.mixed[1:, :, size:], recalled, tape.slots.reread[:, :, :heads], values
    hidden, read, recalled, rewritten, values = (
        column.transpose(0, 1).clone(memory_format=torch.contiguous_format) for column in columns
    )
    return Read(hidden, read, recalled, rewritten, values, tape.cell[-1].clone(), weights)


def _blank(rule: Rule, inputs: Tokens, start: Moment, slow: Slow, keep: bool) -> Tape:
    batch, tokens, _ = inputs.shape
    layers, heads, width = len(start.weights), rule.heads, start.read.shape[1]

    def made(*shape: int) -> Tensor:
        return inputs.new_empty(tokens, *shape)

    def kept(*shape: int) -> Tensor:
        """One place for all tokens where nobody asks for it later."""
        return made(*shape) if keep else inputs.new_empty(1, *shape).expand(tokens, *([-1] * len(shape)))

    def written(*shape: int) -> Tensor | None:
        return kept(*shape) if rule.writing else None

    size = start.hidden.shape[1]
    of_layers = (layers, batch, heads, width)
    return Tape(
        inputs.new_empty(tokens + 1, batch, size + width),
        inputs.new_empty(tokens + 1, batch, size),
        Slot(
            gates=kept(batch, 4 * size),
            candidate=kept(batch, size),
            squashed=kept(batch, size),
            vectors=made(batch, len(slow.interface)),
            passed=kept(layers, batch, 2 * heads, width),
            reread=made(batch, 2 * heads, width),
            below=written(*of_layers),
            recalled=made(batch, heads, width) if rule.writing else None,
            errors=written(layers - 1, *of_layers[1:]) if slow.targets is None else None,
            deltas=written(*of_layers),
            strength=written(batch, 1) if slow.rate is not None else None,
            steps=written(*of_layers),
        ),
    )
