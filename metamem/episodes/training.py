"""The outer loop over tasks: `train_episodes(config)`, its run folder, its evaluations and the best checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metamem.episodes.modules
import metamem.episodes.tasks  # noqa: F401  (fills the registry)
from metamem.config import LevelConfig, UserError, to_dict
from metamem.episodes.evaluation import Evaluation, evaluate
from metamem.episodes.learner import Learner, build_learner
from metamem.episodes.parameters import task_losses
from metamem.episodes.registry import EPISODES, EpisodicTask
from metamem.episodes.schema import OPTIMIZERS, EpisodeOptimizerConfig, EpisodesConfig, load_episodes
from metamem.hierarchy import Calendar, OuterLevels
from metamem.memory.signals import Objectives
from metamem.state import StateError, check_like, load_state, save_state
from metamem.training.loop import check_finite, interruptible, rate_share
from metamem.training.run_folder import CHECKPOINT, CONFIG, METRICS, Metrics, create_run


@dataclass(frozen=True)
class EpisodesProgress:
    """One outer step, for a progress bar."""

    step: int
    steps: int
    losses: dict[str, float]


@dataclass(frozen=True)
class EpisodesTrained:
    """A finished, stopped or interrupted training: the learner with the weights of its best evaluation, which is at
    `best`; the last evaluation of those weights, number of inner updates -> figures; how many outer
    steps were skipped."""

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
    training after the step that it falls in, with an evaluation. Raises Diverged where a loss or gradient is not
    finite.
    """
    settings = config.training
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    task = build_episodes(config) if task is None else task
    learner = build_learner(config)
    outer = outer_levels(config, learner)
    asked = task.evaluation(settings.evaluated_tasks)
    own = learner.level.steps
    counts = sorted({*settings.evaluated_steps, own})
    objectives = next(filter(None, outer.objectives.values()))
    generator = torch.Generator().manual_seed(config.seed)
    folder = create_run(config, root)
    in_a_row = skipped = 0
    step, best, waited, found, started = 0, 0, 0, dict[int, Evaluation](), time.perf_counter()
    with closing(Metrics(folder / METRICS)) as metrics, interruptible() as interrupted:
        for step in range(1, settings.steps + 1):
            losses = outer.backward(_loss(learner, task, generator, settings.batch))
            share = rate_share(step, settings.steps, settings.warmup, settings.schedule)
            norms = outer.step(step, share, settings.gradient_clip)
            if all(map(math.isfinite, chain(losses.values(), norms.values()))):
                in_a_row = 0
            else:
                in_a_row, skipped = in_a_row + 1, skipped + 1
                if in_a_row > settings.skips:
                    check_finite(losses, step, folder, best, "loss")
                    check_finite(norms, step, folder, best, "gradient")
            last = step == settings.steps or bool(interrupted)
            if step % settings.log_every == 0 or last:
                row = {f"loss/{name}": loss for name, loss in losses.items()}
                row |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
                seconds = round(time.perf_counter() - started, 3)
                metrics.log(kind="train", step=step, seconds=seconds, skipped=skipped, **row)
            if progress is not None:
                progress(EpisodesProgress(step, settings.steps, losses))
            if last or (settings.evaluate_every is not None and step % settings.evaluate_every == 0):
                now = evaluate(learner, task, asked, counts, objectives)
                metrics.log(kind="evaluation", step=step, **evaluation_row(now, learner))
                if not found or now[own].loss.mean < found[own].loss.mean:
                    best, waited, found = step, 0, now
                    save_learner(learner, config, step, folder / CHECKPOINT)
                else:
                    waited += 1
                last = last or waited == settings.patience
            if last:
                break
    load_learner(learner, config, folder / CHECKPOINT)
    seconds = time.perf_counter() - started
    return EpisodesTrained(learner, folder, step, best, found, seconds, bool(interrupted), skipped)


def _loss(
    learner: Learner, task: EpisodicTask, generator: torch.Generator, batch: int
) -> Callable[[Objectives], Tensor]:
    episode = task.sample(generator, batch)
    predictions = learner(episode)
    return lambda objectives: task_losses(objectives, predictions, episode.query.targets).mean()


def outer_levels(config: EpisodesConfig, learner: Learner) -> OuterLevels:
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
    return OuterLevels(config, learner, calendar, outer_optimizer)


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


def save_learner(learner: Learner, config: EpisodesConfig, step: int, path: Path) -> None:
    """Writes a learner's weights, whole or not at all."""
    save_state(dict(learner.state_dict()), path, {"step": str(step), "learner": fingerprint(config)})


def load_learner(learner: Learner, config: EpisodesConfig, path: Path) -> int:
    """Loads weights into a learner and gives their step. Raises UserError, the learner untouched."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; its run ended before the first evaluation: train again")
    try:
        weights, metadata = load_state(path)
        check_like(weights, dict(learner.state_dict()), str(path))
    except StateError as error:
        raise UserError(str(error).replace("state file", "checkpoint")) from None
    if metadata.get("learner") != fingerprint(config):
        raise UserError(f"{path}: the checkpoint was made under another config; its run folder has the right one")
    learner.load_state_dict(weights)
    return int(metadata["step"])


def fingerprint(config: EpisodesConfig) -> str:
    """What a checkpoint must agree on with its config: the module, and what of the inner level has weights."""
    told = [config.module, to_dict(config.inner.optimizer), to_dict(config.inner.router), config.inner.steps]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def load_episodes_run(folder: Path) -> tuple[Learner, EpisodesConfig]:
    """The learner of a run with its best weights, and its config."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no run folder (it has no {CONFIG}); give one that `metamem train` made")
    config = load_episodes(folder / CONFIG)
    learner = build_learner(config)
    load_learner(learner, config, folder / CHECKPOINT)
    return learner, config
