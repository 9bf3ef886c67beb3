"""Outer levels: slow weights, each owned by one level, which steps on the mean gradient of its own objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from metamem.config import Config, LevelConfig, RunConfig, measured_objectives, ownership, resolve_objectives
from metamem.config.resolve import Objective
from metamem.hierarchy.calendar import Calendar, calendar_of
from metamem.hierarchy.objectives import measured_loss
from metamem.hierarchy.replicas import Replicas
from metamem.memory.signals import Objectives
from metamem.state import State, StateError


@dataclass
class Gathered:
    """What a level has gathered since it last fired: the sum of its gradients, None where none came, and the steps."""

    sums: list[Tensor | None]
    steps: int


class OuterLevels:
    """The outer levels of a config: each owns slow weights, and has an objective, an optimizer, a clock and a period.

    A level gathers the gradient of its own objective over every outer step since it last fired, in a buffer of its own,
    and fires where the calendar says so. Without a calendar it is the config's, for what it says of epochs; `make`
    makes a level's optimizer, whose groups have an `initial_lr`. `replicas` are those of a model that several processes
    train, each with its share of every loss.
    """

    def __init__(
        self,
        config: RunConfig,
        network: nn.Module,
        calendar: Calendar | None = None,
        make: Callable[[LevelConfig, list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        self.replicas = Replicas(network) if replicas is None else replicas
        parameters = dict(network.named_parameters())
        owned, objectives = ownership(parameters, config.hierarchy), resolve_objectives(config)
        if calendar is None:
            assert isinstance(config, Config), "a run of another kind has a calendar of its own"
            calendar = calendar_of(config)
        self.calendar = calendar
        self.levels = [level for level in config.hierarchy.levels if level.outer]
        self.owned = {level.name: owned[level.name] for level in self.levels}
        self.parameters = {level: [parameters[name] for name in names] for level, names in self.owned.items()}
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
        that the memories measured. Gives the loss per level. Of several processes, each has its share of a loss."""
        groups = []
        for objectives, measured, levels in self.distinct():
            value = measured_loss(measured, aux, self.replicas.world) + (loss(objectives) if objectives else 0.0)
            groups.append((torch.as_tensor(value), levels))
        places, found = [], []
        for index, (value, levels) in enumerate(groups):
            own = [(level.name, i) for level in levels for i in range(len(self.parameters[level.name]))]
            own = [(name, i) for name, i in own if self.parameters[name][i].requires_grad]
            live = self.replicas.live([self.parameters[name][i] for name, i in own])
            found += torch.autograd.grad(value, live, retain_graph=index + 1 < len(groups), allow_unused=True)
            places += own
        owners = [self.parameters[name][i] for name, i in places]
        gradients, losses = self.replicas.reduced(found, owners, [value.detach() for value, _ in groups])
        for (name, i), gradient in zip(places, gradients, strict=True):
            sums = self.gathered[name].sums
            if gradient is not None:
                sums[i] = gradient if (before := sums[i]) is None else before + gradient
        return {level.name: float(value) for value, (_, levels) in zip(losses, groups, strict=True) for level in levels}

    def step(self, step: int, scale: float, clip: float | None) -> dict[str, float]:
        """After outer step `step` (from 1): every level that fires takes its optimizer's step on the mean gradient of
        the steps since it last did, the rate times `scale`; gives the gradient norm of each. Nothing moves where that
        is not finite, and the parameters keep that gradient."""
        norms = {}
        for level in self.levels:
            own = self.gathered[level.name]
            own.steps += 1
            if self.calendar.fires(level, step):
                norms[level.name] = self._fire(level, own, scale, clip)
                self.gathered[level.name] = self._nothing(level)
        return norms

    def state(self) -> State:
        """What goes from step to step, by the names of parameters: what each optimizer keeps of them, and the gradient
        that each level has gathered since it last fired."""
        levels: State = {}

        def whole(value: Any) -> Tensor:
            return self.replicas.full(torch.as_tensor(value))

        for level, names in self.owned.items():
            kept, own = self.optimizers[level].state, self.gathered[level]
            of = list(zip(names, self.parameters[level], strict=True))
            levels[level] = {
                "optimizer": {name: {key: whole(value) for key, value in kept.get(p, {}).items()} for name, p in of},
                "sums": {name: whole(total) for name, total in zip(names, own.sums, strict=True) if total is not None},
                "steps": torch.tensor(own.steps),
            }
        return levels

    def load_state(self, state: State) -> None:
        """Goes on from a `state` of the same levels with the same parameters. Raises StateError for one of others."""
        for level in (*self.owned, *state):
            names, told = self.owned.get(level), state.get(level)
            if names is None or told is None or list(told["optimizer"]) != names:
                raise StateError(f"level {level!r} owned other parameters than it does now, or is new or gone")
        for level, names in self.owned.items():
            told, sums, optimizer = state[level], state[level]["sums"], self.optimizers[level]
            settings = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
            for name, parameter in zip(names, self.parameters[level], strict=True):
                # The step count stays on the host, unless the optimizer asks otherwise, and all keeps its type, which
                # torch's own load_state_dict does not promise.
                there = any(settings[parameter].get(key) for key in ("capturable", "fused"))
                optimizer.state[parameter] = {
                    key: value if key == "step" and not there else self.replicas.own(value, parameter)
                    for key, value in told["optimizer"][name].items()
                }
            gathered = [
                self.replicas.own(sums[name], parameter) if name in sums else None
                for name, parameter in zip(names, self.parameters[level], strict=True)
            ]
            self.gathered[level] = Gathered(gathered, int(told["steps"]))

    def _fire(self, level: LevelConfig, own: Gathered, scale: float, clip: float | None) -> float:
        parameters, optimizer = self.parameters[level.name], self.optimizers[level.name]
        for parameter, total in zip(parameters, own.sums, strict=True):
            parameter.grad = None if total is None else total / own.steps
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        length = self.replicas.full(norm).item()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        if not math.isfinite(length):  # who asked for the step reads it from the norm, and where it comes from
            return length
        if clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return length

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
