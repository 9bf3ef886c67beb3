"""The inner loop: on a support set, `steps` times, θ ← θ − rate · direction(∂ loss / ∂ θ), for all tasks at once.

    φ_0 = θ
    g_k = ∂ L(φ_k) / ∂φ + λ (φ_k − θ)              L: the task's mean loss; λ: `proximal`
    d_k, s_{k+1} = update(g_k, s_k, φ_k)           the optimizer's pair, at rate 1
    φ_{k+1} = φ_k − r_k ⊙ d_k                      r_k: one number, learned, gated or routed

The outer gradient goes through all of it, but takes ∂L/∂φ of the first `steps − unroll` updates as constants (`unroll:
0`: all, which is first-order MAML; Finn et al. 2017, section 5.2). Rates still learn from those updates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metamem.episodes.executors import Executor
from metamem.episodes.level import Adapted, Batch, EpisodeLevel
from metamem.episodes.parameters import fast_copies, members, own_buffers
from metamem.episodes.transforms import Transform


def unroll(module: nn.Module, support: Batch, level: EpisodeLevel, executor: Executor, pair: Transform) -> Adapted:
    """The inner loop with the gradients of an executor and the steps of an optimizer's pair.

    Under torch.no_grad, every gradient is a constant and the result is detached.
    """
    tasks = support.inputs.shape[0]
    fast, buffers = fast_copies(module, members(module, level), tasks), own_buffers(module, tasks)
    start, state, rates, measured = fast, pair.init(fast), level.rate_function(), []
    for step in range(level.steps):
        through = torch.is_grad_enabled() and level.through(step)
        losses, gradients, buffers = executor.gradients(module, level.objectives, fast, buffers, support, through)
        if level.proximal:
            gradients = {name: g + level.proximal * (fast[name] - start[name]) for name, g in gradients.items()}
        directions, state = pair.update(gradients, state, fast)
        rate = rates(step, losses, gradients)
        fast = {name: _moved(value, rate[name], directions[name]) for name, value in fast.items()}
        measured.append(losses.detach())
    return Adapted(fast, buffers, torch.stack(measured) if measured else support.inputs.new_zeros(0, tasks))


def _moved(value: Tensor, rate: Tensor | float, direction: Tensor) -> Tensor:
    return value - rate * direction if isinstance(rate, Tensor) else torch.sub(value, direction, alpha=rate)
