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
        for level, names in self.owned.items():
            kept, own = self.optimizers[level].state, self.gathered[level]
            of = list(zip(names, self.parameters[level], strict=True))
            levels[level] = {
                "optimizer": {
                    name: {key: torch.as_tensor(value) for key, value in kept.get(p, {}).items()} for name, p in of
                },
                "sums": {name: total for name, total in zip(names, own.sums, strict=True) if total is not None},
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
                    key: value if key == "step" and not there else value.to(parameter.device)
                    for key, value in told["optimizer"][name].items()
                }
            gathered = [
                sums[name].to(parameter.device) if name in sums else None
                for name, parameter in zip(names, self.parameters[level], strict=True)
            ]
            self.gathered[level] = Gathered(gathered, int(told["steps"]))

    def _fire(self, level: LevelConfig, own: Gathered, scale: float, clip: float | None) -> float:
        parameters, optimizer = self.parameters[level.name], self.optimizers[level.name]
        for parameter, total in zip(parameters, own.sums, strict=True):
            parameter.grad = None if total is None else total / own.steps
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        if not math.isfinite(norm):  # who asked for the step reads it from the norm, and where it comes from
            return norm.item()
        if clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.item()

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
