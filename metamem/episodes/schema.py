"""The config of a meta-training over tasks: a module in the place of a network, an inner level with what episodes need.

A file with a `module:` at its top is one of these; everything else is as in any config (`metamem.config.schema`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from metamem.config.check import check_hierarchy, check_run
from metamem.config.convert import ByName
from metamem.config.load import Override, has_key, load_as
from metamem.config.schema import (
    Count,
    Fraction,
    HierarchyConfig,
    LevelConfig,
    Located,
    NonNegative,
    OptimizerConfig,
    Positive,
    RunConfig,
    RunTrainingConfig,
    Whole,
    to_dict,
)
from metamem.episodes.transforms import TRANSFORMS

EngineName = Literal["functional", "loop", "torchopt", "torchopt_meta", "higher", "implicit"]
OPTIMIZERS = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
}


@dataclass(frozen=True)
class EpisodeOptimizerConfig(OptimizerConfig):
    """The optimizer of the inner level (`sgd`, `adam`, `adamw`), or of a step level: any of torch.optim, in lower case,
    with further `options` of its own. `lr_per_step`: a learned rate has an entry for each inner update (MAML++)."""

    name: str  # pyright: ignore[reportIncompatibleVariableOverride]
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    nesterov: bool = False
    lr_per_step: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RateRouterConfig(Located):
    """Gates over (`per` unit × expert) that the rates of the inner level are multiplied by; `hold` moves nothing.

    `kind`: a softmax over experts (`dense`), its `k` largest (`topk`), or a mask (`binary`; sparse-MAML). `input`: what
    the gates come from, nothing or the `task`: its support loss and the norms of its gradients.
    """

    kind: Literal["dense", "topk", "binary"]
    experts: list[float] = field(default_factory=lambda: [1.0])
    per: Literal["level", "group", "tensor", "row", "element"] = "tensor"
    k: Count = 1
    hold: bool = True
    input: Literal["static", "task"] = "static"


@dataclass(frozen=True)
class EpisodeLevelConfig(LevelConfig):
    """A level; what it has beside the others is the inner level's: its engine and updates.

    The outer gradient flows through the gradients of the last `unroll` updates, and takes those before as constants: 0
    is first order (null: all). `proximal` holds fast weights to slow ones; the engine `implicit` needs it.
    """

    optimizer: EpisodeOptimizerConfig | None = None
    steps: Count = 1
    engine: EngineName = "functional"
    proximal: NonNegative = 0.0
    solver_steps: Count = 20
    solver_tolerance: Positive = 1e-6
    router: RateRouterConfig | None = None

    @property
    def unseen(self) -> bool:
        """Never: rates learn from every update, also from one whose gradient is a constant."""
        return False


@dataclass(frozen=True)
class EpisodeHierarchyConfig(HierarchyConfig):
    """The levels of a meta-training over tasks, and the groups that they address."""

    levels: Annotated[list[EpisodeLevelConfig], ByName(operator.attrgetter("speed"))]  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclass(frozen=True)
class EpisodeTrainingConfig(RunTrainingConfig):
    """Meta-training: `steps` outer steps over `batch` tasks each.

    Every `evaluate_every` steps and at the end (null: at the end) the loss of `evaluated_tasks` tasks after
    `evaluated_steps` inner updates is measured; the weights of the best of them are the run's, and training stops after
    `patience` evaluations without a better one (null: never). A step with a loss or gradient that is not finite moves
    nothing; the training stops at it where more than `skips` of them come one after the other. How many were skipped is
    logged. All that going on exactly needs is kept every `checkpoint_every` steps, of the last `keep_last` of them. It
    runs on a kind of `device`; where torchrun starts several processes, each has its share of the tasks, and all
    weights and optimizer states (`distributed: ddp`) or its part of them (`fsdp`). Metrics go to `trackers` too: names,
    or names and their options.
    """

    steps: Count = 10_000
    batch: Count = 25
    warmup: Whole = 0
    schedule: Literal["constant", "cosine"] = "constant"
    gradient_clip: Positive | None = None
    skips: Whole = 0
    log_every: Count = 100
    evaluate_every: Count | None = None
    evaluated_tasks: Annotated[int, "at least 2"] = 600
    evaluated_steps: list[Whole] = field(default_factory=lambda: [0, 1, 5, 10])
    patience: Count | None = None


@dataclass(frozen=True, kw_only=True)
class EpisodesConfig(RunConfig):
    """A whole meta-training over tasks. `module` is a registered kind, or the path of any `nn.Module`, and options."""

    module: dict[str, Any]
    hierarchy: EpisodeHierarchyConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    training: EpisodeTrainingConfig = field(default_factory=EpisodeTrainingConfig)

    @property
    def shape(self) -> Any:
        """The module, and what of the inner level has weights."""
        return [self.module, to_dict(self.inner.optimizer), to_dict(self.inner.router), self.inner.steps]

    @property
    def inner(self) -> EpisodeLevelConfig:
        """The inner level."""
        return next(level for level in self.hierarchy.levels if level.clock == "inner")


def is_episodes(path: Path | str) -> bool:
    """Whether a config file is one of a meta-training over tasks."""
    return has_key(path, "module")


def load_episodes(
    path: Path | str, overrides: list[str | Override] | list[str] | tuple[str, ...] = ()
) -> EpisodesConfig:
    """The config in a file, with overrides on top, as `metamem.load_config` does. Raises ConfigError."""
    config = load_as(EpisodesConfig, path, list(overrides))
    check_run(config)
    check_episodes(config)
    return config


def check_episodes(config: EpisodesConfig) -> None:
    """Raises ConfigError for what the types cannot say."""
    hierarchy = config.hierarchy
    if not isinstance(config.module.get("kind"), str):
        raise config.where.at("module", "kind").error("is missing: name a module kind, such as perceptron, or a class")
    if hierarchy.router is not None:
        raise (hierarchy.where / "router").error("is that of memories; the inner level of episodes has a router itself")
    check_hierarchy(hierarchy)
    clocks = [level.clock for level in hierarchy.levels]
    if clocks.count("inner") != 1:
        raise (hierarchy.where / "levels").error(
            f"episodes have one level on the clock 'inner', not {clocks.count('inner')}"
        )
    for level in hierarchy.levels:
        if level.clock not in ("inner", "step"):
            raise (level.where / "clock").error(f"{level.clock!r} does not pass in episodes (inner, step)")
        _check_level(level)
    if config.training.evaluated_tasks < 2:
        raise config.training.where.at("evaluated_tasks").error("must be at least 2: an interval is one over tasks")


def _check_level(level: EpisodeLevelConfig) -> None:
    inner, optimizer, where = level.clock == "inner", level.optimizer, level.where
    assert optimizer is not None
    known = TRANSFORMS if inner else OPTIMIZERS
    if optimizer.name not in known:
        raise where.at("optimizer", "name").unknown(
            f"there is no {level.clock} optimizer {optimizer.name!r}", optimizer.name, known
        )
    if inner:
        if level.period != 1:
            raise (where / "period").error("is 1 in episodes: the inner level makes `steps` updates on each task")
        if optimizer.decay_to != "zero":
            raise where.at("optimizer", "decay_to").error(
                "must be zero in episodes: `proximal` pulls to the slow weights"
            )
        if optimizer.options:
            raise where.at("optimizer", "options").error("are those of a step level's optimizer")
        return
    default = EpisodeLevelConfig(level.name, level.clock, level.objective, level.groups)
    for key in ("steps", "engine", "proximal", "solver_steps", "solver_tolerance", "router"):
        if getattr(level, key) != getattr(default, key):
            raise (where / key).error("is the inner level's")
    if optimizer.lr_per_step:
        raise where.at("optimizer", "lr_per_step").error("is of the inner level's learned rates")
