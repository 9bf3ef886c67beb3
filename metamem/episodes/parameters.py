"""A module as a function of its parameters: names, fast copies, calls, and the loss of a task."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import chain

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamem.config.errors import UserError, suggest
from metamem.episodes.level import Adapted, EpisodeLevel, Losses, Parameters
from metamem.memory.base import Out
from metamem.memory.signals import Objectives


def members(module: nn.Module, level: EpisodeLevel) -> tuple[str, ...]:
    """The names of the parameters that a level moves. Raises UserError for one that the module has not."""
    names = [name for name, _ in module.named_parameters()]
    if level.members is None:
        return tuple(names)
    for name in level.members:
        if name not in names:
            raise UserError(f"{type(module).__name__} has no parameter {name!r}{suggest(name, names)}")
    return level.members


def fast_copies(module: nn.Module, names: Iterable[str], tasks: int) -> Parameters:
    """The slow weights of these names once for each task, [tasks, *shape], views whose gradient adds up over tasks."""
    parameters = dict(module.named_parameters())
    return {name: differentiable(parameters[name].expand(tasks, *parameters[name].shape)) for name in names}


def own_buffers(module: nn.Module, tasks: int) -> Parameters:
    """A copy of the module's buffers for each task."""
    return {name: buffer.expand(tasks, *buffer.shape).clone() for name, buffer in module.named_buffers()}


def shared(module: nn.Module, fast: Container[str]) -> Parameters:
    """The parameters that are not among the fast ones: the slow weights themselves."""
    return {name: parameter for name, parameter in module.named_parameters() if name not in fast}


def call(
    module: nn.Module, parameters: Mapping[str, Tensor], inputs: Shaped[Tensor, "examples *features"]
) -> Float[Tensor, "examples *out"]:
    """The module's prediction with these parameters and buffers in the place of its own; buffers are changed in place.

    Attention takes the plain kernel, the only one that can be differentiated twice.
    """
    with sdpa_kernel(SDPBackend.MATH):
        # Left to tie weights itself, torch 2.13 puts back a wrong one where a module is used in two places.
        return prediction(functional_call(module, every_place(module, parameters), (inputs,), tie_weights=False))


def every_place(module: nn.Module, tensors: Mapping[str, Tensor]) -> Parameters:
    """Parameters and buffers at each place that a module of its own holds them, where one may be in several."""
    first = {id(own): name for name, own in chain(module.named_parameters(), module.named_buffers())}
    places = {
        f"{path}.{name}" if path else name: own
        for path, part in module.named_modules()
        for name, own in chain(part._parameters.items(), part._buffers.items())
        if own is not None
    }
    return {place: tensors[first[id(own)]] for place, own in places.items() if first[id(own)] in tensors}


def prediction(output: Float[Tensor, "examples *out"] | Out) -> Float[Tensor, "examples *out"]:
    """What a module predicts; a metamem module gives its state and measurements beside it."""
    return output.y if isinstance(output, Out) else output


def task_loss(
    objectives: Objectives, pred: Float[Tensor, "examples *out"], target: Shaped[Tensor, "examples *target"]
) -> Float[Tensor, ""]:
    """Σ weight · mean of objective(pred, target) over the examples of one task."""
    losses = [weight * objective(pred, target).mean() for objective, weight in objectives.items()]
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def task_losses(
    objectives: Objectives, pred: Float[Tensor, "tasks examples *out"], target: Shaped[Tensor, "tasks examples *target"]
) -> Losses:
    """The loss of each task of a batch of them."""
    losses = [weight * objective(pred, target).flatten(1).mean(1) for objective, weight in objectives.items()]
    return torch.stack(losses).sum(0) if len(losses) > 1 else losses[0]


def proximal_loss(strength: float, fast: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """λ/2 ‖φ − θ‖² of one task."""
    squares = [(value - start[name]).square().sum() for name, value in fast.items()]
    return 0.5 * strength * torch.stack(squares).sum()


def stack(tasks: Sequence[Parameters]) -> Parameters:
    """Tensors of each task, by name, as one with a task axis."""
    return {name: torch.stack([one[name] for one in tasks]) for name in tasks[0]}


def stack_adapted(tasks: Sequence[Adapted]) -> Adapted:
    """Tasks that were adapted one by one, each without a task axis, as one with it; under torch.no_grad, detached."""
    fast = stack([one.fast for one in tasks])
    if not torch.is_grad_enabled():
        fast = {name: value.detach() for name, value in fast.items()}
    return Adapted(fast, stack([one.buffers for one in tasks]), torch.stack([one.losses for one in tasks], 1))


def differentiable(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A parameter as the inner loop takes it: one that no outer level trains still has a gradient inside."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()
