"""Meta-training: the outer loop over a config's outer levels, through the inner updates of its other levels."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import metamem.tasks  # noqa: F401  (fills the registry)
from metamem.config import Config, load_config
from metamem.hierarchy import InnerLoop, OuterLevels, calendar_of, inner_loop, loss_per_token
from metamem.launch import PeerLost
from metamem.memory.base import Out
from metamem.memory.signals import Objectives
from metamem.network import Network, build
from metamem.registry import TASKS
from metamem.targets import asked
from metamem.training.checkpoint import load_checkpoint
from metamem.training.distributed import part_ways, replicas
from metamem.training.divergence import check_gradients, check_losses
from metamem.training.lock import hold
from metamem.training.resuming import Say, clear, go_on
from metamem.training.run import Run, writing
from metamem.training.run_folder import CHECKPOINT, CONFIG, check_run_folder, create_run, run_config
from metamem.training.snapshot import Training
from metamem.training.start import start

LAST_RATE = 0.05  # of a cosine schedule, as a share of the rate


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
    """Meta-trains the model of a config and leaves config, metrics and checkpoints in a new run folder.

    Everything that can be wrong with the config is found before the folder is made. Ctrl-C ends the training after
    the step that it falls in, and leaves a checkpoint of it. Raises Diverged where a loss, a gradient or a weight is
    not finite.
    """
    loop = _Loop.of(config, task)
    drawn = loop.batches()
    folder = loop.training.world.told(lambda: create_run(config, root))
    with hold(folder), writing(folder, loop.training) as run:
        return loop.run(run, drawn, progress)


def resume(
    folder: Path,
    overrides: Sequence[str] = (),
    task: Any = None,
    progress: Callable[[Progress], None] | None = None,
    *,
    step: int | None = None,
    say: Say = lambda text: None,
) -> Trained:
    """Goes on with a run from its last checkpoint, or that of a step, as if nothing had ended it: with the same config,
    code and threads to the same weights, bit for bit.

    What has changed since, by an override or otherwise, is said to `say`. Raises CheckpointError for a checkpoint that
    is damaged or does not fit, RunHeld where another process is writing the run, and what `train` raises.
    """
    check_run_folder(folder)
    with hold(folder):
        loop = _Loop.of(load_config(folder / CONFIG, overrides), task)
        since = go_on(folder, loop.training, step, say)
        drawn = loop.batches()
        clear(folder, loop.training)
        with writing(folder, loop.training) as run:
            run.log("resume", **since)
            return loop.run(run, drawn, progress)


@dataclass(frozen=True)
class _Loop:
    """A training and what its steps need: nothing of it is written yet."""

    training: Training[Config, Network]
    inner: InnerLoop
    evaluated_after: set[int]
    evaluate: Callable[[int], dict[str, float]] | None

    @classmethod
    def of(cls, config: Config, task: Any = None) -> _Loop:
        world = start(config)
        task = build_task(config) if task is None else task
        model = build(config)
        part_ways(config.seed, world)
        slow = replicas(model, config.training, world)
        outer = OuterLevels(config, model, calendar_of(config, task), replicas=slow)
        inner = inner_loop(config, model, world)
        training = Training(config, model, outer, task, torch.Generator().manual_seed(config.seed))
        evaluated_after = _evaluated_after(config, task)
        evaluate = _evaluation(training, inner.alone().run) if evaluated_after else None
        return cls(training, inner, evaluated_after, evaluate)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that are left, the first drawn at once: what the task refuses is refused before all else."""
        training = self.training
        drawn = batches(training.config, training.task, training.generator, training.reached.step)
        return chain([first] if (first := next(drawn, None)) else [], drawn)

    def run(
        self, run: Run, drawn: Iterator[tuple[Tensor, Tensor]], progress: Callable[[Progress], None] | None
    ) -> Trained:
        training, reached = self.training, self.training.reached
        config, settings, world = training.config, training.config.training, training.world
        slow, stop = training.outer.replicas, False
        started = time.perf_counter() - reached.seconds
        with interruptible() as interrupted:
            if 0 in self.evaluated_after and reached.step == 0:
                self._evaluate(run)
            for step, batch in enumerate(drawn, start=reached.step + 1):
                count, rows = asked(batch[1]).sum(), world.rows(len(batch[0]))
                inputs, targets = (tensor[rows].to(world.device) for tensor in batch)
                with slow.whole():
                    out = self.inner.run(inputs, targets)
                    losses = training.outer.backward(partial(_loss, out.y, targets, count), out.aux)
                check_losses(losses, training.outer, config.hierarchy, step)
                share = rate_share(step, settings.steps, settings.warmup, settings.schedule)
                norms = training.outer.step(step, share, settings.gradient_clip)
                check_gradients(norms, training.outer, config.hierarchy, step)
                reached.step, reached.seconds = step, time.perf_counter() - started
                rate = step * batch[0].numel() / reached.seconds
                if step % settings.log_every == 0 or step == settings.steps:
                    run.log_step(losses, norms, tokens_per_second=round(rate), **world.means(_means(out.aux)))
                if progress is not None and world.first:
                    progress(Progress(step, settings.steps, losses, rate))
                best = step in self.evaluated_after and self._evaluate(run)
                # Asked once: a key pressed later stops the next step, with its checkpoint.
                stop = world.any(bool(interrupted))
                if stop or best or step == settings.steps or step % settings.checkpoint_every == 0:
                    run.save()
                if stop:
                    break
        model = slow.trained(lambda: build(config))
        return Trained(model, run.folder, reached.step, reached.seconds, stop)

    def _evaluate(self, run: Run) -> bool:
        """Evaluates the model, logs it, and says whether it is the best so far."""
        assert self.evaluate is not None
        settings, reached = self.training.config.training, self.training.reached
        with self.training.outer.replicas.whole():
            found = self.training.world.told(partial(self.evaluate, reached.step))
        run.log("evaluation", **found)
        name = settings.best_metric
        if name is None or reached.step == 0:
            return False
        if name not in found:
            raise (settings.where / "best_metric").unknown("the evaluation measures no such thing", name, found)
        return reached.evaluated(found[name], settings.best_mode == "max")


