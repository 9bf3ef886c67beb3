"""The outer loop over tasks: `train_episodes(config)`, its run folder, its evaluations and the best checkpoint."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metamem.episodes.modules
import metamem.episodes.tasks  # noqa: F401  (fills the registry)
from metamem.collectives import World
from metamem.config import LevelConfig
from metamem.episodes.evaluation import Evaluation, evaluate
from metamem.episodes.learner import Learner, build_learner
from metamem.episodes.level import Batch, Episode
from metamem.episodes.parameters import task_losses
from metamem.episodes.registry import EPISODES, EpisodicTask
from metamem.episodes.schema import OPTIMIZERS, EpisodeOptimizerConfig, EpisodesConfig, load_episodes
from metamem.hierarchy import Calendar, OuterLevels
from metamem.hierarchy.replicas import Replicas
from metamem.memory.signals import Objectives
from metamem.training.checkpoint import load_checkpoint
from metamem.training.distributed import part_ways, replicas
from metamem.training.divergence import check_gradients, check_losses
from metamem.training.lock import hold
from metamem.training.loop import interruptible, rate_share
from metamem.training.resuming import Say, clear, go_on
from metamem.training.run import Run, writing
from metamem.training.run_folder import CHECKPOINT, CONFIG, check_run_folder, create_run
from metamem.training.snapshot import Training
from metamem.training.start import start


@dataclass(frozen=True)
class EpisodesProgress:
    """One outer step, for a progress bar."""

    step: int
    steps: int
    losses: dict[str, float]


@dataclass(frozen=True)
class EpisodesTrained:
    """A finished, stopped or interrupted training: the learner with the weights of its best evaluation, which is at
    `best`; the last evaluation of those weights, number of inner updates -> figures; how many outer steps were
    skipped."""

    learner: Learner
    folder: Path
    step: int
    best: int
    evaluation: dict[int, Evaluation]
    seconds: float
    interrupted: bool
    skipped: int


def build_episodes(config: EpisodesConfig) -> EpisodicTask:
    """The task of a config."""
    options = {key: value for key, value in config.task.items() if key != "name"}
    return EPISODES.build(config.task["name"], options, config.where / "task")


def train_episodes(
    config: EpisodesConfig,
    root: Path = Path("runs"),
    task: EpisodicTask | None = None,
    progress: Callable[[EpisodesProgress], None] | None = None,
) -> EpisodesTrained:
    """Meta-trains the learner of a config over tasks; a new folder has its config, metrics and best checkpoint.

    The best is by the loss of the first step level after the inner level's own number of updates. Ctrl-C ends the
    training after the step that it falls in, with a checkpoint of it. Raises Diverged where a loss, a gradient or a
    weight is not finite.
    """
    training = _training(config, task)
    folder = training.world.told(lambda: create_run(config, root))
    with hold(folder), writing(folder, training) as run:
        return _train(training, run, progress)


def resume_episodes(
    folder: Path,
    overrides: Sequence[str] = (),
    task: EpisodicTask | None = None,
    progress: Callable[[EpisodesProgress], None] | None = None,
    *,
    step: int | None = None,
    say: Say = lambda text: None,
) -> EpisodesTrained:
    """Goes on with a run as `metamem.training.resume` does."""
    check_run_folder(folder)
    with hold(folder):
        training = _training(load_episodes(folder / CONFIG, list(overrides)), task)
        since = go_on(folder, training, step, say)
        clear(folder, training)
        with writing(folder, training) as run:
            run.log("resume", **since)
            return _train(training, run, progress)


def _training(config: EpisodesConfig, task: EpisodicTask | None) -> Training[EpisodesConfig, Learner]:
    world = start(config)
    task = build_episodes(config) if task is None else task
    learner = build_learner(config)
    part_ways(config.seed, world)
    slow = replicas(learner, config.training, world)
    generator = torch.Generator().manual_seed(config.seed)
    return Training(config, learner, outer_levels(config, learner, slow), task, generator)


def _train(training: Training, run: Run, progress: Callable[[EpisodesProgress], None] | None = None) -> EpisodesTrained:
    config, learner, outer, task = training.config, training.model, training.outer, training.task
    settings, reached, world, slow = config.training, training.reached, training.world, outer.replicas
    asked, stop = on(world.device, task.evaluation(settings.evaluated_tasks)), False
    own = learner.level.steps
    counts = sorted({*settings.evaluated_steps, own})
    objectives = next(filter(None, outer.objectives.values()))
    found, started = dict[int, Evaluation](), time.perf_counter() - reached.seconds
    with interruptible() as interrupted:
        while reached.step < settings.steps and (settings.patience is None or reached.waited < settings.patience):
            step = reached.step + 1
            episode = task.sample(training.generator, settings.batch)
            with slow.whole():
                losses = outer.backward(_loss(learner, on(world.device, episode, world.rows(settings.batch)), world))
            share = rate_share(step, settings.steps, settings.warmup, settings.schedule)
            norms = outer.step(step, share, settings.gradient_clip)
            if not reached.skipped_over(chain(losses.values(), norms.values()), settings.skips):
                check_losses(losses, outer, config.hierarchy, step)
                check_gradients(norms, outer, config.hierarchy, step)
            reached.step, reached.seconds, last = step, time.perf_counter() - started, step == settings.steps
            if step % settings.log_every == 0 or last:
                run.log_step(losses, norms, skipped=reached.skipped)
            if progress is not None and world.first:
                progress(EpisodesProgress(step, settings.steps, losses))
            evaluated = last or (settings.evaluate_every is not None and step % settings.evaluate_every == 0)
            if evaluated:
                with slow.whole():
                    now = world.told(lambda: evaluate(learner, task, asked, counts, objectives))
                    row = evaluation_row(now, learner)
                run.log("evaluation", **row)
                if reached.evaluated(now[own].loss.mean):
                    found = now
            stop = world.any(bool(interrupted))
            if stop or evaluated or step % settings.checkpoint_every == 0:
                run.save()
            if stop:
                break
    learner = slow.trained(lambda: build_learner(config))
    best = world.told(lambda: load_checkpoint(learner, config, run.folder / CHECKPOINT))
    world.alike(list(learner.state_dict().values()))
    found = found or world.told(lambda: evaluate(learner, task, asked, counts, objectives))
    seconds, skipped = reached.seconds, reached.skipped
    return EpisodesTrained(learner, run.folder, reached.step, best, found, seconds, stop, skipped)


def on(device: torch.device, episode: Episode, rows: slice = slice(None)) -> Episode:
    """Some of the tasks of an episode, on a device."""
    return Episode(*(Batch(*(tensor[rows].to(device) for tensor in batch)) for batch in episode))


def _loss(learner: Learner, episode: Episode, world: World) -> Callable[[Objectives], Tensor]:
    """This process's share of the mean over all tasks."""
    predictions = learner(episode)
    return lambda objectives: task_losses(objectives, predictions, episode.query.targets).mean() / world.size


