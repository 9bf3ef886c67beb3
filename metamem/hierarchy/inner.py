"""Inner levels: parameters that move inside the forward pass, every `period` tokens, by a differentiable step.

    θ ← θ − rate · step(mean of ∂ loss / ∂ θ over the period)

Each token's gradient is taken at the weights of its time, where the token is read: a slow level learns from what the
faster ones made of its tokens, and not through their updates. So a training and a session make the same updates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import optree
import torch
import torchopt
from jaxtyping import Num
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamem.collectives import ALONE, World
from metamem.config import AdaptConfig, Config, OptimizerConfig, UserError, resolve_objectives
from metamem.globs import match_names
from metamem.hierarchy.objectives import loss_per_token
from metamem.hierarchy.rates import LearnedRates, learned_rates_over
from metamem.hierarchy.recompute import recomputed
from metamem.memory.base import Memory, Out
from metamem.memory.signals import Objectives
from metamem.state import State, tree_map
from metamem.targets import asked

Parameters = dict[str, Tensor]
Gradients = dict[str, list[Tensor]]  # level -> the gradient of each tensor that it moves


@dataclass(frozen=True)
class InnerLevel:
    """An inner level with its objectives resolved, the names of the parameters that it moves, and its learned rates."""

    name: str
    period: int
    objectives: Objectives
    optimizer: OptimizerConfig
    members: tuple[str, ...]
    unroll: int | None
    rates: LearnedRates | None = None


class InnerState(NamedTuple):
    """What an inner level carries along a stream: its fast copies, its optimizer's state, updates since the start."""

    fast: Parameters
    optimizer: Any
    updates: int


class Carried(NamedTuple):
    """What goes from piece to piece of a sequence: the inner levels' states and the memories'."""

    levels: dict[str, InnerState]
    memory: State | None


def inner_levels(config: Config | AdaptConfig, network: nn.Module) -> list[InnerLevel]:
    """The inner levels of a config over a network's parameters."""
    levels = [level for level in config.hierarchy.levels if level.clock == "inner"]
    if not levels:
        return []
    parameters = {name: p for name, p in network.named_parameters() if not name.startswith("inner_rates.")}
    objectives, found = resolve_objectives(config), []
    for level in levels:
        groups = [match_names(config.hierarchy.groups[group].match, parameters) for group in level.groups]
        members = tuple(name for name in parameters if any(name in group for group in groups))
        if not members:
            raise (level.where / "groups").error(f"no parameter is in the groups of the inner level {level.name!r}")
        assert level.optimizer is not None
        settings, rates = level.optimizer, None
        if settings.lr == "learned":
            of = [next(i for i, group in enumerate(groups) if name in group) for name in members]
            tensors = [parameters[name] for name in members]
            rates = learned_rates_over(
                settings.lr_per, tensors, of, settings.lr_initial, positive=settings.lr_sign == "positive"
            )
        found.append(
            InnerLevel(level.name, level.period, objectives[level.name], settings, members, level.unroll, rates)
        )
    return found


def learned_rates(config: Config, network: nn.Module) -> nn.Module | None:
    """The learned rates of the inner levels, a vector each: `inner_rates.<level>`."""
    module = nn.Module()
    for level in inner_levels(config, network):
        if level.rates is not None:
            module.register_parameter(level.name, nn.Parameter(level.rates.fresh()))
    return module if any(True for _ in module.parameters()) else None


def inner_loop(config: Config, network: nn.Module, world: World = ALONE) -> InnerLoop:
    """The loop of a config's meta-training: the inner levels that it unrolls, where it is cut, what it recomputes, in
    which precision it computes; and the processes that have the rows of a batch between them."""
    settings = config.training
    levels = [level for level in inner_levels(config, network) if level.unroll != 0]
    if settings.compile and levels:
        raise (settings.where / "compile").error(
            f"a compiled forward cannot be differentiated twice, as the inner level {levels[0].name!r} needs: set it "
            "to false, or the level's unroll to 0"
        )
    if misplaced := _misplaced(settings.unroll, levels):
        raise (settings.where / "unroll").error(misplaced)
    run: Any = torch.compile(network, fullgraph=True) if settings.compile else network
    low = torch.bfloat16 if settings.precision == "bfloat16" else None
    return InnerLoop(run, levels, settings.unroll, settings.recompute, low, world)


