"""Tasks one after the other, by torch.autograd.grad: slow, and good for any module that autograd takes."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from metamem.episodes.level import Batch, Losses, Parameters
from metamem.episodes.parameters import call, shared, stack, task_loss
from metamem.memory.signals import Objectives


def gradients(
    module: nn.Module, objectives: Objectives, fast: Parameters, buffers: Parameters, batch: Batch, through: bool
) -> tuple[Losses, Parameters, Parameters]:
    """Losses and gradients task by task."""
    losses, found, after = [], [], []
    slow = shared(module, fast)
    for task, (inputs, targets) in enumerate(zip(batch.inputs, batch.targets, strict=True)):
        own = {name: buffer[task].clone() for name, buffer in buffers.items()}
        mine = {name: value[task] for name, value in fast.items()}
        if not through:
            mine = {name: value.detach().requires_grad_() for name, value in mine.items()}
        with torch.enable_grad():
            loss = task_loss(objectives, call(module, {**slow, **mine, **own}, inputs), targets)
            found.append(torch.autograd.grad(loss, list(mine.values()), create_graph=through, materialize_grads=True))
        losses.append(loss if through else loss.detach())
        after.append({name: buffer.detach() for name, buffer in own.items()})
    stacked = {name: torch.stack(values) for name, values in zip(fast, zip(*found, strict=True), strict=True)}
    return torch.stack(losses), stacked, stack(after)


def predict(
    module: nn.Module, fast: Parameters, buffers: Parameters, inputs: Shaped[Tensor, "tasks examples *features"]
) -> Float[Tensor, "tasks examples *out"]:
    """Predictions task by task."""
    slow = shared(module, fast)
    found = []
    for task, x in enumerate(inputs):
        own = {name: buffer[task].clone() for name, buffer in buffers.items()}
        found.append(call(module, {**slow, **{name: value[task] for name, value in fast.items()}, **own}, x))
    return torch.stack(found)
