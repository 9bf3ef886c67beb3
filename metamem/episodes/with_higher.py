"""Engine by higher: `innerloop_ctx`, task by task, with the optimizers that it is right about.

higher 0.2.1 has Adam with a misplaced epsilon; ours is registered for a subclass of torch's, so that a program's own
use of higher stays as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamem.episodes.level import Adapted, Batch, EpisodeLevel, InnerOptimizer, Parameters
from metamem.episodes.parameters import differentiable, members, prediction, proximal_loss, stack_adapted, task_loss
from metamem.episodes.transforms import Moments, adam_direction

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)  # it compares a length with `is`
    import higher


class Adam(torch.optim.Adam):
    """torch's Adam under a name that higher knows ours by."""


class DifferentiableAdam(higher.optim.DifferentiableOptimizer):
    """Adam as torch has it: θ − rate · m̂ / (√v̂ + eps)."""

    def _update(self, grouped_grads: Any, **_: Any) -> None:
        for index, (group, gradients) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            options = InnerOptimizer("adam", betas=group["betas"], eps=group["eps"])
            for position, (parameter, gradient) in enumerate(zip(group["params"], gradients, strict=True)):
                if gradient is None:
                    continue
                state = self.state[index][position]
                decayed = gradient + group["weight_decay"] * parameter if group["weight_decay"] else gradient
                moments = state.get("moments", Moments(0.0, 0.0, 0))
                direction, state["moments"] = adam_direction(decayed, moments, options)
                group["params"][position] = parameter - group["lr"] * direction


higher.register_optim(Adam, DifferentiableAdam)  # pyright: ignore[reportArgumentType]


def adapt(module: nn.Module, support: Batch, level: EpisodeLevel) -> Adapted:
    """Task by task in higher's inner loop; a first-order step takes its gradients as constants."""
    return stack_adapted([_adapt_one(module, *task, level) for task in zip(*support, strict=True)])


def _adapt_one(module: nn.Module, inputs: Tensor, targets: Tensor, level: EpisodeLevel) -> Adapted:
    moving, parameters, rates = members(module, level), dict(module.named_parameters()), level.rate_function()
    optimizer = _optimizer(level.optimizer, [parameters[name] for name in moving])
    with (
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (patched, inner),
    ):
        model: Any = patched
        model.update_params([differentiable(parameter) for parameter in parameters.values()])

        def fast() -> Parameters:
            now = dict(zip(parameters, model.fast_params, strict=True))
            return {name: now[name] for name in moving}

        losses = []
        for step in range(level.steps):
            loss = task_loss(level.objectives, prediction(model(inputs)), targets)
            losses.append(loss.detach())
            rate = rates(step, loss, dict.fromkeys(moving, loss))
            if level.proximal:
                loss = loss + proximal_loss(level.proximal, fast(), parameters)
            override = {"lr": [rate[name] for name in moving]}
            constant: Any = None if level.through(step) else _constants
            inner.step(loss, override=override, grad_callback=constant)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return Adapted(fast(), buffers, torch.stack(losses) if losses else inputs.new_zeros(0))


def refusal(module: nn.Module, level: EpisodeLevel) -> str | None:
    """What higher cannot do, or gets wrong."""
    if level.optimizer.name == "adamw":
        return "has no AdamW"
    if getattr(level.rates, "reads_gradients", False):
        return "takes rates before it takes gradients, which this router reads"
    return None


def _optimizer(options: InnerOptimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    groups = [{"params": [parameter]} for parameter in parameters]
    if options.name == "adam":
        return Adam(groups, lr=1.0, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay)
    return torch.optim.SGD(groups, 1.0, options.momentum, 0.0, options.weight_decay, options.nesterov)


def _constants(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if gradient is None else gradient.detach() for gradient in gradients]
