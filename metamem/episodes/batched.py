"""Tasks batched by hand: a linear layer whose weights have a task axis is one batched product.

A rule says how a type of module runs on inputs [tasks, shots, …] with parameters that may have a task axis of their
own, or not, where they do not move. Rules are looked up by exact type, since a subclass may compute anything:

    @rule(MyLayer)
    def my_layer(module, parameters, x): ...      # parameters: of this module, by name
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from metamem.config import objective_gradient
from metamem.episodes.level import Batch, Losses, Parameters
from metamem.episodes.parameters import shared, task_losses
from metamem.memory.signals import Objectives

Rule = Callable[[nn.Module, Parameters, Tensor], Tensor]
RULES: dict[type, Rule] = {}
# Elementwise on what they get, and without parameters.
ELEMENTWISE = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Softplus,
    nn.Tanh,
    nn.Sigmoid,
    nn.Dropout,
)


def rule(kind: type) -> Callable[[Rule], Rule]:
    """Decorator: how modules of exactly this type run on a batch of tasks."""

    def add(function: Rule) -> Rule:
        RULES[kind] = function
        return function

    return add


def has_rule(module: nn.Module) -> bool:
    """Whether a module, and all in it, can run batched: each has a rule, no hooks, and no buffers."""
    parts = list(module.modules())
    return not any(part._buffers for part in parts) and all(
        type(part) in RULES and not part._forward_hooks and not part._forward_pre_hooks for part in parts
    )


def run(
    module: nn.Module, parameters: Parameters, x: Shaped[Tensor, "tasks *features"]
) -> Shaped[Tensor, "tasks *out"]:
    """A module, or a part of one, by its rule."""
    return RULES[type(module)](module, parameters, x)


def part(parameters: Parameters, name: str) -> Parameters:
    """The parameters of a child."""
    head = f"{name}."
    return {key[len(head) :]: value for key, value in parameters.items() if key.startswith(head)}


@rule(nn.Sequential)
def sequential(
    module: nn.Module, parameters: Parameters, x: Shaped[Tensor, "tasks *features"]
) -> Shaped[Tensor, "tasks *out"]:
    """One child after the other."""
    for name, child in module._modules.items():  # named_children names a child that comes twice once
        assert child is not None
        x = run(child, part(parameters, name), x)
    return x


@rule(nn.Linear)
def linear(
    module: nn.Module, parameters: Parameters, x: Float[Tensor, "tasks *examples d_in"]
) -> Float[Tensor, "tasks *examples d_out"]:
    """x Wᵀ + b, for all tasks in one product."""
    weight, bias = parameters["weight"], parameters.get("bias")
    if weight.dim() == 2:
        y = functional.linear(x, weight, bias if bias is None or bias.dim() == 1 else None)
        return y if bias is None or bias.dim() == 1 else y + _aligned(bias, y)
    flat = x if x.dim() == 3 else x.flatten(1, -2)
    if bias is None:
        y = torch.bmm(flat, weight.mT)
    else:
        y = torch.baddbmm(bias.unsqueeze(-2) if bias.dim() == 2 else bias, flat, weight.mT)
    return y if x.dim() == 3 else y.view(*x.shape[:-1], -1)


@rule(nn.LayerNorm)
def layer_norm(
    module: nn.Module, parameters: Parameters, x: Float[Tensor, "tasks *features"]
) -> Float[Tensor, "tasks *features"]:
    """(x − mean) / deviation ⊙ gain + shift."""
    assert isinstance(module, nn.LayerNorm)
    shape, eps = list(module.normalized_shape), module.eps
    if all(value.dim() == len(shape) for value in parameters.values()):
        return functional.layer_norm(x, shape, parameters.get("weight"), parameters.get("bias"), eps)
    y = functional.layer_norm(x, shape, eps=eps)
    if "weight" in parameters:
        y = y * _aligned(parameters["weight"], y, len(shape))
    return y + _aligned(parameters["bias"], y, len(shape)) if "bias" in parameters else y


@rule(nn.Flatten)
def flatten(
    module: nn.Module, parameters: Parameters, x: Shaped[Tensor, "tasks *features"]
) -> Shaped[Tensor, "tasks *flat"]:
    """Axes counted without that of the tasks."""
    assert isinstance(module, nn.Flatten)
    start, end = (axis + 1 if axis >= 0 else axis for axis in (module.start_dim, module.end_dim))
    return x.flatten(start, end)


def _aligned(value: Tensor, y: Tensor, axes: int = 1) -> Tensor:
    """A parameter of the last `axes` axes against y [tasks, …], whether or not it has a task axis."""
    if value.dim() == axes:
        return value
    return value.view(value.shape[0], *(1,) * (y.dim() - 1 - axes), *value.shape[1:])


for _kind in ELEMENTWISE:
    RULES[_kind] = lambda module, parameters, x: module(x)


def gradients(
    module: nn.Module, objectives: Objectives, fast: Parameters, buffers: Parameters, batch: Batch, through: bool
) -> tuple[Losses, Parameters, Parameters]:
    """Losses and gradients of all tasks by one torch.autograd.grad, since tasks do not mix: from the predictions where
    the objectives' gradients are written out, else from the sum of the losses."""
    leaves = fast if through else {name: value.detach().requires_grad_() for name, value in fast.items()}
    values = list(leaves.values())
    with torch.enable_grad():
        pred = predict(module, leaves, buffers, batch.inputs)
        signal = _signal(objectives, pred if through else pred.detach(), batch.targets)
        losses = task_losses(objectives, pred if through or signal is None else pred.detach(), batch.targets)
        of, along = (losses.sum(), None) if signal is None else (pred, signal)
        found = torch.autograd.grad(of, values, along, create_graph=through, materialize_grads=True)
    return losses if through else losses.detach(), dict(zip(leaves, found, strict=True)), buffers


def _signal(objectives: Objectives, pred: Tensor, target: Tensor) -> Tensor | None:
    """∂ (the tasks' losses) / ∂ pred, or None where it is not written out."""
    terms = []
    for objective, weight in objectives.items():
        gradient = objective_gradient(objective)
        if gradient is None:
            return None
        terms.append(weight / pred.shape[1:-1].numel() * gradient(pred, target))
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def predict(
    module: nn.Module, fast: Parameters, buffers: Parameters, inputs: Shaped[Tensor, "tasks examples *features"]
) -> Float[Tensor, "tasks examples *out"]:
    """Predictions of all tasks."""
    return run(module, every_name(module, {**shared(module, fast), **fast}), inputs)


def every_name(module: nn.Module, parameters: Mapping[str, Tensor]) -> Parameters:
    """The parameters also under the other names that a module knows them by, where it has one in two places."""
    names = dict(module.named_parameters(remove_duplicate=False))
    if len(names) == len(parameters):
        return dict(parameters)
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {name: parameters[first[id(parameter)]] for name, parameter in names.items()}
