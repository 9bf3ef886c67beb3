"""The gradient of MNM's loop, written out.

A token takes some forty small products and point-wise steps; autograd would keep book of each, and keep each token's
weights. So the loop is one differentiable function. `Loop` writes one copy of the weights in place and keeps the rest
of what its tokens computed; its backward goes from the last token to the first, takes each token's write off the
weights again, adds all that reaches a layer's weights into one G^l, and takes the gradients of the slow weights over
all tokens at once. With W' the weights after a token's write and a hat for the gradient of what wears it:

    read     G^l += z^{l−1} ⊗ ẑ^l,   ẑ^{l−1} = ẑ^l W'^lᵀ                     z of all keys, through tanh' at each layer
    write    δ̂^l = −η z^{l−1} G^l,   η̂ = −Σ δ^l · z^{l−1} G^l,   ẑ^{l−1} = −η δ^l G^lᵀ          z of the write keys now
    signal   of δ^l = e^l ⊙ (1 − z²), e^l = δ^{l+1} W^{l+1}ᵀ:   ê = δ̂ ⊙ (1 − z²),   ẑ −= 2 z e δ̂,
             δ̂^{l+1} += ê^l W^{l+1},   G^{l+1} += ê^l ⊗ δ^{l+1}
    recall   G^l += z^{l−1} ⊗ ẑ^l,   ẑ^{l−1} += ẑ^l W^lᵀ

Where gradients of this gradient are asked for, and under torch.compile and torch.func, autograd differentiates the
loop itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from metamem.memory import signals
from metamem.memory.mnm_loop import (
    Heads,
    Layers,
    Moment,
    Read,
    Row,
    Rule,
    Slow,
    Targets,
    Tokens,
    Trace,
    Weights,
    gather,
    interaction,
    rate,
    trace,
    write,
)
from metamem.memory.signals import Objectives

through_tanh = torch.ops.aten.tanh_backward  # (gradient of tanh(x), tanh(x)) -> gradient of x
through_sigmoid = torch.ops.aten.sigmoid_backward


def run(rule: Rule, inputs: Tokens, start: Moment, slow: Slow) -> Read:
    """The loop over tokens whose share of the LSTM's gates is `inputs`."""
    # A custom function has no rule for the transforms of torch.func.
    transformed = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]
    if transformed or torch.compiler.is_compiling():
        return _plain(rule, inputs, start, slow)
    if torch.is_grad_enabled():
        return Read._make(Loop.apply(rule, inputs, *start, *slow))
    copy = start._replace(weights=start.weights.clone(memory_format=torch.contiguous_format))
    return gather(rule, *trace(rule, inputs, copy, slow, overwrite=True))


def _plain(rule: Rule, inputs: Tokens, start: Moment, slow: Slow) -> Read:
    return gather(rule, *trace(rule, inputs, start, slow, overwrite=False))


class Loop(torch.autograd.Function):
    """The loop as one function."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, inputs: Tokens, *rest: Any) -> Any:
        """`Read`, of `Moment` and `Slow`."""
        start, slow = Moment._make(rest[:4]), Slow._make(rest[4:])
        copy = start._replace(weights=start.weights.clone(memory_format=torch.contiguous_format))
        traces, end = trace(rule, inputs, copy, slow, overwrite=True)
        kept: Any = (inputs, start, slow, traces, end.weights)
        leaves, ctx.structure = optree.tree_flatten(kept)
        ctx.save_for_backward(*leaves)
        ctx.rule = rule
        return tuple(gather(rule, traces, end))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Of `forward`'s arguments."""
        saved: Any = optree.tree_unflatten(ctx.structure, ctx.saved_tensors)
        inputs, start, slow, traces, weights = saved
        if torch.is_grad_enabled():
            return None, *_by_autograd(ctx, inputs, start, slow, gradients)
        return None, *_written_out(ctx.rule, slow, traces, weights.clone(), Read._make(gradients))


def _by_autograd(
    ctx: Any, inputs: Tokens, start: Moment, slow: Slow, gradients: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """The same, differentiable again."""
    arguments, needed = [inputs, *start, *slow], ctx.needs_input_grad[1:]
    wanted = [argument for argument, need in zip(arguments, needed, strict=True) if need]
    outputs = _plain(ctx.rule, inputs, start, slow)
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needed]


class Gained(NamedTuple):
    """What a token's outputs gain: the first five of `Read`, at the token."""

    hidden: Row
    read: Row
    recalled: Heads
    rewritten: Heads
    values: Heads


