"""The calendar of a training: after which outer steps its epochs and tasks end, and with them which levels fire.

- `step`    every outer step
- `epoch`   `training.steps_per_epoch` outer steps, or else as many as `task.steps_per_epoch(batch, length)` says: those
            in which as much is read as the task's data have
- `task`    a task that is several says which one an outer step trains, `task_at(step) -> int`; one ends where that
            number changes
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from metamem.config import Config, LevelConfig
from metamem.config.schema import Clock
from metamem.registry import TASKS


@dataclass(frozen=True)
class Calendar:
    """A training of `steps` outer steps, counted from 1, and for each clock those that its units end with.

    A level of period P fires at the end of every P-th unit. The training's end ends every period: a level fires there
    on what it has gathered since, fewer units than P though they may be.
    """

    steps: int
    ends: Mapping[Clock, Sequence[int]]

    def fires(self, level: LevelConfig, step: int) -> bool:
        """Whether the level fires after this outer step."""
        return step == self.steps or step in self.ends[level.clock][level.period - 1 :: level.period]

    def firings(self, level: LevelConfig) -> list[int]:
        """The outer steps of the training after which the level fires."""
        return [step for step in range(1, self.steps + 1) if self.fires(level, step)]


def calendar_of(config: Config, task: Any = None) -> Calendar:
    """The calendar of a config's training on its task.

    Raises ConfigError for a level on epochs where nothing says how long one is, and for one on tasks where the task
    tells none apart.
    """
    steps, ends = config.training.steps, dict[Clock, Sequence[int]]()
    ends["step"] = range(1, sys.maxsize)
    for level in config.hierarchy.levels:
        if level.clock == "epoch":
            epoch = _steps_per_epoch(config, level, task)
            ends["epoch"] = range(epoch, sys.maxsize, epoch)
        if level.clock == "task":
            ends["task"] = _task_ends(config, level, task)
    return Calendar(steps, ends)


def _steps_per_epoch(config: Config, level: LevelConfig, task: Any) -> int:
    settings = config.training
    if settings.steps_per_epoch is not None:
        return settings.steps_per_epoch
    if not hasattr(task, "steps_per_epoch"):
        raise (level.where / "clock").error(
            f"nothing says how long an epoch is: the data of the task {config.task['name']!r} have no end; "
            "set training.steps_per_epoch"
        )
    return task.steps_per_epoch(settings.batch, settings.length)


def _task_ends(config: Config, level: LevelConfig, task: Any) -> tuple[int, ...]:
    if not hasattr(task, "task_at"):
        able = [name for name in TASKS if hasattr(TASKS.get(name), "task_at")]
        raise (level.where / "clock").error(
            f"the task {config.task['name']!r} is one that never ends; a level on the clock 'task' needs a task that "
            f"is several and has task_at(step){': ' + ', '.join(able) if able else ''}"
        )
    running = [task.task_at(step) for step in range(1, config.training.steps + 1)]
    return tuple(step for step, (now, then) in enumerate(pairwise(running), start=1) if now != then)
