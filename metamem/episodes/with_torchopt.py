"""Engines by torchopt: its functional transformations in our inner loop, and its differentiable MetaSGD,
MetaAdam and MetaAdamW.

torchopt 0.7.3 has no outer gradient through Adam where an inner gradient is exactly zero (it is NaN, and its `eps_root`
would change all others), which is refused as it happens; and it unties tied weights, has one rate for all parameters
and no first-order mode in its meta-optimizers, which is refused beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamem.episodes.executors import fastest
from metamem.episodes.level import Adapted, Batch, EngineError, EpisodeLevel, InnerOptimizer, Parameters
from metamem.episodes.parameters import members, prediction, proximal_loss, stack_adapted, task_loss
from metamem.episodes.transforms import Transform
from metamem.episodes.unroll import unroll


def adapt(module: nn.Module, support: Batch, level: EpisodeLevel) -> Adapted:
    """The inner loop with the steps of torchopt's functional transformations."""
    return unroll(module, support, level, fastest(module), pair(level.optimizer))


def pair(optimizer: InnerOptimizer) -> Transform:
    """torchopt's transformation at rate 1, which gives the step to add, as a pair that gives one to subtract."""
    import torchopt

    if optimizer.name == "sgd":
        made = torchopt.sgd(1.0, optimizer.momentum, 0.0, optimizer.weight_decay, optimizer.nesterov)
    else:
        make = torchopt.adam if optimizer.name == "adam" else torchopt.adamw
        made = make(1.0, optimizer.betas, optimizer.eps, weight_decay=optimizer.weight_decay)

    def update(gradients: Parameters, state: Any, parameters: Parameters) -> tuple[Parameters, Any]:
        before, moved = state
        if optimizer.name != "sgd":
            moved = _moved(gradients, moved)
        values = tuple(parameters.values())
        steps, after = made.update(tuple(gradients.values()), before, params=values, inplace=False)
        return {name: -step for name, step in zip(gradients, steps, strict=True)}, (after, moved)

    return Transform(lambda parameters: (made.init(tuple(parameters.values())), {}), update)


def adapt_meta(module: nn.Module, support: Batch, level: EpisodeLevel) -> Adapted:
    """Task by task with torchopt's meta-optimizers, which put fast weights into the module itself; it is as it was
    afterwards, also after an exception."""
    parameters = dict(module.named_parameters())
    found = []
    for inputs, targets in zip(*support, strict=True):
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), restored(module):
            optimizer, losses, moved = _meta_optimizer(module, level), [], {}
            for _ in range(level.steps):
                loss = task_loss(level.objectives, prediction(module(inputs)), targets)
                losses.append(loss.detach())
                if level.proximal:
                    loss = loss + proximal_loss(level.proximal, dict(module.named_parameters()), parameters)
                if level.optimizer.name != "sgd":
                    now = dict(module.named_parameters())
                    gradients = torch.autograd.grad(loss, list(now.values()), create_graph=True, materialize_grads=True)
                    moved = _moved(dict(zip(now, gradients, strict=True)), moved)
                optimizer.step(loss)
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            found.append(Adapted(dict(module.named_parameters()), buffers, torch.stack(losses)))
    return stack_adapted(found)


def refusal_meta(module: nn.Module, level: EpisodeLevel) -> str | None:
    """What the meta-optimizers cannot do, or get wrong."""
    names = [name for name, _ in module.named_parameters()]
    every = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if len(every) > len(names):
        tied = next(name for name in every if name not in names)
        return f"unties the tied weight {tied!r} after a step"
    if isinstance(level.rates, nn.Module):
        return "has one rate for all parameters, a number"
    if set(members(module, level)) != set(names):
        return "moves all parameters, not a part of them"
    if level.steps < 1:
        return "makes at least one update"
    if level.unroll is not None and level.unroll < level.steps:
        return f"has no first-order or truncated mode (unroll {level.unroll} of {level.steps} steps)"
    if fixed := next((name for name, p in module.named_parameters() if not p.requires_grad), None):
        return f"cannot move {fixed!r}, which does not require a gradient"
    return None


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Afterwards the module has the parameters that it had, and buffers of the same values."""
    parameters = [(part, dict(part._parameters)) for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for part, had in parameters:
            part._parameters.update(had)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _meta_optimizer(module: nn.Module, level: EpisodeLevel) -> Any:
    import torchopt

    options = level.optimizer
    assert not isinstance(level.rates, nn.Module)
    if options.name == "sgd":
        return torchopt.MetaSGD(
            module, level.rates, options.momentum, weight_decay=options.weight_decay, nesterov=options.nesterov
        )
    make = torchopt.MetaAdam if options.name == "adam" else torchopt.MetaAdamW
    return make(module, level.rates, options.betas, options.eps, weight_decay=options.weight_decay)


def _moved(gradients: Parameters, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where any gradient so far was not zero; an EngineError where none was and the outer gradient goes through it."""
    after = {name: (g != 0) | before[name] if name in before else g != 0 for name, g in gradients.items()}
    for name, gradient in gradients.items():
        if gradient.requires_grad and not bool(after[name].all()):
            raise EngineError(
                f"torchopt's Adam has no outer gradient where an inner gradient is exactly zero, as one of {name!r} is "
                "(a dead unit, or an input that is 0); take the engine 'functional' or 'loop'"
            )
    return after
