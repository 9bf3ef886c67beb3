"""What a model costs: floating-point operations, seconds, bytes of state."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from metamem.config import Config
from metamem.hierarchy import InnerLoop, OuterLevels, inner_levels, loss_per_token
from metamem.hierarchy.calendar import calendar_of
from metamem.state import state_bytes
from metamem.targets import mean_asked
from metamem.training import Trained


def training_cost(
    trained: Trained, config: Config, task: Any, inputs: Shaped[Tensor, "batch time *dims"], targets: Tensor
) -> dict[str, float]:
    """Seconds of the training; its operations and those of reading one token, which are the matrix products'
    (multiplications and additions, forward and backward), counted on one batch; bytes of state a sequence."""
    model = trained.model
    levels = [level for level in inner_levels(config, model) if level.unroll != 0]
    outer = OuterLevels(config, model, calendar_of(config, task))
    run = InnerLoop(model, levels, config.training.unroll, config.training.recompute).run
    with FlopCounterMode(display=False) as reading, torch.no_grad():
        out = run(inputs, targets)
    with FlopCounterMode(display=False) as step:
        out_again = run(inputs, targets)
        outer.backward(
            lambda objectives: mean_asked(loss_per_token(objectives, out_again.y, targets), targets), out_again.aux
        )
    return {
        "training_seconds": trained.seconds,
        "training_flops": float(step.get_total_flops()) * trained.step,
        "flops_per_token": reading.get_total_flops() / inputs.shape[0] / inputs.shape[1],
        "state_bytes": state_bytes(out.state) / inputs.shape[0],
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
    }
