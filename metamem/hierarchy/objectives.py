"""What a level's objectives say of a forward pass: a loss per token, and what memories measured on the way.

Losses are means over the positions asked (`metamem.targets`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.collectives import ALONE, World
from metamem.config.errors import UserError
from metamem.config.resolve import Objective, statistics
from metamem.globs import match_names
from metamem.memory.signals import Objectives
from metamem.out_of_memory import is_out_of_memory
from metamem.targets import Targets, asked


def loss_per_token(
    objectives: Objectives, pred: Float[Tensor, "*tokens vocabulary"], target: Targets
) -> Float[Tensor, "*tokens"]:
    """Σ weight · objective(pred, target); 0 at the positions that are not asked, which no objective sees."""
    wanted = asked(target)
    if wanted.all():
        return torch.stack([weight * _of(objective, pred, target) for objective, weight in objectives.items()]).sum(0)
    losses = loss_per_token(objectives, pred[wanted], target[wanted])
    return losses.new_zeros(wanted.shape).masked_scatter(wanted, losses)


def _of(objective: Objective, pred: Tensor, target: Tensor) -> Tensor:
    """objective(pred, target). Raises UserError where it is one of other shapes than the task's."""
    try:
        return objective(pred, target)
    except (ValueError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        shapes = " with targets ".join(f"{tensor.dtype}{list(tensor.shape)}" for tensor in (pred, target))
        name = f"{objective.__module__}.{getattr(objective, '__name__', '')}"
        raise UserError(f"the objective {name} cannot compare predictions {shapes}: {error}") from error


def measured_loss(
    measured: Mapping[str | Objective, float], aux: Mapping[str, Tensor], world: World = ALONE
) -> Tensor | float:
    """Σ weight · mean of what memories measured under the names that a glob matches, and of objectives of routers: this
    process's share of it, where several have the rows. An objective of routers sees those of all."""
    total: Tensor | float = 0.0
    for what, weight in measured.items():
        if isinstance(what, str):
            matching = [aux[name].mean() for name in match_names([what], aux)]
        else:
            matching = of_routers(what, aux, world)
        total = total + weight / world.size * torch.stack(matching).mean()
    return total


def of_routers(objective: Objective, aux: Mapping[str, Tensor], world: World = ALONE) -> list[Tensor]:
    """An objective of what routers measure in all rows, for each router that measures all it asks for."""
    asked = statistics(objective)
    prefixes = [name.removesuffix("gates") for name in aux if name.endswith("router.gates")]
    measuring = [prefix for prefix in prefixes if all(prefix + name in aux for name in asked)]
    return [objective(**{name: world.joined(aux[prefix + name]) for name in asked}) for prefix in measuring]
