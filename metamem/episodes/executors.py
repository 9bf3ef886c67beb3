"""Executors: how the gradients and predictions of many tasks are computed.

    batched   every weight with a task axis, one product for all tasks (`metamem.episodes.batched`): the fastest, for
              sequences of modules that have a rule
    vmap      torch.func.vmap over torch.func.grad (`metamem.episodes.vmapped`): nearly any module
    loop      task by task with torch.autograd.grad (`metamem.episodes.looped`): any module that autograd takes

All three compute the same. Buffers are each task's own, and never the module's: a forward in training mode moves the
running statistics of the task that it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from metamem.episodes import batched, looped, vmapped
from metamem.episodes.level import Batch, Losses, Parameters
from metamem.memory.signals import Objectives


class Executor(NamedTuple):
    """`gradients(module, objectives, fast, buffers, batch, through) -> (losses, gradients, buffers)`, connected to the
    graph of `fast` where `through`; `predict(module, fast, buffers, inputs) -> predictions`."""

    gradients: Callable[
        [nn.Module, Objectives, Parameters, Parameters, Batch, bool], tuple[Losses, Parameters, Parameters]
    ]
    predict: Callable[[nn.Module, Parameters, Parameters, Tensor], Tensor]


BATCHED = Executor(batched.gradients, batched.predict)
VMAP = Executor(vmapped.gradients, vmapped.predict)
LOOP = Executor(looped.gradients, looped.predict)


def fastest(module: nn.Module) -> Executor:
    """The batched executor where every part of the module has a rule, else vmap."""
    return BATCHED if batched.has_rule(module) else VMAP
