"""Outer levels: slow weights, each owned by one level, which steps on the mean gradient of its own objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from metamem.config import Config, LevelConfig, RunConfig, measured_objectives, ownership, resolve_objectives
from metamem.config.resolve import Objective
from metamem.hierarchy.calendar import Calendar, calendar_of
from metamem.hierarchy.objectives import measured_loss
from metamem.memory.signals import Objectives


@dataclass
class Gathered:
    """What a level has gathered since it last fired: the sum of its gradients, None where none came, and the steps."""

    sums: list[Tensor | None]
    steps: int


class OuterLevels:
    """The outer levels of a config: each owns slow weights, and has an objective, an optimizer, a clock and a period.

    A level gathers the gradient of its own objective over every outer step since it last fired, in a buffer of its own,
    and fires where the calendar says so. Without a calendar it is the config's, for what it says of epochs; `make`
    makes a level's optimizer, whose groups have an `initial_lr`.
    """

    def __init__(
        self,
        config: RunConfig,
        network: nn.Module,
        calendar: Calendar | None = None,
        make: Callable[[LevelConfig, list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ) -> None:
        parameters = dict(network.named_parameters())
        owned, objectives = ownership(parameters, config.hierarchy), resolve_objectives(config)
        if calendar is None:
            assert isinstance(config, Config), "a run of another kind has a calendar of its own"
            calendar = calendar_of(config)
        self.calendar = calendar
        self.levels = [level for level in config.hierarchy.levels if level.outer]
        self.parameters = {level.name: [parameters[name] for name in owned[level.name]] for level in self.levels}
        self.objectives = {level.name: objectives[level.name] for level in self.levels}
        self.measured = measured_objectives(config)
        self.optimizers = {
            level.name: (make or _optimizer)(level, self.parameters[level.name]) for level in self.levels
        }
        self.gathered = {level.name: self._nothing(level) for level in self.levels}

    def distinct(self) -> Iterator[tuple[Objectives, dict[str | Objective, float], list[LevelConfig]]]:
        """The distinct objectives, of tokens and of what memories measured, with the levels that have each."""
        groups: dict[tuple, list[LevelConfig]] = {}
        for level in self.levels:
            key = tuple(self.objectives[level.name].items()), tuple(self.measured[level.name].items())
            groups.setdefault(key, []).append(level)
        for (objectives, measured), levels in groups.items():
            yield dict(objectives), dict(measured), levels

    def backward(
        self, loss: Callable[[Objectives], Tensor], aux: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, float]:
        """Adds to every level's gradient that of its own loss: `loss` of its objectives, and what it adds of the `aux`
        that the memories measured. Gives the loss per level."""
        values, groups = {}, []
        for objectives, measured, levels in self.distinct():
            value = measured_loss(measured, aux) + (loss(objectives) if objectives else 0.0)
            groups.append((torch.as_tensor(value), levels))
        for index, (value, levels) in enumerate(groups):
            owners = [(self.gathered[level.name], self.parameters[level.name]) for level in levels]
            mine = [(own, i, p) for own, parameters in owners for i, p in enumerate(parameters) if p.requires_grad]
            more = index + 1 < len(groups)
            gradients = torch.autograd.grad(value, [p for *_, p in mine], retain_graph=more, allow_unused=True)
            for (own, i, _), gradient in zip(mine, gradients, strict=True):
                if gradient is not None:
                    own.sums[i] = gradient if (before := own.sums[i]) is None else before + gradient
            values.update({level.name: float(value.detach()) for level in levels})
        return values

    def step(self, step: int, scale: float, clip: float | None) -> dict[str, float]:
        """After outer step `step` (from 1): every level that fires takes its optimizer's step on the mean gradient of
        the steps since it last did, the rate times `scale`; gives the gradient norm of each. Nothing moves where that
        is not finite."""
        norms = {}
        for level in self.levels:
            own = self.gathered[level.name]
            own.steps += 1
            if self.calendar.fires(level, step):
                norms[level.name] = self._fire(level, own, scale, clip)
                self.gathered[level.name] = self._nothing(level)
        return norms

    def _fire(self, level: LevelConfig, own: Gathered, scale: float, clip: float | None) -> float:
        parameters, optimizer = self.parameters[level.name], self.optimizers[level.name]
        for parameter, total in zip(parameters, own.sums, strict=True):
            parameter.grad = None if total is None else total / own.steps
        norm = nn.utils.clip_grad_norm_(parameters, clip if clip is not None else float("inf")).item()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        if math.isfinite(norm):  # else the weights stay as they are: who asked for the step reads it from the norm
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _nothing(self, level: LevelConfig) -> Gathered:
        return Gathered([None] * len(self.parameters[level.name]), 0)


def _optimizer(level: LevelConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The level's torch optimizer. Weight decay takes matrices only: a gain or a bias has no reason to be small."""
    settings = level.optimizer
    assert settings is not None and not isinstance(settings.lr, str)
    decay = settings.weight_decay
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [{**group, "initial_lr": settings.lr} for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    make = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return make(groups, lr=settings.lr, betas=settings.betas)
