"""Inner levels: parameters that move inside the forward pass, every `period` tokens, by a differentiable step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
import torchopt
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamem.config import Config, OptimizerConfig, UserError, resolve_objectives
from metamem.globs import match_names
from metamem.hierarchy.objectives import loss_per_token
from metamem.memory.base import Out
from metamem.memory.signals import Objectives
from metamem.targets import mean_asked

Parameters = dict[str, Tensor]
INITIAL_RATE = 0.03  # where a learned inner rate starts


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

    def run(self, inputs: Num[Tensor, "batch time *dim"], targets: Num[Tensor, "batch time *features"]) -> Out:
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
