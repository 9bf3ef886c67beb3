"""The model as trained beside the one that adapts: an expert that sleeps while nothing speaks against the other.

Running it costs a forward pass, so it mostly sleeps. It wakes where a probe finds it ahead, and at an *alarm*: the sum
of (loss − running mean) since the window began leaves ± alarm · σ √window. From the token after, both predict,

    p = (1 − w) p_adapted + w p_frozen,    w ← share + (1 − 2 share) w p_frozen(x) / p(x)

(fixed share: Herbster and Warmuth 1998; experts that sleep: Freund et al. 1997). Awake, the loss over any n tokens
exceeds that of the model as trained by less than ln(1 / share) + 2 share · n nats. By its lead (the sum of what the
adapted weights lost to it, never below zero) over `lead` nats, the weights are put back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.adaptation.guards import EMPTY, Running
from metamem.config import FallbackConfig

WINDOW = 128  # tokens, rounded up to a multiple of the fastest inner period
MEMORY = 2048  # tokens: the half-life of the running loss
QUIET = 0.1  # nats: the least standard deviation of a token's loss that an alarm counts with
CALM = 4  # windows without a lead, after which it sleeps again
SERVICE = 4096  # tokens without an alarm that make weights worth coming back to
FALLS = 3  # times that weights are put back without a calm, after which adaptation rests


@dataclass(frozen=True)
class Standing:
    """What is known of the two: whether the frozen one runs (`watching`: without a say), what it is worth in each row,
    how far it is ahead, in this window too, how the loss has been, and for how long all went well."""

    mode: Literal["asleep", "watching", "awake"] = "asleep"
    worth: tuple[float, ...] = ()
    lead: float = 0.0
    ahead: float = 0.0
    excess: float = 0.0
    calm: int = 0
    falls: int = 0
    service: int = 0
    loss: Running = EMPTY
    square: Running = EMPTY

    def alarm_in(self, losses: Sequence[float], settings: FallbackConfig, window: int) -> int | None:
        """The index of the token at which the loss has left its running estimate, if it has."""
        if self.loss.weight < 1 - 0.5 ** (2 * window / MEMORY):  # less than two windows seen
            return None
        mean = self.loss.mean
        deviation = math.sqrt(max(self.square.mean - mean**2, QUIET**2))
        excess, limit = self.excess, settings.alarm * deviation * math.sqrt(window)
        for index, loss in enumerate(losses):
            excess += loss - mean
            if abs(excess) > limit:
                return index
        return None

    def read(self, losses: Sequence[float]) -> Standing:
        """After tokens that the adapted model lost so much on."""
        count = len(losses)
        known = self.loss.mean if self.loss.weight else 0.0
        mean, square = sum(losses) / count, sum(loss**2 for loss in losses) / count
        return replace(
            self,
            excess=self.excess + sum(losses) - count * known if self.loss.weight else 0.0,
            loss=self.loss.after(mean, MEMORY, count),
            square=self.square.after(square, MEMORY, count),
        )

    def woken(self, rows: int) -> Standing:
        """Both are worth the same, and count."""
        return replace(self, mode="awake", worth=(0.5,) * rows, calm=0)

    def asleep(self) -> Standing:
        """The frozen one stops running; what went wrong before is forgotten."""
        return replace(self, mode="asleep", worth=(), lead=0.0, calm=0, falls=0)

    def after_window(self, settings: FallbackConfig, window: int, rows: int) -> Standing:
        """At the end of a window: who runs in the next."""
        lead = max(0.0, self.lead + self.ahead)
        ended = replace(self, lead=lead, ahead=0.0, excess=0.0)
        if self.mode == "asleep":
            return replace(ended, service=self.service + window)
        if self.mode == "watching":
            if self.ahead > settings.wake or lead > settings.wake:
                return ended.woken(rows)
            return ended if lead > 0 else replace(ended.asleep(), service=self.service + window)
        calm = 0 if lead > 0 else self.calm + 1
        return ended.asleep() if calm >= CALM else replace(ended, calm=calm)


def mixture(
    adapted: Float[Tensor, "batch tokens"],
    frozen: Float[Tensor, "batch tokens"],
    worth: Sequence[float],
    share: float,
) -> tuple[Float[Tensor, "batch tokens"], tuple[float, ...]]:
    """The loss of both together, token by token, and what the frozen one is worth after them, in each row."""
    losses, after = [], []
    for ours, theirs, w in zip(adapted.tolist(), frozen.tolist(), worth, strict=True):
        row = []
        for a, f in zip(ours, theirs, strict=True):
            least = min(a, f)
            both = (1 - w) * math.exp(least - a), w * math.exp(least - f)
            total = sum(both)
            row.append(least - math.log(total))
            w = share + (1 - 2 * share) * both[1] / total
        losses.append(row)
        after.append(w)
    return torch.tensor(losses, dtype=adapted.dtype, device=adapted.device), tuple(after)
