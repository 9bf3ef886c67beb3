"""What an episodic config can name: tasks by `name`, modules by `kind`.

    @EPISODES.register("mine")
    class Mine:
        def __init__(self, *, shots: int = 5): ...
        def sample(self, generator, tasks) -> Episode: ...        # what is trained on
        def evaluation(self, tasks, seed) -> Episode: ...         # what is not
        def measure(self, pred, target) -> dict[str, Tensor]: ... # name -> one figure a task, [tasks]

A module's kind is a registered name, or the dotted path of any `nn.Module`, whose options are its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from metamem.config.errors import Where
from metamem.config.resolve import resolve_class
from metamem.episodes.level import Episode
from metamem.registry import Registry


@runtime_checkable
class EpisodicTask(Protocol):
    """A distribution over tasks."""

    def sample(self, generator: torch.Generator, tasks: int) -> Episode:
        """New tasks to train on."""
        ...

    def evaluation(self, tasks: int, seed: int = 0) -> Episode:
        """The evaluation tasks of a seed, the same at all times; none is trained on."""
        ...

    def measure(
        self, pred: Float[Tensor, "tasks examples *out"], target: Shaped[Tensor, "tasks examples *target"]
    ) -> dict[str, Float[Tensor, "tasks"]]:
        """Figures of each task, [tasks], from predictions and targets [tasks, examples, …]."""
        ...

    def describe(self) -> str:
        """What a task is; one line."""
        ...


EPISODES: Registry[EpisodicTask] = Registry("episodic task", key="name", makes=lambda made: hasattr(made, "sample"))
EPISODE_MODULES: Registry[nn.Module] = Registry("episodic module kind", key="kind")


def build_module(options: Mapping[str, Any], where: Where) -> nn.Module:
    """The module of a config: a registered kind, or a class by its path. Raises ConfigError for what is none."""
    kind = options["kind"]
    arguments = {key: value for key, value in options.items() if key != "kind"}
    if "." not in kind:
        return EPISODE_MODULES.build(kind, arguments, where)
    made = resolve_class(kind, nn.Module, where / "kind")
    try:
        return made(**arguments)
    except (TypeError, ValueError) as error:
        raise where.error(f"{kind} cannot be made: {error}") from error