class Later(NamedTuple):
    """Gradients of a token that slow weights take over all tokens at once: of its gates, interaction vectors, rate and
    targets, each before its nonlinearity."""

    gates: Row
    vectors: Row
    rate: Row | None
    targets: Targets | None


class Gathered(NamedTuple):
    """The gradient of the weights, and products z ⊗ ẑ that are still to be added to it: a pass over the weights costs
    as much as what it does, so that one adds all that came since G was last read."""

    sum: Weights
    products: list[tuple[Layers, Layers]]

    def add(self, inputs: Layers, gradients: Layers) -> None:
        """G += inputs ⊗ gradients."""
        self.products.append((inputs, gradients))

    def now(self) -> Weights:
        """G."""
        if self.products:
            inputs, gradients = zip(*self.products, strict=True)
            write(self.sum, torch.cat(inputs, 2), torch.cat(gradients, 2), 1)
            self.products.clear()
        return self.sum


def _written_out(rule: Rule, slow: Slow, traces: list[Trace], weights: Weights, outer: Read) -> list[Tensor | None]:
    hidden, read, cell = torch.zeros_like(outer.hidden[:, 0]), torch.zeros_like(outer.read[:, 0]), outer.cell
    gradient = Gathered(outer.weights.clone(memory_format=torch.contiguous_format), [])
    later: list[Later] = []
    for index in range(len(traces) - 1, -1, -1):
        one, gained = traces[index], Gained._make(part[:, index] for part in outer[:5])
        hidden, read = hidden + gained.hidden, read + gained.read
        vectors, strength, targets = _memory(rule, slow, one, read, gained, weights, gradient)
        vectors = through_tanh(vectors, one.vectors)
        gates, cell = _controller(one, torch.addmm(hidden, vectors, slow.interface), cell)
        hidden, read = (gates @ slow.recurrent).split([hidden.shape[1], read.shape[1]], 1)
        later.append(Later(gates, vectors, strength, targets))
    later.reverse()
    inputs = torch.stack([one.gates for one in later], 1)
    return [inputs, hidden, cell, read, gradient.now(), *_slow(rule, traces, later)]


def _controller(one: Trace, hidden: Row, cell: Row) -> tuple[Row, Row]:
    """Through the LSTM: of its gates before σ and tanh, and of c before."""
    admit, keep, _, show = one.gates.chunk(4, 1)
    cell = cell + through_tanh(hidden * show, one.squashed)
    gates = torch.cat([cell * one.candidate, cell * one.cell, cell * admit, hidden * one.squashed], 1)
    size = hidden.shape[1]
    candidate = through_tanh(gates[:, 2 * size : 3 * size], one.candidate)
    gates = through_sigmoid(gates, one.gates)
    gates[:, 2 * size : 3 * size] = candidate
    return gates, cell * keep


def _memory(
    rule: Rule,
    slow: Slow,
    one: Trace,
    read: Row,
    gained: Gained,
    weights: Weights,
    gradient: Gathered,
) -> tuple[Row, Row | None, Targets | None]:
    """Through read and write: of the interaction vectors, of the rate before σ, of the targets. Takes the write off
    `weights` and adds to `gradient`."""
    heads, strength, targets = rule.heads, None, None
    keys = torch.cat([gained.rewritten, (read / heads).unsqueeze(1).expand(-1, heads, -1)], 1)
    keys = _recall(keys, one.passed, weights, gradient)
    parts = [keys.flatten(1)]
    if rule.writing:
        written, values, strength, targets = _write(rule, slow, one, gained, weights, gradient)
        keys[:, :heads] += written
    else:
        values = gained.values + gained.recalled  # nothing was recalled: the values stand in for it
    parts.append(values.flatten(1))
    if slow.rate is not None:
        parts.append(torch.zeros_like(read) if strength is None else strength @ slow.rate)
    return torch.cat(parts, 1), strength, targets


def _recall(
    top: Heads, passed: list[Heads], weights: Weights, gradient: Gathered, added: Layers | None = None
) -> Heads:
    """Through a pass of keys, from the gradient of its output; `added`: what else reaches z^0 … z^{L−1}."""
    tops = [top]
    for layer in range(len(weights) - 1, 0, -1):
        back = weights[layer].mT
        top = torch.bmm(top, back) if added is None else torch.baddbmm(added[layer], top, back)
        top = through_tanh(top, passed[layer])
        tops.append(top)
    gradient.add(torch.stack(passed[:-1]), torch.stack(tops[::-1]))
    back = weights[0].mT
    return torch.bmm(top, back) if added is None else torch.baddbmm(added[0], top, back)


