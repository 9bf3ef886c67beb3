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

from typing import Any

import optree
import torch
from torch import Tensor

from metamem.memory import signals
from metamem.memory.mnm_loop import Heads, Moment, Read, Row, Rule, Slow, Tokens, Weights, interaction, plain, rate
from metamem.memory.mnm_tape import Slot, Tape, gather, record, slots, through_sigmoid, through_tanh, twice
from metamem.memory.signals import Objectives


def run(rule: Rule, inputs: Tokens, start: Moment, slow: Slow) -> Read:
    """The loop over tokens whose share of the LSTM's gates is `inputs`."""
    # A custom function has no rule for the transforms of torch.func.
    transformed = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]
    if transformed or torch.compiler.is_compiling():
        return plain(rule, inputs, start, slow)
    if torch.is_grad_enabled():
        return Read._make(Loop.apply(rule, inputs, *start, *slow))
    return gather(rule, *record(rule, inputs, start, slow, keep=False))


class Loop(torch.autograd.Function):
    """The loop as one function."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, inputs: Tokens, *rest: Any) -> Any:
        """`Read`, of `Moment` and `Slow`."""
        start, slow = Moment._make(rest[:4]), Slow._make(rest[4:])
        tape, weights = record(rule, inputs, start, slow, keep=True)
        kept: Any = (inputs, start, slow, tape, weights)
        leaves, ctx.structure = optree.tree_flatten(kept)
        ctx.save_for_backward(*leaves)
        ctx.rule = rule
        return tuple(gather(rule, tape, weights))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Of `forward`'s arguments."""
        saved: Any = optree.tree_unflatten(ctx.structure, ctx.saved_tensors)
        inputs, start, slow, tape, weights = saved
        if torch.is_grad_enabled():
            return None, *_by_autograd(ctx, inputs, start, slow, gradients)
        return None, *_Backward(ctx.rule, slow, tape, weights.clone(), Read._make(gradients)).run()


def _by_autograd(
    ctx: Any, inputs: Tokens, start: Moment, slow: Slow, gradients: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """The same, differentiable again."""
    arguments, needed = [inputs, *start, *slow], ctx.needs_input_grad[1:]
    wanted = [argument for argument, need in zip(arguments, needed, strict=True) if need]
    outputs = plain(ctx.rule, inputs, start, slow)
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needed]