def load_run(folder: Path) -> tuple[Network, Config]:
    """The model of a run with its last checkpoint's weights, and its config. Raises UserError for what is none."""
    config = run_config(folder)
    model = build(config)
    load_checkpoint(model, config, folder / CHECKPOINT)
    return model, config


def batches(
    config: Config, task: Any, generator: torch.Generator | None = None, after: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of every outer step after one, from the task that it is in where a task is several; the
    generator stands where that step has left it (default: at the config's seed)."""
    settings = config.training
    generator = torch.Generator().manual_seed(config.seed) if generator is None else generator
    for step in range(after + 1, settings.steps + 1):
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
    training: Training[Config, Network], forward: Callable[[Tensor, Tensor], Out]
) -> Callable[[int], dict[str, float]]:
    """The task's evaluation of the model after an outer step; after the last, with its summary of all evaluations,
    where it has one."""
    config, task, model = training.config, training.task, training.model
    settings, made = config.training, training.reached.evaluations
    if not hasattr(task, "evaluate"):
        raise (settings.where / "evaluate_every").error(f"the task {config.task['name']!r} has no evaluation; set null")

    device = training.world.device

    def predict(inputs: Tensor, targets: Tensor) -> Tensor:
        return forward(inputs.to(device), targets.to(device)).y.to(inputs.device)

    def evaluate(step: int) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            found = task.evaluate(predict, settings.length)
        model.train()
        made[step] = found
        return found | task.summarise(made) if step == settings.steps and hasattr(task, "summarise") else found

    return evaluate


def _loss(pred: Tensor, targets: Tensor, count: Tensor, objectives: Objectives) -> Tensor:
    """This process's share of the mean over the `count` positions that are asked in all rows."""
    return loss_per_token(objectives, pred, targets).sum() / count.clamp(min=1)


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


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Ctrl-C, or SIGTERM, fills the list instead of ending the process, so that nothing is left half done; a second
    one raises."""
    pressed: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: Ctrl-C is somebody else's
        yield pressed
        return
    try:
        yield pressed
    except PeerLost:
        if pressed:  # the others were asked to end too, and have
            raise SystemExit(128 + pressed[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
