"""The hierarchy of losses: which weights learn, from which loss, on which clock.

- `token` levels live inside the memories (`token_levels` makes them from a config)
- `inner` levels move parameters inside the forward pass: every `period` tokens a differentiable optimizer step on
  that piece's loss (`InnerLoop`); the outer gradient flows through, for `unroll` updates
- `step` levels move the slow weights that they own (`OuterLevels`), each from its own objective, every `period` steps

Losses are means over the positions asked (`metamem.targets`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import optree
import torch
import torchopt
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamem.config import (
    Config,
    LevelConfig,
    OptimizerConfig,
    RuleConfig,
    UserError,
    measured_objectives,
    ownership,
    resolve_objective,
    resolve_objectives,
)
from metamem.config.convert import schema_fields
from metamem.globs import match_names
from metamem.memory.base import Out
from metamem.memory.level import TokenLevel
from metamem.memory.signals import Objectives
from metamem.targets import asked, mean_asked

Parameters = dict[str, Tensor]
INITIAL_RATE = 0.03  # where a learned inner rate starts


def token_levels(config: Config) -> list[tuple[LevelConfig, TokenLevel]]:
    """The token levels of a config, fast to slow, with their objectives resolved."""
    objectives, found = resolve_objectives(config), []
    for level in config.hierarchy.levels:
        if level.clock == "token" and (rule := level.rule) is not None:
            settings = {item.name: getattr(rule, item.name) for item in schema_fields(RuleConfig)}
            settings["retention"] = {
                resolve_objective(path, level.where.at("rule", "retention", path)): weight
                for path, weight in rule.retention.items()
            }
            try:
                runtime = TokenLevel(level.name, objectives[level.name], level.period, **settings)
            except ValueError as error:
                raise (level.where / "rule").error(str(error)) from error
            found.append((level, runtime))
    return found


def loss_per_token(
    objectives: Objectives, pred: Float[Tensor, "*tokens vocabulary"], target: Int[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Σ weight · objective(pred, target); 0 at the positions that are not asked, which no objective sees."""
    wanted = asked(target)
    if wanted.all():
        return torch.stack([weight * objective(pred, target) for objective, weight in objectives.items()]).sum(0)
    losses = loss_per_token(objectives, pred[wanted], target[wanted])
    return losses.new_zeros(target.shape).masked_scatter(wanted, losses)


def measured_loss(measured: Mapping[str, float], aux: Mapping[str, Tensor]) -> Tensor | float:
    """Σ weight · mean of what memories measured under the names that a glob matches."""
    total: Tensor | float = 0.0
    for glob, weight in measured.items():
        matching = [aux[name].mean() for name in match_names([glob], aux)]
        total = total + weight * torch.stack(matching).mean()
    return total


# ------------------------------------------------------------------------------------------------ inner levels


@dataclass(frozen=True)
class InnerLevel:
    """An inner level with its objectives resolved and the names of the parameters that it moves."""

    name: str
    period: int
    objectives: Objectives
    optimizer: OptimizerConfig
    members: tuple[str, ...]
    unroll: int | None


class InnerState(NamedTuple):
    """What an inner level carries along a stream: its fast copies, its optimizer's state, updates since the cut."""

    fast: Parameters
    optimizer: Any
    updates: int


def inner_levels(config: Config, network: nn.Module) -> list[InnerLevel]:
    """The inner levels of a config over a network's parameters."""
    levels = [level for level in config.hierarchy.levels if level.clock == "inner"]
    if not levels:
        return []
    names = [name for name, _ in network.named_parameters() if not name.startswith("inner_rates.")]
    objectives, groups, found = resolve_objectives(config), config.hierarchy.groups, []
    for level in levels:
        members = match_names([glob for group in level.groups for glob in groups[group].match], names)
        if not members:
            raise (level.where / "groups").error(f"no parameter is in the groups of the inner level {level.name!r}")
        assert level.optimizer is not None
        found.append(
            InnerLevel(level.name, level.period, objectives[level.name], level.optimizer, tuple(members), level.unroll)
        )
    return found


def learned_rates(config: Config, network: nn.Module) -> nn.Module | None:
    """The learned rates of the inner levels, one per parameter tensor, as logarithms: `inner_rates.<level>`."""
    rates = nn.Module()
    for level in inner_levels(config, network):
        if level.optimizer.lr == "learned":
            rates.register_parameter(level.name, nn.Parameter(torch.full((len(level.members),), INITIAL_RATE).log()))
    return rates if any(True for _ in rates.parameters()) else None