def outer_levels(config: EpisodesConfig, learner: Learner, slow: Replicas | None = None) -> OuterLevels:
    """The step levels of a config over a learner's slow weights.

    Raises ConfigError for one that steps on batch norm with running statistics, which evaluation would take from a
    module that never gathered any.
    """
    for name, part in learner.module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            raise (config.where / "module").error(
                f"{name!r} ({type(part).__name__}) keeps running statistics, which every task has of its own: make it "
                "with track_running_stats=False, and it is the norm of the examples at hand"
            )
    calendar = Calendar(config.training.steps, {"step": range(1, sys.maxsize)})
    return OuterLevels(config, learner, calendar, outer_optimizer, slow)


def outer_optimizer(level: LevelConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer of a step level, with the options that the config gives. Raises ConfigError for one that the
    optimizer does not take."""
    settings = level.optimizer
    assert isinstance(settings, EpisodeOptimizerConfig) and not isinstance(settings.lr, str)
    options: dict[str, Any] = dict(settings.options)
    if settings.weight_decay:
        options["weight_decay"] = settings.weight_decay
    if settings.name == "sgd":
        options |= {"momentum": settings.momentum, "nesterov": settings.nesterov}
    elif settings.name in ("adam", "adamw"):
        options |= {"betas": settings.betas, "eps": settings.eps}
    try:
        make: Any = OPTIMIZERS[settings.name]
        return make([{"params": parameters, "initial_lr": settings.lr}], lr=settings.lr, **options)
    except (TypeError, ValueError) as error:
        raise level.where.at("optimizer", "options").error(f"torch.optim refuses {options}: {error}") from error


def evaluation_row(found: dict[int, Evaluation], learner: Learner) -> dict[str, float]:
    """An evaluation as a row of metrics: figures and their intervals, diverged tasks, the share of negative rates."""
    row: dict[str, float] = {}
    for count, evaluation in found.items():
        for name, estimate in {"loss": evaluation.loss, **evaluation.figures}.items():
            row[f"{name}/updates-{count}"] = estimate.mean
            row[f"{name}/updates-{count}/interval"] = estimate.interval
        row[f"diverged/updates-{count}"] = evaluation.diverged
    if learner.rates is not None:
        row["negative_rates"] = learner.rates.negative()  # pyright: ignore[reportCallIssue]
    return {name: value for name, value in row.items() if math.isfinite(value)}


def load_episodes_run(folder: Path) -> tuple[Learner, EpisodesConfig]:
    """The learner of a run with its best weights, and its config."""
    check_run_folder(folder)
    config = load_episodes(folder / CONFIG)
    learner = build_learner(config)
    load_checkpoint(learner, config, folder / CHECKPOINT)
    return learner, config
