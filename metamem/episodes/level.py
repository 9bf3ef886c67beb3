"""What an inner loop around a module is given, and what it gives back.

Tensors of several tasks have a leading axis `tasks`; a fast parameter is [tasks, *shape].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

from metamem.config import UserError
from metamem.memory.signals import Objectives

Parameters: TypeAlias = dict[str, Tensor]
Losses: TypeAlias = Float[Tensor, "tasks"]
RateFunction: TypeAlias = Callable[[int, Tensor, Parameters], Mapping[str, "Tensor | float"]]


class EngineError(UserError):
    """What an engine cannot do, or would get wrong, by name, and an engine that can."""


class Batch(NamedTuple):
    """Examples of several tasks: inputs [tasks, shots, …] and targets [tasks, shots, …]."""

    inputs: Tensor
    targets: Tensor


class Episode(NamedTuple):
    """Several tasks: what each is learned from, and what it is then asked."""

    support: Batch
    query: Batch


@dataclass(frozen=True)
class InnerOptimizer:
    """An inner optimizer at rate 1, with torch's meaning of every option."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class EpisodeLevel:
    """An inner level: what moves on a support set, from which loss, how far, how often.

    - `objectives`  functions (pred, target) -> loss per example, with their weights; a task's loss is the mean
    - `steps`       inner updates
    - `optimizer`   the direction of an update, at rate 1
    - `rates`       one rate for all, or a `Rates` (learned, gated, routed)
    - `members`     names of the parameters that move; None: all
    - `unroll`      the outer gradient flows through the gradients of the last `unroll` updates, and takes those before
                    as constants: 0 is first order, None is all
    - `engine`      who runs it: a name in `ENGINES`
    - `proximal`    λ of the term λ/2 ‖φ − θ‖² that holds the fast weights φ to the slow ones θ; `implicit` needs it
    - `solver_steps`, `solver_tolerance`  of the conjugate gradient of `implicit`
    """

    objectives: Objectives
    steps: int = 1
    optimizer: InnerOptimizer = field(default_factory=InnerOptimizer)
    rates: nn.Module | float = 0.01
    members: tuple[str, ...] | None = None
    unroll: int | None = None
    engine: str = "functional"
    proximal: float = 0.0
    solver_steps: int = 20
    solver_tolerance: float = 1e-6

    def through(self, step: int) -> bool:
        """Whether the outer gradient flows through the gradient of update `step` (from 0)."""
        return self.unroll is None or step >= self.steps - self.unroll

    def rate_function(self) -> RateFunction:
        """(step, losses, gradients) -> rate of each parameter."""
        if isinstance(self.rates, nn.Module):
            return self.rates
        rate = float(self.rates)
        return lambda step, losses, gradients: dict.fromkeys(gradients, rate)


class Adapted(NamedTuple):
    """Fast parameters and buffers after adaptation, each [tasks, *shape], and the support losses before each update,
    [steps, tasks]."""

    fast: Parameters
    buffers: Parameters
    losses: Float[Tensor, "steps tasks"]