def _write(
    rule: Rule, slow: Slow, one: Trace, gained: Gained, weights: Weights, gradient: Gathered
) -> tuple[Heads, Heads, Row | None, Targets | None]:
    """Through the write: of the write keys, the values, the rate before σ, the targets."""
    assert one.deltas is not None and one.steps is not None
    inputs = torch.stack(one.below[:-1])
    write(weights, inputs, one.steps, 1)
    of_weights = gradient.now().flatten(0, 1)
    moved = torch.bmm(inputs.flatten(0, 1), of_weights).view_as(inputs)
    below = torch.bmm(one.steps.flatten(0, 1), of_weights.mT).view_as(inputs).neg_()
    deltas = moved * rate(rule, None if one.strength is None else -one.strength)
    if one.strength is None:
        deltas.neg_()
    strength, targets = None, None
    if one.strength is not None:
        share = torch.linalg.vecdot(one.deltas, moved).sum((0, 2)).unsqueeze(1) * (-rule.level.lr_max / rule.heads)
        strength = through_sigmoid(share, one.strength)
    if slow.targets is not None:
        below[1:] += deltas[:-1]
        targets = torch.cat(deltas.unbind(0), -1).neg_()
        recalled, values = gained.recalled + deltas[-1], gained.values + targets @ slow.targets
    else:
        top = _backpropagation(one, deltas, below, weights, gradient)
        of_recalled, of_values = _error(rule, one, top)
        recalled, values = gained.recalled + of_recalled, gained.values + of_values
    return _recall(recalled, one.below, weights, gradient, below), values, strength, targets


def _backpropagation(one: Trace, deltas: Layers, below: Layers, weights: Weights, gradient: Gathered) -> Heads:
    """Through the hidden layers' signals: of the last layer's. Adds to `below` and `gradient`."""
    assert one.deltas is not None
    top, errors = deltas[0], []
    for layer, error in enumerate(one.errors, start=1):
        z = one.below[layer]
        below[layer].addcmul_(z * error, top, value=-2)
        errors.append(through_tanh(top, z))
        top = torch.baddbmm(deltas[layer], errors[-1], weights[layer])
    if errors:
        gradient.add(torch.stack([torch.zeros_like(top), *errors]), one.deltas)
    return top


def _error(rule: Rule, one: Trace, outer: Heads) -> tuple[Heads, Heads]:
    """Through the error at the last layer: of what was recalled and of the value."""
    if rule.squared is not None:
        error = rule.squared * outer
        return error, -error
    values = interaction(one.vectors, rule.heads, outer.shape[-1])[1]
    return _through_objectives(rule.level.objectives, one.below[-1], values, outer)


def _through_objectives(objectives: Objectives, pred: Heads, target: Heads, outer: Heads) -> tuple[Heads, Heads]:
    with torch.enable_grad():
        pred, target = (x.detach().requires_grad_() for x in (pred, target))
        error = signals.output_error(objectives, pred, target)
        of_pred, of_target = torch.autograd.grad(error, (pred, target), outer, materialize_grads=True)
    return of_pred, of_target


def _slow(rule: Rule, traces: list[Trace], later: list[Later]) -> list[Tensor | None]:
    """Of the slow weights, over all tokens: sums of `gradient ⊗ input`."""
    width = traces[0].read.shape[1]

    def over_tokens(rows: list[Tensor]) -> Tensor:
        return torch.cat(rows).flatten(0, -2)

    def affine(rows: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
        if not rows:
            return [None, None]
        gradient = over_tokens(rows)
        return [gradient.mT @ over_tokens(inputs), gradient.sum(0)]

    gates = over_tokens([one.gates for one in later])
    rests = [one.vectors[:, 3 * rule.heads * width :] for one in traces]
    values = [interaction(one.vectors, rule.heads, width)[1] for one in traces]
    return [
        gates.mT @ over_tokens([one.mixed for one in traces]),
        *affine([one.vectors for one in later], [one.hidden for one in traces]),
        *affine([one.rate for one in later if one.rate is not None], rests),
        *affine([one.targets for one in later if one.targets is not None], values),
    ]
