"""Which updates a session refuses, and when it stops learning.

    not finite       the step, the weights after it or the optimizer's state has a number that is not
    loss explosion   the period's mean loss, above `explosion` times its running estimate
    step norm        ‖W' − W‖ > step ‖W_init‖
    drift            ‖W' − W_init‖ > drift ‖W_init‖
    time             it took more than `seconds`

W are all parameters that a level moves. A running estimate takes in what was refused too: what stays becomes normal.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import optree
import torch
from torch import Tensor

from metamem.config import GuardsConfig
from metamem.hierarchy import InnerState

log = logging.getLogger("metamem.adaptation")

TYPICAL = 0.02  # the least that a weight counts in a norm: deltas start at zero, and all steps are far from that
SLACK = 0.1  # nats: a loss near zero is no measure of an explosion
LONGEST = 16  # times `rest`


class Refusal(NamedTuple):
    """An update that was not made, or made undone: where, of which level, why, and what it was against the limit."""

    position: int
    level: str
    reason: str
    value: float
    limit: float

    def __str__(self) -> str:
        where = f"token {self.position}: " + (f"level {self.level}: " if self.level else "")
        return where + f"{self.reason} ({self.value:.3g}, limit {self.limit:.3g})"


@dataclass(frozen=True)
class Running:
    """A running mean that forgets: of what is `half_life` units old, half counts."""

    total: float = 0.0
    weight: float = 0.0

    def after(self, value: float, half_life: float, units: float = 1) -> Running:
        """The running mean after `units` of `value`."""
        if not math.isfinite(value):
            return self
        kept = 0.5 ** (units / half_life)
        return Running(kept * self.total + (1 - kept) * value, kept * self.weight + (1 - kept))

    @property
    def mean(self) -> float:
        """The mean; infinite before anything was seen."""
        return self.total / self.weight if self.weight else math.inf


EMPTY = Running()


@dataclass(frozen=True)
class Period:
    """What a level's guard knows: the loss summed since its last boundary, and the estimate of its mean in a period."""

    loss: float = 0.0
    tokens: int = 0
    estimate: Running = EMPTY

    def read(self, loss: float, tokens: int) -> Period:
        """After tokens were read."""
        return replace(self, loss=self.loss + loss, tokens=self.tokens + tokens)

    @property
    def mean(self) -> float:
        """The mean loss since the last boundary."""
        return self.loss / max(1, self.tokens)

    def closed(self, half_life: float) -> Period:
        """At a boundary: the next period."""
        return Period(estimate=self.estimate.after(self.mean, half_life) if self.tokens else self.estimate)


def judge(
    settings: GuardsConfig, period: Period, before: InnerState, after: InnerState, initial: Sequence[Tensor]
) -> tuple[str, float, float] | None:
    """Why an update is refused, with the value and its limit; None where it is not."""
    old, new = list(before.fast.values()), list(after.fast.values())
    norm = max(length(initial), TYPICAL * math.sqrt(sum(tensor.numel() for tensor in initial)))
    step = length(a - b for a, b in zip(new, old, strict=True))
    drift = length(a - b for a, b in zip(new, initial, strict=True))
    state = [leaf for leaf in optree.tree_leaves(after.optimizer) if isinstance(leaf, Tensor)]
    for value in (step, drift, length(leaf for leaf in state if leaf.is_floating_point())):
        if not math.isfinite(value):
            return "not finite", value, math.inf
    if settings.explosion is not None:
        limit = settings.explosion * (period.estimate.mean + SLACK)
        if period.mean > limit:
            return "loss explosion", period.mean, limit
    for reason, value, share in (("step norm", step, settings.step), ("drift", drift, settings.drift)):
        if share is not None and value > share * norm:
            return reason, value, share * norm
    return None


def length(tensors: Iterable[Tensor]) -> float:
    """The norm of all numbers in tensors together."""
    return math.hypot(*(torch.linalg.vector_norm(tensor.detach()).item() for tensor in tensors))


@dataclass(frozen=True)
class Watchdog:
    """Counts refusals in a row; where they are too many, nothing learns until the token `until`."""

    in_a_row: int = 0
    until: int = 0
    rests: int = 0

    def accepted(self, position: int, settings: GuardsConfig) -> Watchdog:
        """After an update that was made: one long after the last rest forgets all of them."""
        healthy = position - self.until > settings.rest * 2**self.rests
        return replace(self, in_a_row=0, rests=0 if healthy else self.rests)

    def refused(self) -> Watchdog:
        """After an update that was not."""
        return replace(self, in_a_row=self.in_a_row + 1)

    def resting(self, position: int, settings: GuardsConfig, unit: int) -> Watchdog:
        """At rest, until a token at which all periods begin."""
        tokens = settings.rest * min(LONGEST, 2**self.rests)
        until = math.ceil((position + tokens) / unit) * unit
        log.warning("token %d: adaptation rests, frozen, until token %d", position, until)
        return Watchdog(0, until, min(self.rests + 1, int(math.log2(LONGEST))))
