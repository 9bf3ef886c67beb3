"""Meta-training: the outer loop over a config's outer levels, through the inner updates of its other levels."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import metamem.tasks  # noqa: F401  (fills the registry)
from metamem.config import Config, UserError
from metamem.hierarchy import OuterLevels, calendar_of, inner_loop, loss_per_token
from metamem.memory.base import Out
from metamem.memory.signals import Objectives
from metamem.network import Network, build
from metamem.registry import TASKS
from metamem.targets import mean_asked
from metamem.training.checkpoint import load_checkpoint, save_checkpoint
from metamem.training.run_folder import CHECKPOINT, METRICS, Metrics, create_run, run_config

LAST_RATE = 0.05  # of a cosine schedule, as a share of the rate


class Diverged(UserError):
    """A loss or gradient that is not finite at outer step `step`; the checkpoint before it stays."""

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Progress:
    """One outer step, for a progress bar: loss in nats per token of each outer level, tokens per second so far."""

    step: int
    steps: int
    losses: dict[str, float]
    tokens_per_second: float


@dataclass(frozen=True)
class Trained:
    """A finished (or interrupted) training: the model, its run folder, the last completed step, the seconds."""

    model: Network
    folder: Path
    step: int
    seconds: float
    interrupted: bool


def build_task(config: Config) -> Any:
    """The task of a config, its texts read."""
    options = {key: value for key, value in config.task.items() if key != "name"}
    return TASKS.build(config.task["name"], options, config.where / "task")


def train(
    config: Config, root: Path = Path("runs"), task: Any = None, progress: Callable[[Progress], None] | None = None
) -> Trained:
    """Meta-trains the model of a config and leaves config, metrics and checkpoint in a new run folder.

    Everything that can be wrong with the config is found before the folder is made. Ctrl-C ends the training after
    the step that it falls in, and leaves a checkpoint of it. Raises Diverged where a loss or gradient is not finite.
    """
    settings = config.training
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    task = build_task(config) if task is None else task
    model = build(config)
    outer = OuterLevels(config, model, calendar_of(config, task))
    forward = inner_loop(config, model).run
    evaluated_after = _evaluated_after(config, task)
    evaluate = _evaluation(config, model, task, forward) if evaluated_after else None
    drawn = batches(config, task)
    first = next(drawn)

    folder = create_run(config, root)
    step, saved, started = 0, 0, time.perf_counter()
    with closing(Metrics(folder / METRICS)) as metrics, interruptible() as interrupted:
        if evaluate is not None and 0 in evaluated_after:
            metrics.log(kind="evaluation", step=0, **evaluate(0))
        for step, (inputs, targets) in enumerate(chain([first], drawn), start=1):
            out = forward(inputs, targets)
            losses = outer.backward(partial(_loss, out.y, targets), out.aux)
            check_finite(losses, step, folder, saved, "loss")
            share = rate_share(step, settings.steps, settings.warmup, settings.schedule)
            norms = outer.step(step, share, settings.gradient_clip)
            check_finite(norms, step, folder, saved, "gradient")
            seconds = time.perf_counter() - started
            rate = step * inputs.numel() / seconds
            if step % settings.log_every == 0 or step == settings.steps:
                row = {f"loss/{name}": loss for name, loss in losses.items()}
                row |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
                row |= _means(out.aux)
                metrics.log(kind="train", step=step, seconds=round(seconds, 3), tokens_per_second=round(rate), **row)
            if progress is not None:
                progress(Progress(step, settings.steps, losses, rate))
            if evaluate is not None and step in evaluated_after:
                metrics.log(kind="evaluation", step=step, **evaluate(step))
            stop = bool(interrupted)  # asked once: a key pressed later stops the next step, with its checkpoint
            if stop or step == settings.steps or step % settings.checkpoint_every == 0:
                save_checkpoint(model, config, step, folder / CHECKPOINT)
                saved = step
            if stop:
                break
    return Trained(model, folder, step, time.perf_counter() - started, bool(interrupted))


def load_run(folder: Path) -> tuple[Network, Config]:
    """The model of a run with its last checkpoint's weights, and its config. Raises UserError for what is none."""
    config = run_config(folder)
    model = build(config)
    load_checkpoint(model, config, folder / CHECKPOINT)
    return model, config


def batches(config: Config, task: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of every outer step, from the task that it is in where a task is several."""
    settings, generator = config.training, torch.Generator().manual_seed(config.seed)
    for step in range(1, settings.steps + 1):
        which = {"task": task.task_at(step)} if hasattr(task, "task_at") else {}
        yield task.sample(generator, settings.batch, settings.length, **which)


def _evaluated_after(config: Config, task: Any) -> set[int]:
    """The outer steps after which the model is evaluated: every so many, the last, and, where a task is several, the
    last of each of them and none, before any."""
    steps, every = config.training.steps, config.training.evaluate_every
    if every is None:
        return set()
    after = {*range(every, steps + 1, every), steps}
    if hasattr(task, "task_at"):
        after |= {0, *(step for step in range(1, steps) if task.task_at(step) != task.task_at(step + 1))}
    return after


def _evaluation(
    config: Config, model: Network, task: Any, forward: Callable[[Tensor, Tensor], Out]
) -> Callable[[int], dict[str, float]]:
    """The task's evaluation of the model after an outer step; after the last, with its summary of all evaluations,
    where it has one."""
    settings, made = config.training, dict[int, dict[str, float]]()
    if not hasattr(task, "evaluate"):
        raise (settings.where / "evaluate_every").error(f"the task {config.task['name']!r} has no evaluation; set null")

    def evaluate(step: int) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            found = task.evaluate(lambda inputs, targets: forward(inputs, targets).y, settings.length)
        model.train()
        made[step] = found
        return found | task.summarise(made) if step == settings.steps and hasattr(task, "summarise") else found

    return evaluate


def _loss(pred: Tensor, targets: Tensor, objectives: Objectives) -> Tensor:
    return mean_asked(loss_per_token(objectives, pred, targets), targets)


def _means(aux: Mapping[str, Tensor]) -> dict[str, float]:
    """What was measured as means over batch and time, `name.<index>` where it is several numbers a token; what has more
    axes is for objectives, and not logged."""
    rows: dict[str, float] = {}
    for name, values in aux.items():
        if values.ndim < 3:
            rows[name] = float(values.detach().mean())
        elif values.ndim == 3:
            means = values.detach().mean((0, 1)).tolist()
            rows |= {f"{name}.{index}": mean for index, mean in enumerate(means)}
    return rows


def rate_share(step: int, steps: int, warmup: int, schedule: Literal["constant", "cosine"]) -> float:
    """The share of its rate that an outer level uses at an outer step."""
    warm = min(1.0, step / warmup) if warmup else 1.0
    if schedule == "constant":
        return warm
    return warm * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def check_finite(values: dict[str, float], step: int, folder: Path, saved: int, what: str) -> None:
    """Raises Diverged where a level's value is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            kept = f"the checkpoint of step {saved} stays in {folder}" if saved else "no checkpoint was made yet"
            raise Diverged(
                f"step {step}: the {what} of level {name!r} is {value}; {kept}; lower the level's lr, or gradient_clip",
                step,
            )


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Ctrl-C fills the list instead of raising, so that nothing is left half done; a second one raises."""
    pressed: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: Ctrl-C is somebody else's
        yield pressed
        return
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
