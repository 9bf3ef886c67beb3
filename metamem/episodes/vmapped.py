"""Tasks batched by torch.func.vmap, inner gradients by torch.func.grad; the outer gradient is one ordinary backward.

Every task draws its own dropout. What vmap cannot run (a decision that depends on a tensor's values, `.item()`, a write
in place into a tensor without a task axis) is an EngineError that names the module.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import grad, vmap

from metamem.episodes.exact_norms import ExactNorms
from metamem.episodes.level import Batch, EngineError, Losses, Parameters
from metamem.episodes.parameters import call, shared, task_loss
from metamem.memory.signals import Objectives


def gradients(
    module: nn.Module, objectives: Objectives, fast: Parameters, buffers: Parameters, batch: Batch, through: bool
) -> tuple[Losses, Parameters, Parameters]:
    """Losses and gradients of all tasks."""
    slow = shared(module, fast)

    def loss(fast: Parameters, buffers: Parameters, inputs: Tensor, targets: Tensor) -> tuple[Tensor, tuple]:
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        value = task_loss(objectives, call(module, {**slow, **fast, **own}, inputs), targets)
        return value, (value, own)

    with torch.set_grad_enabled(through), ExactNorms(), named_errors(module, batch.inputs):
        found, (losses, after) = vmap(grad(loss, has_aux=True), randomness="different")(fast, buffers, *batch)
    return losses, found, {name: buffer.detach() for name, buffer in after.items()}


def predict(
    module: nn.Module, fast: Parameters, buffers: Parameters, inputs: Shaped[Tensor, "tasks examples *features"]
) -> Float[Tensor, "tasks examples *out"]:
    """Predictions of all tasks."""
    slow = shared(module, fast)

    def run(fast: Parameters, buffers: Parameters, inputs: Tensor) -> Tensor:
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        return call(module, {**slow, **fast, **own}, inputs)

    with ExactNorms(), named_errors(module, inputs):
        return vmap(run, randomness="different")(fast, buffers, inputs)


@contextmanager
def named_errors(
    module: nn.Module, inputs: Shaped[Tensor, "tasks examples *features"], engine: str = "functional"
) -> Iterator[None]:
    """An error that one task alone does not raise is vmap's own: it says which part of the module it comes from, and
    which engines can."""
    try:
        yield
    except RuntimeError as error:
        if not _runs_alone(module, inputs[0]):
            raise
        name, kind = _innermost(error, module)
        raise EngineError(
            f"{name} ({kind}): engine {engine!r} cannot batch it over tasks ({str(error).partition('. ')[0]}); "
            "take the engine 'loop', or 'higher', which run it task by task"
        ) from error


def _runs_alone(module: nn.Module, inputs: Tensor) -> bool:
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with torch.no_grad():
            call(module, {**parameters, **buffers}, inputs)
    except Exception:
        return False
    return True


def _innermost(error: BaseException, module: nn.Module) -> tuple[str, str]:
    """The name and type of the part of a module that an error was raised in."""
    names = {id(part): name for name, part in module.named_modules()}
    found = module
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if id(owner) in names:
            assert isinstance(owner, nn.Module)
            found = owner
    return f"module {names[id(found)]!r}" if names[id(found)] else "the module", type(found).__name__
