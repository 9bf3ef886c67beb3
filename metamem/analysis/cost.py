"""What a model costs: floating-point operations, seconds, bytes of state."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from metamem.config import Config
from metamem.hierarchy import InnerLoop, OuterLevels, inner_levels, loss_per_token
from metamem.hierarchy.calendar import calendar_of
from metamem.state import state_bytes
from metamem.targets import Targets, mean_asked
from metamem.training import Trained


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of what runs inside, by torch's own formulas: those of matrix products,
    attention and convolutions. (`FlopCounterMode` also hooks every module, which fails where a module passes its input
    on as it is.)"""

    total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation itself, counted."""
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def training_cost(
    trained: Trained, config: Config, task: Any, inputs: Shaped[Tensor, "batch time *dims"], targets: Targets
) -> dict[str, float]:
    """Seconds of the training; its operations and those of reading one token, which are the matrix products'
    (multiplications and additions, forward and backward), counted on one batch; bytes of state a sequence."""
    model = trained.model
    levels = [level for level in inner_levels(config, model) if level.unroll != 0]
    outer = OuterLevels(config, model, calendar_of(config, task))
    run = InnerLoop(model, levels, config.training.unroll, config.training.recompute).run
    with Operations() as reading, torch.no_grad():
        out = run(inputs, targets)
    with Operations() as step:
        out_again = run(inputs, targets)
        outer.backward(
            lambda objectives: mean_asked(loss_per_token(objectives, out_again.y, targets), targets), out_again.aux
        )
    return {
        "training_seconds": trained.seconds,
        "training_flops": float(step.total) * trained.step,
        "flops_per_token": reading.total / inputs.shape[0] / inputs.shape[1],
        "state_bytes": state_bytes(out.state) / inputs.shape[0],
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
    }