class InnerLoop:
    """Runs a model along sequences while inner levels move its parameters, differentiably or not.

    Every `period` tokens of a level: `θ ← θ − rate · step(∂ loss / ∂ θ)`, the loss its objective's mean over what is
    asked of exactly its last `period` tokens in all rows; where nothing is, the gradient is zero. Tokens between see
    the weights of the last boundary.
    """

    def __init__(self, network: nn.Module, levels: Sequence[InnerLevel]) -> None:
        self.network, self.levels = network, tuple(levels)
        self.transforms = {level.name: _direction(level.optimizer) for level in levels}
        periods = sorted({level.period for level in levels})
        if any(slow % periods[0] for slow in periods):
            raise UserError(f"the periods of inner levels must be multiples of the fastest: {periods}")
        self.piece = min(periods, default=None)

    def init(self) -> dict[str, InnerState]:
        """Fast copies at the slow weights."""
        parameters = dict(self.network.named_parameters())
        states = {}
        for level in self.levels:
            fast: Parameters = {name: parameters[name] for name in level.members}
            states[level.name] = InnerState(fast, self.transforms[level.name].init(tuple(fast.values())), 0)
        return states

    def parameters(self, states: Mapping[str, InnerState]) -> Parameters:
        """The fast copies of all levels, by parameter name."""
        return {name: value for state in states.values() for name, value in state.fast.items()}

    def rates(self, level: InnerLevel) -> list[Tensor | float]:
        """One rate per parameter tensor."""
        if level.optimizer.lr == "learned":
            learned = self.network.get_parameter(f"inner_rates.{level.name}")
            return list(learned.exp().unbind())
        return [level.optimizer.lr] * len(level.members)

    def apply(self, level: InnerLevel, state: InnerState, gradients: list[Tensor]) -> InnerState:
        """One inner update: `θ ← θ − rate · step(gradient)`, differentiable in the gradients and the rates."""
        values = tuple(state.fast.values())
        directions, optimizer = self.transforms[level.name].update(
            tuple(gradients), state.optimizer, params=values, inplace=False
        )
        moves = zip(values, self.rates(level), directions, strict=True)
        moved = [value + rate * direction for value, rate, direction in moves]
        return InnerState(dict(zip(level.members, moved, strict=True)), optimizer, state.updates + 1)

    def run(self, inputs: Int[Tensor, "batch time"], targets: Int[Tensor, "batch time"]) -> Out:
        """The network over fresh sequences, the inner updates on the way, with the graph through them for an outer
        gradient: predictions [batch, time, vocabulary], the memories' state, and what they measured."""
        states, memory = self.init(), None
        pending: dict[str, list[Tensor]] = {level.name: [] for level in self.levels}
        predictions, measured = [], []
        length = self.piece or inputs.shape[1]
        for start in range(0, inputs.shape[1], length):
            piece, wanted = inputs[:, start : start + length], targets[:, start : start + length]
            # Only the plain attention kernel can be differentiated twice.
            with sdpa_kernel(SDPBackend.MATH) if self.levels else nullcontext():
                pred, memory, aux = functional_call(self.network, self.parameters(states), (piece, memory))
            predictions.append(pred)
            measured.append(aux)
            end = start + piece.shape[1]
            for level in self.levels:
                pending[level.name].append(loss_per_token(level.objectives, pred, wanted))
                if end % level.period == 0 and end < inputs.shape[1]:
                    loss = mean_asked(torch.cat(pending[level.name], 1), targets[:, end - level.period : end])
                    states[level.name] = self._unrolled(level, states[level.name], loss)
                    pending[level.name] = []
        aux = {key: torch.cat([one[key] for one in measured], 1) for key in measured[0]}
        return Out(torch.cat(predictions, 1), memory or {}, aux)

    def _unrolled(self, level: InnerLevel, state: InnerState, loss: Float[Tensor, ""]) -> InnerState:
        """The update on a period's loss, inside the outer graph; every `unroll` updates that graph is cut."""
        fast = list(state.fast.values())
        gradients = torch.autograd.grad(loss, fast, create_graph=True, materialize_grads=True)
        state = self.apply(level, state, list(gradients))
        cut = level.unroll is not None and state.updates % level.unroll == 0
        return leaf_state(state) if cut else state


def leaf_state(state: InnerState) -> InnerState:
    """The same numbers, cut from the graph that made them: weights and optimizer state together."""
    fast = {name: value.detach().requires_grad_() for name, value in state.fast.items()}
    return state._replace(fast=fast, optimizer=optree.tree_map(_detach, state.optimizer))


def _detach(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _direction(optimizer: OptimizerConfig) -> Any:
    """The optimizer at rate 1 as torchopt's pair `init / update`: the step that a rate multiplies."""
    if optimizer.name == "sgd":
        return torchopt.sgd(lr=1.0, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay)
    make = torchopt.adam if optimizer.name == "adam" else torchopt.adamw
    return make(lr=1.0, betas=optimizer.betas, weight_decay=optimizer.weight_decay, eps_root=1e-16)


# ------------------------------------------------------------------------------------------------- step levels


class OuterLevels:
    """The step levels of a config: each owns slow weights, has an objective, an optimizer and a period."""

    def __init__(self, config: Config, network: nn.Module) -> None:
        parameters = dict(network.named_parameters())
        owned, objectives = ownership(parameters, config.hierarchy), resolve_objectives(config)
        self.levels = [level for level in config.hierarchy.levels if level.clock == "step"]
        self.parameters = {level.name: [parameters[name] for name in owned[level.name]] for level in self.levels}
        self.objectives = {level.name: objectives[level.name] for level in self.levels}
        self.measured = measured_objectives(config)
        self.optimizers = {level.name: _optimizer(level, self.parameters[level.name]) for level in self.levels}

    def distinct(self) -> Iterator[tuple[Objectives, dict[str, float], list[LevelConfig]]]:
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
            mine = [p for level in levels for p in self.parameters[level.name] if p.requires_grad]
            gradients = torch.autograd.grad(value, mine, retain_graph=index + 1 < len(groups), allow_unused=True)
            for parameter, gradient in zip(mine, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            values.update({level.name: float(value.detach()) for level in levels})
        return values

    def step(self, step: int, scale: float, clip: float | None) -> dict[str, float]:
        """After outer step `step` (from 1): every level whose period ends here takes its optimizer's step on the mean
        gradient of its period, the rate times `scale`; gives the gradient norm of each that did."""
        norms = {}
        for level in self.levels:
            if step % level.period:
                continue
            parameters, optimizer = self.parameters[level.name], self.optimizers[level.name]
            if level.period > 1:
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad /= level.period
            norm = nn.utils.clip_grad_norm_(parameters, clip if clip is not None else float("inf"))
            norms[level.name] = float(norm)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norms


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