def _misplaced(unroll: int | None, levels: Sequence[InnerLevel]) -> str | None:
    """What is wrong with cutting every so many tokens, if anything is."""
    for level in levels:
        if unroll is not None and unroll % level.period:
            return (
                f"must be a multiple of {level.period}, the period of the inner level {level.name!r}, and not {unroll}:"
                " a cut falls where a period ends"
            )
    return None


class InnerLoop:
    """Runs a model along sequences while inner levels move its parameters, differentiably or not.

    Every `period` tokens of a level: `θ ← θ − rate · step(gradient)`, of its objective's mean over what is asked of
    exactly its last `period` tokens in all rows; where nothing is, the gradient is zero. Tokens between see the weights
    of the last boundary. With gradients switched off, the same numbers without a graph.

    - `unroll`     tokens after which the outer gradient is cut: all that goes on from there (fast copies, momenta, the
                   memories' state) does as numbers
    - `recompute`  the graph is not kept: it is made anew in the backward pass, piece by piece
    - `low`        the type in which autocast has the network's products computed (mixed precision): weights, fast ones
                   too, the memories' states and all losses keep their own
    - `world`      the processes that have the rows between them: an inner gradient is the mean over those of all
    """

    def __init__(
        self,
        network: nn.Module,
        levels: Sequence[InnerLevel],
        unroll: int | None = None,
        recompute: bool = False,
        low: torch.dtype | None = None,
        world: World = ALONE,
    ) -> None:
        self.network, self.levels, self.unroll, self.recompute = network, tuple(levels), unroll, recompute
        self.low, self.world = low, world
        self.transforms = {level.name: _direction(level.optimizer) for level in levels}
        periods = sorted({level.period for level in levels})
        if any(slow % periods[0] for slow in periods):
            raise UserError(f"the periods of inner levels must be multiples of the fastest: {periods}")
        if misplaced := _misplaced(unroll, levels):
            raise UserError(f"unroll {misplaced}")
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

    def rates(self, level: InnerLevel) -> Sequence[Tensor | float]:
        """The rates of each parameter tensor: one, or a tensor of them that broadcasts against it."""
        if level.rates is None:
            assert not isinstance(level.optimizer.lr, str)
            return [level.optimizer.lr] * len(level.members)
        return level.rates.of_each(self.network.get_parameter(f"inner_rates.{level.name}"))

    def apply(self, level: InnerLevel, state: InnerState, gradients: Sequence[Tensor]) -> InnerState:
        """One inner update: `θ ← θ − rate · step(gradient, decayed)`, differentiable in the gradients and the rates;
        what decays is θ, or how far it is from the slow weights (`decay_to`)."""
        values = decayed = tuple(state.fast[name] for name in level.members)
        if level.optimizer.decay_to == "init":
            decayed = tuple(state.fast[name] - self.network.get_parameter(name) for name in level.members)
        directions, optimizer = self.transforms[level.name].update(
            tuple(gradients), state.optimizer, params=decayed, inplace=False
        )
        moves = zip(values, self.rates(level), directions, strict=True)
        moved = [value + rate * direction for value, rate, direction in moves]
        return InnerState(dict(zip(level.members, moved, strict=True)), optimizer, state.updates + 1)

    def read(
        self,
        inputs: Num[Tensor, "batch time *dim"],
        targets: Num[Tensor, "batch time *features"],
        carried: Carried,
        learning: Sequence[InnerLevel],
    ) -> tuple[Out, Gradients]:
        """The network over a piece of a sequence, at the weights of now, and for each level that learns from it the
        gradient of its objective, summed over the piece; the graph is kept where gradients are on."""
        keep = torch.is_grad_enabled()
        with torch.set_grad_enabled(keep or bool(learning)):
            fast = {name: _alias(value, keep) for name, value in self.parameters(carried.levels).items()}
            arguments = inputs, carried.memory
            if fast and not keep:  # what does not move needs no graph: where the last layers move, most of it is saved
                fixed = {name: value for name, value in self.network.named_parameters() if name not in fast}
                fast |= {name: value.detach() for name, value in fixed.items()}
            # Only the plain attention kernel can be differentiated twice.
            with sdpa_kernel(SDPBackend.MATH) if self.levels and keep else nullcontext():
                out = self._called(fast, arguments)
            gradients: Gradients = {}
            for index, level in enumerate(learning):
                total, wanted = loss_per_token(level.objectives, out.y, targets).sum(), [fast[n] for n in level.members]
                more = keep or index + 1 < len(learning)
                gradients[level.name] = list(
                    torch.autograd.grad(total, wanted, retain_graph=more, create_graph=keep, materialize_grads=True)
                )
        if not keep:
            out = Out(out.y.detach(), tree_map(Tensor.detach, out.state), tree_map(Tensor.detach, out.aux))
        return out, gradients

    def alone(self) -> InnerLoop:
        """The same loop over rows that no other process has a part in."""
        loop = copy.copy(self)
        loop.world = ALONE
        return loop

    def _called(self, fast: Parameters, arguments: tuple[Tensor, State | None]) -> Out:
        """The network with these weights; its predictions in the type of the weights, which losses are computed in."""
        with nullcontext() if self.low is None else torch.autocast(arguments[0].device.type, self.low):
            out = functional_call(self.network, fast, arguments) if fast else self.network(*arguments)
        return out if self.low is None else out._replace(y=out.y.to(next(self.network.parameters()).dtype))

    def run(self, inputs: Num[Tensor, "batch time *dim"], targets: Num[Tensor, "batch time *features"]) -> Out:
        """The network over fresh sequences, the inner updates on the way, with the graph through them for an outer
        gradient: predictions [batch, time, vocabulary], the memories' state, and what they measured."""
        carried, time = Carried(self.init(), None), inputs.shape[1]
        parameters, parts = list(self.network.parameters()), []
        for start in range(0, time, length := self._segment_length(time)):
            here = slice(start, start + length)
            more = start + length < time
            segment = partial(self._segment, more=more)
            recompute = self.recompute and torch.is_grad_enabled()
            call = partial(recomputed, segment, parameters) if recompute else segment
            y, carried, aux = call(inputs[:, here], targets[:, here], carried)
            parts.append((y, aux))
            if more and self.unroll is not None and (start + length) % self.unroll == 0:
                carried = _cut(carried)
        return Out(_joined([y for y, _ in parts]), carried.memory or {}, _joined_each([aux for _, aux in parts]))

    def _segment(self, inputs: Tensor, targets: Tensor, carried: Carried, more: bool) -> tuple[Tensor, Carried, Any]:
        """A part of a sequence, which begins and ends where all periods do; `more`: tokens come after it."""
        time, parts = inputs.shape[1], []
        gathered: Gradients = {}
        for start in range(0, time, length := self.piece or time):
            here = slice(start, start + length)
            # A period that the sequence's end cuts short moves nothing.
            learning = [level for level in self.levels if more or (start // level.period + 1) * level.period < time]
            out, gradients = self.read(inputs[:, here], targets[:, here], carried, learning)
            parts.append(out)
            levels, end = dict(carried.levels), start + out.y.shape[1]
            for level in learning:
                found, before = gradients[level.name], gathered.get(level.name)
                gathered[level.name] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
                if end % level.period == 0:
                    count = asked(targets[:, end - level.period : end]).sum()
                    count, *totals = self.world.sums([count, *gathered.pop(level.name)])
                    mean = [total / count.clamp(min=1) for total in totals]
                    levels[level.name] = self._updated(level, levels[level.name], mean)
            carried = Carried(levels, out.state)
        return _joined([out.y for out in parts]), carried, _joined_each([out.aux for out in parts])

    def _updated(self, level: InnerLevel, state: InnerState, gradients: list[Tensor]) -> InnerState:
        """The update, inside the outer graph; every `unroll` updates that graph is cut."""
        state = self.apply(level, state, gradients)
        return leaf_state(state) if level.unroll is not None and state.updates % level.unroll == 0 else state

    def _segment_length(self, time: int) -> int:
        """Tokens between two cuts; where a graph without any is recomputed, √n of the n parts that begin and end where
        every chunk and inner period does: as many states are kept as parts are recomputed at once (Chen et al. 2016,
        arXiv 1604.06174)."""
        if self.unroll is not None:
            return self.unroll
        if not self.recompute:
            return time
        chunks = [getattr(module, "chunk", 1) for module in self.network.modules() if isinstance(module, Memory)]
        unit = math.lcm(*chunks, *(level.period for level in self.levels))
        return unit * math.ceil(math.sqrt(time / unit))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of sequences one after the other; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _joined_each(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: _joined([part[key] for part in parts]) for key in parts[0]}


def _alias(value: Tensor, keep: bool) -> Tensor:
    """The same numbers under a name of their own: what is differentiated by it is what this piece makes of them."""
    return value.view_as(value) if keep and value.requires_grad else value.detach().requires_grad_()


def _cut(carried: Carried) -> Carried:
    levels = {name: leaf_state(state) for name, state in carried.levels.items()}
    return Carried(levels, None if carried.memory is None else tree_map(Tensor.detach, carried.memory))


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
