"""A learner: a module with the rates, masks and routers of its inner loop, all of them slow weights."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metamem.config import ConfigError, group_members, resolve_objectives
from metamem.config.check import match_names
from metamem.episodes.engines import adapt, predict, refuse
from metamem.episodes.gates import RateRouter
from metamem.episodes.level import Adapted, Batch, EngineError, Episode, EpisodeLevel, InnerOptimizer
from metamem.episodes.rates import Rates
from metamem.episodes.registry import build_module
from metamem.episodes.schema import EpisodeLevelConfig, EpisodeOptimizerConfig, EpisodesConfig
from metamem.out_of_memory import fits

MODULE = "module."  # before the names of a module's parameters, as groups see them


class Learner(nn.Module):
    """A module that adapts: `learner(episode) -> predictions` on the query set after the inner loop on the support set.

    Its slow weights are those of `module` and, where they learn, of `rates`.
    """

    def __init__(self, module: nn.Module, level: EpisodeLevel) -> None:
        super().__init__()
        self.module = module
        self.rates = level.rates if isinstance(level.rates, nn.Module) else None
        self.level = level
        refuse(module, level)

    def adapt(self, support: Batch, steps: int | None = None) -> Adapted:
        """Fast parameters after `steps` updates, those of the level where not given."""
        return adapt(self.module, support, self._level(steps))

    def forward(self, episode: Episode, steps: int | None = None) -> Float[Tensor, "tasks examples *out"]:
        """Predictions for the query set, [tasks, examples, …]."""
        return predict(self.module, self.adapt(episode.support, steps), episode.query.inputs, self._level(steps))

    def _level(self, steps: int | None) -> EpisodeLevel:
        if steps is None or steps == self.level.steps:
            return self.level
        # Evaluation takes other numbers of updates: the outer gradient has no say in them.
        return dataclasses.replace(self.level, steps=steps, unroll=None)


def build_learner(config: EpisodesConfig) -> Learner:
    """The learner of a config, its weights drawn with the config's seed.

    Raises ConfigError for what cannot be, among it what the engine cannot do with this module.
    """
    torch.manual_seed(config.seed)
    with fits():
        module = build_module(config.module, config.where / "module")
    level = config.inner
    try:
        return Learner(module, _level(config, level, module))
    except ConfigError:
        raise
    except EngineError as error:
        raise (level.where / "engine").error(str(error)) from error


def _level(config: EpisodesConfig, level: EpisodeLevelConfig, module: nn.Module) -> EpisodeLevel:
    settings, names = level.optimizer, [MODULE + name for name, _ in module.named_parameters()]
    assert settings is not None
    groups = config.hierarchy.groups
    of: dict[str, str] = {}
    for group in level.groups:
        for name in match_names(groups[group].match, names):
            of.setdefault(name.removeprefix(MODULE), group)
    if not of:
        group_members(names, config.hierarchy)  # names the glob that matches nothing, where that is the reason
        raise (level.where / "groups").error(f"no parameter of the module is in the groups of level {level.name!r}")
    moving = {name: p for name, p in module.named_parameters() if name in of}
    return EpisodeLevel(
        resolve_objectives(config)[level.name],
        steps=level.steps,
        optimizer=InnerOptimizer(
            settings.name,  # pyright: ignore[reportArgumentType]
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
        ),
        rates=_rates(level, settings, moving, of),
        members=tuple(moving),
        unroll=level.unroll,
        engine=level.engine,
        proximal=level.proximal,
        solver_steps=level.solver_steps,
        solver_tolerance=level.solver_tolerance,
    )


def _rates(
    level: EpisodeLevelConfig, settings: EpisodeOptimizerConfig, moving: dict[str, nn.Parameter], of: dict[str, str]
) -> Rates | float:
    if settings.lr != "learned" and level.router is None:
        return settings.lr
    learned = settings.lr == "learned"
    if not learned and settings.lr_per_step:
        raise level.where.at("optimizer", "lr_per_step").error("is of a learned rate, and lr is a number")
    return Rates(
        moving,
        settings.lr_initial if settings.lr == "learned" else settings.lr,
        learned=learned,
        per=settings.lr_per,
        per_step=settings.lr_per_step,
        positive=learned and settings.lr_sign == "positive",
        steps=level.steps,
        groups=of,
        multiplier=_router(level, moving, of),
    )


def _router(level: EpisodeLevelConfig, moving: dict[str, nn.Parameter], of: dict[str, str]) -> RateRouter | None:
    settings = level.router
    if settings is None:
        return None
    try:
        return RateRouter(
            moving,
            settings.kind,
            experts=settings.experts,
            per=settings.per,
            k=settings.k,
            hold=settings.hold,
            input=settings.input,
            groups=of,
        )
    except ValueError as error:
        raise (level.where / "router").error(str(error)) from error