class _Backward:
    """The loop from its last token to its first; `weights` are taken back with it, in place.

    - `gates`, `vectors`, `rates`, `targets`   gradients of each token's, before their nonlinearity: slow weights take
                                               theirs over all tokens at once
    - `gradient`         G, the gradient of the weights
    - `left`, `right`    rows z and ẑ of what is still to be added to G, of all keys' reads, the recall, the errors: a
                         pass over the weights costs as much as what it does, so that one adds all that came since G was
                         last read
    """

    def __init__(self, rule: Rule, slow: Slow, tape: Tape, weights: Weights, outer: Read) -> None:
        self.rule, self.slow, self.tape, self.outer = rule, slow, tape, outer
        heads, (layers, batch, _, width) = rule.heads, weights.shape
        self.heads, self.values = heads, slice(2 * heads * width, 3 * heads * width)
        self.layers, self.all_layers = weights.unbind(0), weights.flatten(0, 1)
        self.backs = [layer.mT for layer in self.layers]
        self.gradient = outer.weights.clone(memory_format=torch.contiguous_format)
        self.left, self.right = weights.new_zeros(2, layers, batch, (4 if rule.writing else 2) * heads, width)
        parts = [2 * heads, heads, heads] if rule.writing else [2 * heads]
        self.z_read, *self.z_write = self.left.split(parts, 2)
        self.g_read, *self.g_write = self.right.split(parts, 2)
        self.gates, self.vectors = torch.empty_like(tape.slots.gates), torch.zeros_like(tape.slots.vectors)
        self.vectors[..., self.values] = (
            (outer.values if rule.writing else outer.values + outer.recalled).transpose(0, 1).flatten(2)
        )
        self.rates: list[Row] = []
        self.targets: list[Tensor] = []
        self.work = weights.new_empty(2, layers, batch, heads, width)

    def run(self) -> list[Tensor | None]:
        """The gradients of inputs, `Moment` and `Slow`."""
        tape, outer, rule = self.tape, self.outer, self.rule
        mixed = torch.cat([outer.hidden, outer.read], 2).transpose(0, 1)
        cell, size = outer.cell.clone(), outer.cell.shape[1]
        rewritten, recalled = (x.transpose(0, 1) for x in (outer.rewritten, outer.recalled))
        recurrent = twice(self.slow.recurrent.mT, 4).mT  # of the candidate: 4 σ' of what the tape has doubled
        of_mixed = torch.zeros_like(mixed[0])
        found = list(zip(slots(tape), tape.cell[:-1], self.gates, self.vectors, strict=True))
        for t in range(len(found) - 1, -1, -1):
            one, cell_before, gates, vectors = found[t]
            of_mixed = of_mixed + mixed[t]
            keys = self._read(one, rewritten[t], of_mixed[:, size:])
            if rule.writing:
                keys[:, : self.heads] += self._write(one, recalled[t], vectors)
            end = self.values.start
            through_tanh(keys.flatten(1), one.vectors[:, :end], grad_input=vectors[:, :end])
            through_tanh(vectors[:, end:], one.vectors[:, end:], grad_input=vectors[:, end:])
            hidden = torch.addmm(of_mixed[:, :size], vectors, self.slow.interface)
            cell = _controller(one, hidden, cell, cell_before, gates)
            of_mixed = gates @ recurrent
        self.g_read.zero_()  # added already
        self._add()
        self.gates.chunk(4, -1)[2].mul_(4)
        start = [of_mixed[:, :size], cell, of_mixed[:, size:], self.gradient]
        return [self.gates.transpose(0, 1), *start, *self._slow()]

    def _add(self) -> None:
        """G += left ⊗ right."""
        self.gradient.flatten(0, 1).baddbmm_(self.left.flatten(0, 1).mT, self.right.flatten(0, 1))

    def _read(self, one: Slot, rewritten: Heads, read: Row) -> Heads:
        """Through the read of all keys: of these."""
        top = self.g_read[-1]
        top[:, : self.heads] = rewritten
        torch.mul(read.unsqueeze(1).expand(-1, self.heads, -1), 1 / self.heads, out=top[:, self.heads :])
        self.z_read.copy_(one.passed)
        for layer in range(len(self.layers) - 1, 0, -1):
            back = torch.bmm(self.g_read[layer], self.backs[layer])
            through_tanh(back, one.passed[layer], grad_input=self.g_read[layer - 1])
        keys = torch.bmm(self.g_read[0], self.backs[0])
        self._add()
        return keys

    def _write(self, one: Slot, recalled: Heads, vectors: Row) -> Heads:
        """Through the write: of the write keys. Takes it off the weights, and adds to `vectors`, to the rates and to
        the targets."""
        assert one.below is not None and one.deltas is not None and one.steps is not None
        below, steps, gradient = one.below.flatten(0, 1), one.steps.flatten(0, 1), self.gradient.flatten(0, 1)
        self.all_layers.baddbmm_(below.mT, steps)
        deltas, back = self.work
        torch.bmm(below, gradient, out=deltas.flatten(0, 1))
        torch.bmm(steps, gradient.mT, out=back.flatten(0, 1))  # of z^0 … z^{L−1}, negative
        if one.strength is not None:
            assert self.slow.rate is not None
            share = (one.deltas * deltas).sum((0, 2, 3)).unsqueeze(1) * (-self.rule.level.lr_max / self.heads)
            self.rates.append(through_sigmoid(share, one.strength, grad_input=share))
            torch.mul(share, self.slow.rate, out=vectors[:, self.values.stop :])
        deltas.mul_(rate(self.rule, None if one.strength is None else -one.strength))
        if one.strength is None:
            deltas.neg_()
        z, g = self.z_write[0], self.g_write[0]
        z.copy_(one.below)
        if self.slow.targets is not None:
            back[1:] -= deltas[:-1]
            targets = torch.cat(deltas.unbind(0), -1).neg_()
            self.targets.append(targets)
            of_recalled, of_values = deltas[-1], targets @ self.slow.targets
        else:
            of_recalled, of_values = self._error(one, self._backpropagation(one, deltas, back))
        torch.add(recalled, of_recalled, out=g[-1])
        vectors[:, self.values] += of_values.flatten(1)
        for layer in range(len(self.layers) - 1, 0, -1):
            back[layer].baddbmm_(g[layer], self.backs[layer], beta=-1)
            through_tanh(back[layer], one.below[layer], grad_input=g[layer - 1])
        return back[0].baddbmm_(g[0], self.backs[0], beta=-1)

    def _backpropagation(self, one: Slot, deltas: Tensor, back: Tensor) -> Heads:
        """Through the hidden layers' signals: of the last layer's."""
        assert one.deltas is not None and one.errors is not None and one.below is not None
        errors = self.z_write[1]
        self.g_write[1].copy_(one.deltas)
        for layer in range(1, len(self.layers)):
            z, top = one.below[layer], deltas[layer - 1]
            back[layer].addcmul_(z * one.errors[layer - 1], top, value=2)
            through_tanh(top, z, grad_input=errors[layer])
            deltas[layer].baddbmm_(errors[layer], self.layers[layer])
        return deltas[-1]

    def _error(self, one: Slot, top: Heads) -> tuple[Heads, Heads]:
        """Through the error at the last layer: of what was recalled and of the value."""
        if self.rule.squared is not None:
            error = top if self.rule.squared == 1 else self.rule.squared * top
            return error, -error
        assert one.recalled is not None
        values = interaction(one.vectors, self.heads, top.shape[-1])[1]
        return _through_objectives(self.rule.level.objectives, one.recalled, values, top)

    def _slow(self) -> list[Tensor | None]:
        """Of the slow weights, over all tokens: sums of `gradient ⊗ input`."""
        tape, rest = self.tape, self.tape.slots.vectors[..., self.values.stop :]
        size, width = tape.cell.shape[2], tape.slots.reread.shape[-1]
        values = interaction(tape.slots.vectors, self.heads, width)[1]

        def affine(gradient: Tensor | list[Tensor], inputs: Tensor) -> list[Tensor | None]:
            if not len(gradient):
                return [None, None]
            rows = gradient if isinstance(gradient, Tensor) else torch.stack(gradient[::-1])
            rows = rows.flatten(0, -2)
            return [rows.mT @ inputs.flatten(0, -2), rows.sum(0)]

        return [
            self.gates.flatten(0, 1).mT @ tape.mixed[:-1].flatten(0, 1),
            *affine(self.vectors, tape.mixed[1:, :, :size]),
            *affine(self.rates, rest),
            *affine(self.targets, values),
        ]


def _controller(one: Slot, hidden: Row, cell: Row, before: Row, gates: Tensor) -> Row:
    """Through the LSTM: of c before; of its gates before σ into `gates`, a quarter of the candidate's."""
    admit, keep, _, show = one.gates.chunk(4, 1)
    of_admit, of_keep, of_candidate, of_show = gates.chunk(4, 1)
    squashed = hidden * show
    cell = cell + through_tanh(squashed, one.squashed, grad_input=squashed)
    torch.mul(cell, one.candidate, out=of_admit)
    torch.mul(cell, before, out=of_keep)
    torch.mul(cell, admit, out=of_candidate)
    torch.mul(hidden, one.squashed, out=of_show)
    through_sigmoid(gates, one.gates, grad_input=gates)
    return cell * keep


def _through_objectives(objectives: Objectives, pred: Heads, target: Heads, outer: Heads) -> tuple[Heads, Heads]:
    with torch.enable_grad():
        pred, target = (x.detach().requires_grad_() for x in (pred, target))
        error = signals.output_error(objectives, pred, target)
        of_pred, of_target = torch.autograd.grad(error, (pred, target), outer, materialize_grads=True)
    return of_pred, of_target
