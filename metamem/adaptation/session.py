"""The session: a model on a stream, what of it learns, and what it carries.

What learns is what the levels say: token levels write the memories, inner levels move the parameters that they name by
the loss of the stream itself, every `period` tokens. Every token is predicted before anything learns from it. The model
is never changed: sessions share it, one call at a time.

Longer than most files: reading, learning and the frozen model beside are one state machine over the same fields.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metamem.adaptation.fallback import FALLS, SERVICE, WINDOW, Standing, mixture
from metamem.adaptation.guards import Period, Refusal, Watchdog, judge, log
from metamem.adaptation.saved import carried, load_session, save_session
from metamem.config import AdaptationConfig, AdaptConfig, Config, UserError, resolve_objectives
from metamem.hierarchy import (
    Carried,
    Gradients,
    InnerLevel,
    InnerLoop,
    InnerState,
    Parameters,
    inner_levels,
    leaf_state,
    loss_per_token,
)
from metamem.memory.base import writing
from metamem.memory.signals import Objectives
from metamem.state import State, Stateful, flatten, state_bytes, tree_map


@dataclass(frozen=True)
class Observed:
    """What a session saw in a call.

    - `losses`    of each token, in nats, as it was predicted
    - `frozen`    those of the model as trained, where it ran beside; nan elsewhere
    - `updates`   of inner levels, made; `refused`: those that were not, or were made undone
    """

    losses: Float[Tensor, "batch tokens"]
    frozen: Float[Tensor, "batch tokens"]
    updates: int
    refused: tuple[Refusal, ...] = ()

    @property
    def bits_per_token(self) -> float:
        """The mean loss in bits."""
        return float(self.losses.mean()) / math.log(2)


@dataclass(frozen=True)
class Report:
    """What a session came to: tokens read, updates made, refused by reason, and what an update costs: seconds of the
    period's gradient and the step, on average and at most; the session's bytes; how far back a gradient goes."""

    tokens: int
    updates: int
    refused: dict[str, int]
    resting: bool
    seconds_per_update: float
    longest_update: float
    state_bytes: int
    gradient_tokens: int


class Reading(NamedTuple):
    """A try at tokens: nothing of the session has changed yet."""

    losses: Float[Tensor, "batch tokens"]
    state: State
    gradients: Gradients
    sound: int  # leading tokens that can be kept


class Session:
    """A model on a stream.

    - `config`        its inner levels say which parameters move; the first outer level (without any, the first inner
                      one) with a loss per token that loss; its `adaptation` the guards
    - `inner`         whether inner levels move parameters
    - `writing`       whether memories write; switched off, they recall their initial weights for ever
    - `reset_every`   tokens after which the model's state starts anew (the token before is still its input); None never
    - `batch`         streams read side by side; inner levels move one set of parameters by the mean of all
    - `adaptation`    other guards than the config's

    The first token of a stream has no context: it costs log(vocabulary).
    """

    def __init__(
        self,
        model: Stateful,
        config: Config | AdaptConfig,
        *,
        inner: bool = True,
        writing: bool = True,
        reset_every: int | None = None,
        batch: int = 1,
        adaptation: AdaptationConfig | None = None,
    ) -> None:
        if (dim := getattr(model, "dim_in", None)) is not None:
            raise UserError(f"a session reads tokens, and this model {dim} numbers at a time; call the model")
        self.model, self.writing, self.reset_every, self.batch = model, writing, reset_every, batch
        self.vocabulary: int = getattr(model, "dim_out", None) or 1
        self.adaptation = config.adaptation if adaptation is None else adaptation
        self.objectives = _objectives(config)
        self.loop = InnerLoop(model, inner_levels(config, model) if inner else [])
        piece = self.loop.piece or 1
        self.window = math.ceil(WINDOW / piece) * piece
        self._unit = math.lcm(*(level.period for level in self.loop.levels))
        # What is not finite in a fresh state may be so in any.
        fresh = flatten(self.model.init_state(batch)).items()
        self._endless = {name for name, leaf in fresh if leaf is not None and not leaf.isfinite().all()}
        self.reset()

    def reset(self) -> None:
        """Back to the model as trained, at the start of a stream."""
        self.position = 0
        self.last: Tensor | None = None
        self.state = self.model.init_state(self.batch)
        self.shadow: State | None = None  # the state of the model as trained, where it runs beside
        self.standing, self.watchdog = Standing(), Watchdog()
        self.updates, self.refused = 0, Counter[str]()
        self._seconds, self._longest, self._spent, self._noted = 0.0, 0.0, 0.0, list[Refusal]()
        self._restart()
        self.home: dict[str, Parameters] = {name: state.fast for name, state in self.inner.items()}
        self.home_service = 0

    def fork(self) -> Session:
        """A session that goes on from here by itself. It shares the tensors, none of which is ever written into."""
        other = copy.copy(self)
        other.inner, other.gradients, other.periods = dict(self.inner), dict(self.gradients), dict(self.periods)
        other.home, other.refused, other._noted = dict(self.home), Counter(self.refused), []
        return other

    def observe(self, tokens: Int[Tensor, "batch tokens"]) -> Observed:
        """Reads tokens: their losses, each given all before it, and the updates that their levels made.

        Gradients are cut at the ends of calls: to get the same numbers from any split, feed multiples of the period.
        A token that makes a loss not finite is left out of what is read, and costs log(vocabulary); without guards it
        raises UserError, the session as it was before the piece.
        """
        self._check(tokens)
        tokens = tokens.to(self.device)
        losses = [torch.empty(self.batch, 0, device=self.device)]
        frozen, made, start, self._noted = [losses[0]], self.updates, 0, []
        while start < tokens.shape[1]:
            piece, learning = tokens[:, start : start + self._room()], self._learning
            for ours, theirs in self._read(piece):
                losses.append(ours)
                frozen.append(theirs)
            self._learn(() if self.resting else learning)
            self._compare()
            start += piece.shape[1]
        return Observed(torch.cat(losses, 1), torch.cat(frozen, 1), self.updates - made, tuple(self._noted))

    @torch.no_grad()
    def predict(self) -> Float[Tensor, "batch vocabulary"]:
        """The distribution of the next token, given all before it. Nothing changes, and nothing is learned."""
        if self.last is None:
            return torch.full((self.batch, self.vocabulary), 1 / self.vocabulary, device=self.device)
        with writing(self.model, self.writing):
            inner = Carried(self._fast, self._state_here(self.state))
            found = self.loop.read(self.last, self.last, inner, ())[0].y[:, -1].softmax(-1)
            if self.standing.mode == "awake":
                shadow = self._state_here(self.state if self.shadow is None else self.shadow)
                frozen = self.model(self.last, shadow)[0][:, -1].softmax(-1)
                found = torch.lerp(found, frozen, torch.tensor(self.standing.worth).to(found)[:, None])
        return found

    def report(self) -> Report:
        """What it came to so far, and what an update costs."""
        made = max(1, self.updates + sum(self.refused.values()))
        periods = [level.period for level in self.loop.levels]
        return Report(
            self.position,
            self.updates,
            dict(self.refused),
            self.resting,
            self._seconds / made,
            self._longest,
            self.state_bytes,
            min([self.adaptation.piece, *periods]) if periods else 0,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is, and what the session gives; tokens may come from anywhere."""
        return self.model.device

    @property
    def resting(self) -> bool:
        """Whether the watchdog has it frozen."""
        return self.position < self.watchdog.until

    @property
    def state_bytes(self) -> int:
        """The size of all that the session carries: memories, attention caches, fast copies of parameters."""
        return state_bytes(carried(self))

    def save(self, path: Path) -> None:
        """Writes the session to a safetensors file, whole or not at all."""
        save_session(self, path)

    def load(self, path: Path) -> None:
        """Goes on where a saved session stopped. Raises StateError, and changes nothing, where the file is damaged, or
        of another model: of other shapes, or of other weights."""
        load_session(self, path)

    # Reading

    def _check(self, tokens: Tensor) -> None:
        if tokens.shape[0] != self.batch:
            raise UserError(f"the session reads {self.batch} streams side by side, not {tokens.shape[0]}: set batch")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            bad = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise UserError(f"there is no token {bad}: the model's vocabulary is {self.vocabulary}")

    @property
    def _learning(self) -> Sequence[InnerLevel]:
        return () if self.resting else self.loop.levels

    @property
    def _fast(self) -> dict[str, InnerState]:
        """What the model reads with: at rest, its own weights."""
        return {} if self.resting else self.inner

    @property
    def _shadowed(self) -> bool:
        """Whether there are weights to compare with the model as trained."""
        return self.adaptation.fallback is not None and bool(self.loop.levels) and not self.resting

    def _room(self) -> int:
        """Tokens up to the next boundary of a level, window or reset; at most those that one gradient goes back."""
        clocks = [level.period for level in self.loop.levels] + ([self.reset_every] if self.reset_every else [])
        clocks += [self.window] if self._shadowed else []
        room = min((clock - self.position % clock for clock in clocks), default=1 << 62)
        return min(room, self.adaptation.piece) if self._learning else room

    def _state_here(self, state: State) -> State:
        fresh = self.reset_every and self.position % self.reset_every == 0
        return self.model.init_state(self.batch) if fresh else state

    def _read(self, piece: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Reads a piece to its end, in parts where something in it is not finite: what led there is kept, the token
        that did it is left out. It is searched for, since in a chunk that is computed at once it spoils the losses
        before it too. The losses of each part, and the frozen model's."""
        found, started = [], time.perf_counter()
        start, length, kept = 0, piece.shape[1], 0
        while start < piece.shape[1]:
            part = piece[:, start : start + length]
            reading, count = self._try(part, self.state, self._fast, self._learning), part.shape[1]
            if reading.sound == count:
                found.append(self._keep(part, reading))
                start, length, kept = start + count, 2 * count, kept + count
            elif self.adaptation.guards is None:
                raise UserError(f"token {self.position}: the loss is not finite; the session stays as it was before it")
            elif count > 1:
                length = reading.sound or count // 2
            elif self.updates and self._try(part, self.state, {}, ()).sound:  # the adapted weights did it
                self._put_back("not finite", math.inf, math.inf)
            else:
                found.append(self._leave_out(part))
                start, length, kept = start + 1, 2 * kept + 1, 0
        self._spent += time.perf_counter() - started
        return found

    def _try(self, part: Tensor, state: State, inner: dict[str, InnerState], learning: Sequence[InnerLevel]) -> Reading:
        """The losses of tokens from a state, at the fast weights `inner` ({}: the model's own), the state after them,
        and per level the gradient of its summed objective."""
        state, last = self._state_here(state), self.last
        inputs = part[:, :-1] if last is None else torch.cat([last, part[:, :-1]], 1)
        targets = part[:, 1:] if last is None else part
        first = [self._unknown()] if last is None else []
        if inputs.shape[1] == 0:
            return Reading(torch.cat(first, 1), state, {}, part.shape[1])
        with torch.no_grad(), writing(self.model, self.writing):
            out, gradients = self.loop.read(inputs, targets, Carried(inner, state), learning)
            losses = torch.cat([*first, loss_per_token(self.objectives, out.y, targets)], 1)
        finite = losses.isfinite().all(0)
        sound = part.shape[1] if finite.all() else int(finite.long().argmin())
        if sound == part.shape[1] and not self._finite(out.state):
            sound //= 2  # somewhere in it
        return Reading(losses, tree_map(_settled, out.state), gradients, sound)

    def _finite(self, state: State) -> bool:
        named = ((name, leaf) for name, leaf in flatten(state).items() if leaf is not None)
        return all(bool(leaf.isfinite().all()) for name, leaf in named if name not in self._endless)

    def _keep(self, part: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        """The session goes on from a try that was sound: the losses as predicted, and the frozen model's."""
        losses, frozen = self._predicted(part, reading)
        for name, gradient in reading.gradients.items():
            self.gradients[name] = [a + b for a, b in zip(self.gradients[name], gradient, strict=True)]
        total = float(reading.losses.mean(0).sum())
        self.periods = {name: period.read(total, part.shape[1]) for name, period in self.periods.items()}
        self.state, self.last = reading.state, part[:, -1:]
        self.position += part.shape[1]
        return losses, frozen

    def _leave_out(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """A token that the model cannot be given what came before: predicted by nothing, and the input of the next."""
        self._note("", "input not finite", math.nan, math.inf)
        self.last = part
        self.position += 1
        losses = self._unknown()
        return losses, losses if self.standing.mode != "asleep" else torch.full_like(losses, math.nan)

    def _unknown(self) -> Tensor:
        """The loss of a token that nothing is known of."""
        return torch.full((self.batch, 1), math.log(self.vocabulary), device=self.device)

    # Learning

    def _learn(self, learning: Sequence[InnerLevel]) -> None:
        """The levels whose period ends here take their step on the mean gradient of the period, if no guard refuses."""
        guards = self.adaptation.guards
        for level in learning:
            if self.position % level.period:
                continue
            started = time.perf_counter()
            mean = [gradient / (level.period * self.batch) for gradient in self.gradients[level.name]]
            before, period = self.inner[level.name], self.periods[level.name]
            with torch.no_grad():
                after = leaf_state(self.loop.apply(level, before, mean))
                wrong = None if guards is None else judge(guards, period, before, after, self._initial[level.name])
            self.gradients[level.name] = self._no_gradient(level)
            self.periods[level.name] = period.closed(guards.half_life if guards else 1)
            seconds = self._spent + time.perf_counter() - started
            self._seconds, self._longest, self._spent = self._seconds + seconds, max(self._longest, seconds), 0.0
            if wrong is None and guards is not None and guards.seconds is not None and seconds > guards.seconds:
                wrong = "time", seconds, guards.seconds
            if wrong is None:
                self.inner[level.name] = after
                self.updates += 1
                if guards is not None:
                    self.watchdog = self.watchdog.accepted(self.position, guards)
            else:
                self._note(level.name, *wrong)
                self._refuse()

    def _refuse(self) -> None:
        guards = self.adaptation.guards
        self.watchdog = self.watchdog.refused()
        if guards is not None and guards.patience is not None and self.watchdog.in_a_row >= guards.patience:
            self._rest()

    def _rest(self, home: bool = False) -> None:
        """Frozen for a while: read at the slow weights, and nothing learns; then on from there, or from home."""
        if self.adaptation.guards is not None:
            self.watchdog = self.watchdog.resting(self.position, self.adaptation.guards, self._unit)
        self._restart(home)
        self.standing, self.shadow = self.standing.asleep(), None

    def _note(self, level: str, reason: str, value: float, limit: float) -> None:
        refusal = Refusal(self.position, level, reason, value, limit)
        self._noted.append(refusal)
        self.refused[reason] += 1
        log.info("%s", refusal)

    def _restart(self, home: bool = False) -> None:
        """The levels as at the start, at the slow weights or at those worth coming back to, if any are."""
        levels = {name: leaf_state(state) for name, state in self.loop.init().items()}
        home = home and self.home_service > 0
        self._initial = {name: list(state.fast.values()) for name, state in levels.items()}
        self.inner = {name: state._replace(fast=self.home[name]) for name, state in levels.items()} if home else levels
        self.gradients = {level.name: self._no_gradient(level) for level in self.loop.levels}
        self.periods = {level.name: Period() for level in self.loop.levels}

    def _no_gradient(self, level: InnerLevel) -> list[Tensor]:
        return [torch.zeros_like(value) for value in self._initial[level.name]]

    # The model as trained, beside

    def _predicted(self, part: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        """The losses of a part as it was predicted, by the adapted model or by both, and those of the frozen one."""
        settings, nothing = self.adaptation.fallback, torch.full_like(reading.losses, math.nan)
        if settings is None or not self._shadowed or not self.updates:
            return reading.losses, nothing
        standing, losses = self.standing, reading.losses.mean(0).tolist()
        alarm = standing.alarm_in(losses, settings, self.window) if standing.mode != "awake" else None
        if standing.mode == "asleep" and self.position % (settings.probe * self.window) == 0:
            standing = replace(standing, mode="watching")
        if alarm is not None:
            self._come_home_later()
            standing = replace(standing.woken(self.batch), service=0)
        if standing.mode == "asleep":
            self.standing = standing.read(losses)
            return reading.losses, nothing
        beside = self._try(part, self.state if self.shadow is None else self.shadow, {}, ())
        if beside.sound < part.shape[1]:  # it cannot read this: no evidence for either
            self.standing, self.shadow = standing.read(losses), None
            return reading.losses, nothing
        ahead = standing.ahead + float((reading.losses - beside.losses).mean(0).sum())
        self.standing, self.shadow = replace(standing.read(losses), ahead=ahead), beside.state
        if standing.mode == "watching":
            return reading.losses, beside.losses
        since = 0 if alarm is None else alarm + 1
        mixed, worth = mixture(reading.losses[:, since:], beside.losses[:, since:], standing.worth, settings.share)
        self.standing = replace(self.standing, worth=worth)
        return torch.cat([reading.losses[:, :since], mixed], 1), beside.losses

    def _compare(self) -> None:
        """At the end of a window: whether the frozen model runs on, and whether the weights are put back."""
        settings = self.adaptation.fallback
        if settings is None or not self._shadowed or self.position % self.window:
            return
        self.standing = self.standing.after_window(settings, self.window, self.batch)
        if self.standing.mode == "asleep":
            self.shadow = None
        elif self.standing.mode == "awake" and self.standing.lead > settings.lead:
            self._put_back("behind the model as trained", self.standing.lead, settings.lead)

    def _come_home_later(self) -> None:
        """Before a change: the weights that served the longest are those worth coming back to."""
        if self.standing.service >= max(self.home_service, SERVICE):
            self.home = {name: state.fast for name, state in self.inner.items()}
            self.home_service = self.standing.service

    def _put_back(self, reason: str, value: float, limit: float) -> None:
        """The adapted weights back to those worth coming back to, or to the slow ones; the third time, after a rest."""
        self._note("", reason, value, limit)
        falls = self.standing.falls + 1
        if self.shadow is not None:
            self.state = self.shadow
        self.standing = replace(self.standing, lead=0.0, ahead=0.0, calm=0, falls=falls, service=0)
        if falls >= FALLS and self.adaptation.guards is not None:
            self._rest(home=True)
        else:
            self._restart(home=True)


def _objectives(config: Config | AdaptConfig) -> Objectives:
    """The loss per token of a stream: that of the first outer level which has one; of an inner one without any."""
    objectives, levels = resolve_objectives(config), config.hierarchy.levels
    outer = [level for level in levels if level.outer] or [level for level in levels if level.clock == "inner"]
    found = next((objectives[level.name] for level in outer if objectives[level.name]), None)
    if found is None:
        raise (config.hierarchy.where / "levels").error("no outer level has an objective that is a loss per token")
    return found


def _settled(tensor: Tensor) -> Tensor:
    # No view into a longer buffer: that would keep it alive, and the last bits of a product depend on how its operands
    # lie in memory, but a loaded session must go on as the one that was saved.
    return tensor.detach().clone(memory_format=torch.contiguous_format)
