"""Rows of a memory that is written in place, with a gradient that goes back the same way.

A dense memory keeps a copy of itself for every token; here a token keeps the rows that it touched, K of them (Rae et
al. 2016, arXiv 1610.09027, section 3.4). `words` is one buffer, without a gradient of its own, that a loop reads and
writes in order. What autograd follows is `chain`, a tensor of the same shape without storage, which every operation
takes from the one before and hands to the next:

    rows, chain = take(words, chain, slots)      rows = M[slots]
    chain = add(words, chain, slots, rows)       M[slots] += rows         slots may come more than once
    chain = clear(words, chain, slots)           M[slots] = 0

The gradient of `chain` at some point is that of the whole memory at that point. Backward visits the operations from the
last to the first, so one buffer holds it, and each changes the rows that it touched: `take` adds to them, `add` reads
them, `clear` zeroes them. It costs what the forward did. As the chain is single, the gradient that comes in is nobody
else's and is changed in place. A gradient that is not there stays None: until something was read, there is no buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Words = Float[Tensor, "batch slots word"]
Rows = Float[Tensor, "batch rows word"]
RowSlots = Int[Tensor, "batch rows"]


def opened(memory: Words) -> tuple[Words, Words]:
    """`words` and `chain` of a loop that starts from a memory, which is left as it is."""
    return memory.detach().clone(memory_format=torch.contiguous_format), _Open.apply(memory)


def closed(words: Words, chain: Words) -> Words:
    """The memory at the end of a loop: a tensor like any other, in the place of `words`, which are used no more."""
    return _Close.apply(chain, words)


def take(words: Words, chain: Words, slots: RowSlots) -> tuple[Rows, Words]:
    """The rows in these slots."""
    return _Take.apply(chain, words, slots)


def add(words: Words, chain: Words, slots: RowSlots, rows: Rows) -> Words:
    """Adds the rows to these slots."""
    return _Add.apply(chain, words, slots, rows)


def clear(words: Words, chain: Words, slots: RowSlots) -> Words:
    """Empties these slots."""
    return _Clear.apply(chain, words, slots)


def _link(words: Tensor) -> Tensor:
    return words.new_empty(()).expand(words.shape)


def _places(slots: Tensor, words: Tensor) -> Tensor:
    return slots.unsqueeze(-1).expand(-1, -1, words.shape[-1])


class _Open(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, memory: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return _link(memory)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        return gradient


class _Close(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Tensor, words: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return words.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        # The one gradient that comes from outside, and may be somebody else's too.
        return None if gradient is None else gradient.clone(memory_format=torch.contiguous_format), None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Tensor, words: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slots)
        ctx.shape = words.shape
        return words.gather(1, _places(slots, words)), _link(words)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor | None, chain: Tensor | None) -> Any:
        if rows is None:
            return chain, None, None
        if chain is None:
            chain = rows.new_zeros(ctx.shape)
        return chain.scatter_add_(1, _places(ctx.saved_tensors[0], chain), rows), None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Tensor, words: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slots)
        words.scatter_add_(1, _places(slots, words), rows)
        return _link(words)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, chain: Tensor | None) -> Any:
        if chain is None:
            return None, None, None, None
        return chain, None, None, chain.gather(1, _places(ctx.saved_tensors[0], chain))


class _Clear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Tensor, words: Tensor, slots: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slots)
        words.scatter_(1, _places(slots, words), 0.0)
        return _link(words)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, chain: Tensor | None) -> Any:
        if chain is not None:
            chain.scatter_(1, _places(ctx.saved_tensors[0], chain), 0.0)
        return chain, None, None
