"""Recomputation: a function whose graph is not kept, but made anew in the backward pass.

`torch.utils.checkpoint` does that for a function that takes no gradients itself. One that does, as an inner loop, it
would run once more for each of them: what it needs of its own graph is already given away. Here the function runs
without an outer graph, and again with one in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states


def recomputed(function: Callable[..., Any], parameters: Sequence[Tensor], *arguments: Any) -> Any:
    """`function(*arguments)`, trees of tensors, differentiable in the tensors among the arguments and in `parameters`,
    those that the function uses besides. Must be a function: equal arguments give equal values."""
    call = _Call(function, arguments)
    return call.result(_Recomputed.apply(call, len(parameters), *parameters, *call.tensors()))


class _Call:
    """A function from trees to a tree as one from tensors to tensors: what is no tensor stands beside."""

    def __init__(self, function: Callable[..., Any], arguments: Any) -> None:
        self.function = function
        self.leaves, self.tree = optree.tree_flatten(arguments)
        self.after: tuple[list[Any], Any] | None = None

    def tensors(self) -> list[Tensor]:
        """Those among the arguments, which are then kept here no longer."""
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return tensors

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        values, tree = optree.tree_flatten(self.function(*_filled(self.leaves, tensors, self.tree)))
        self.after = [_TENSOR if isinstance(value, Tensor) else value for value in values], tree
        return [value for value in values if isinstance(value, Tensor)]

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """The tree of the last call, with these tensors in it."""
        assert self.after is not None
        return _filled(self.after[0], tensors, self.after[1])


_TENSOR = object()  # where a tensor goes


def _filled(leaves: Sequence[Any], tensors: Sequence[Tensor], tree: Any) -> Any:
    given = iter(tensors)
    return optree.tree_unflatten(tree, [next(given) if leaf is _TENSOR else leaf for leaf in leaves])


def _alone(tensor: Tensor) -> Tensor:
    """The tensor without the longer buffer that it may be a part of, and would keep alive."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        kind = tensors[0].device.type
        ctx.call, ctx.parameters = call, tensors[:count]  # no part of a graph: they are there anyway
        ctx.random = torch.get_rng_state(), *get_device_states(*tensors)
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])
        outputs = [_alone(output) for output in call(tensors[count:])]
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [*ctx.parameters, *(tensor.detach() for tensor in ctx.saved_tensors)]
        arguments = inputs[len(ctx.parameters) :]
        for tensor, need in zip(arguments, needed[len(ctx.parameters) :], strict=True):
            tensor.requires_grad_(need)
        state, devices, states = ctx.random
        with torch.random.fork_rng(devices), ctx.autocast, torch.enable_grad():
            torch.set_rng_state(state)
            set_device_states(devices, states)
            outputs = ctx.call(arguments)
        reached = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None and y.requires_grad]
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
        ends, slopes = [y for y, _ in reached], [g for _, g in reached]
        found = iter(torch.autograd.grad(ends, wanted, slopes, allow_unused=True) if reached else [None] * len(wanted))
        return None, None, *(next(found) if need else None for need in needed)
