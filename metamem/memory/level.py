"""A token level: one timescale of a fast-weight memory, with its objective already resolved to functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from metamem.memory.signals import Objective, OwnSignal, Signal

Learned = Literal["learned"]
SignalAt = Literal["chunk", "token", "decayed"]
StepRule = Literal["explicit", "implicit", "normalized"]
GateInput = Literal["token", "static"]
TransformName = Literal["none", "sign", "clip", "rmsprop", "adam", "muon"]
Retention = Callable[[Tensor, Tensor], Tensor]  # (weights, initial weights) -> loss per matrix
LEARNED_FORGET = 0.01  # where a learned forgetting starts
SCALE_FREE = ("sign", "rmsprop", "adam", "muon")  # transforms that do not know the size of what they are given


@dataclass(frozen=True)
class TokenLevel:
    """One component of a fast weight, `S ← β S − η in ⊗ δ`, `Δ ← α Δ + S`, applied every `period` tokens.

    A level of period 1 is read token by token. A level of period P sums its products over its last P tokens and
    applies them at its boundary, with the momentum and forgetting gates of the boundary token; reads see them from
    the next token on. There the step may be more than the sum:

        Δ ← α Δ + step · T(S) − Σ weight ∇R(W, W_init),   then W ← W ‖W_init‖ / ‖W‖ per column (`weight_norm`)

    - `objectives`  objective -> weight; their signal is the weighted sum
    - `signal`      where δ comes from (`metamem.memory.signals`), by name or a function of your own
    - `lr`          η: `learned` per token and head in (0, `lr_max`), or a constant. The writes of a chunk of C tokens
                    with signals at its start act at once: of unit keys, rates up to about 1 / C are stable
    - `momentum`    β: `learned` per token and head, or a constant in [0, 1); 0 keeps no momentum
    - `forget`      1 − α: `learned` per token and head, or a constant in [0, 1); 0 forgets nothing
    - `gates`       learned η, β, α are functions of the `token`, or `static`: one number a head (η: a head and writer)
    - `forget_start`  where a learned 1 − α starts: at first Δ halves in about 0.7 / `forget_start` moves
    - `forget_to`   `init`: what is forgotten returns to W_init; `zero`: W_init is forgotten too
    - `reduction`   of the products over a period: `sum`, or `mean` (a rate that does not depend on the period)
    - `step_rule`   of η in a linear memory: `explicit`, `implicit` or `normalized` (`metamem.memory.step_rule`)
    - `window`      a token's step descends on the objective of the last `window` tokens (Atlas, Behrouz et al. 2025,
                    eq. 9), all at the chunk's weights; 1: on its own
    - `transform`   T (`metamem.memory.transforms`); `step`: the size of a transformed step. η then weighs the tokens
                    inside T
    - `retention`   R -> weight (`losses.retention`)
    - `weight_norm` columns of W keep the length that W_init gave them (LaCT, Zhang et al. 2025)
    """

    name: str
    objectives: dict[Objective, float] = field(hash=False)
    period: int = 1
    lr: float | Learned = "learned"
    lr_max: float = 1.0
    momentum: float | Learned = 0.0
    forget: float | Learned = 0.0
    forget_to: Literal["init", "zero"] = "init"
    gates: GateInput = "token"
    forget_start: float = LEARNED_FORGET
    reduction: Literal["sum", "mean"] = "sum"
    signal: Signal | OwnSignal = "backprop"
    step_rule: StepRule = "explicit"
    window: int = 1
    transform: TransformName = "none"
    step: float = 1.0
    retention: dict[Retention, float] = field(default_factory=dict, hash=False)
    weight_norm: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range, or that another one leaves without effect."""
        if not self.objectives:
            raise ValueError(f"level {self.name!r} has no objective")
        choices = ("signal", Signal), ("transform", TransformName), ("step_rule", StepRule), ("gates", GateInput)
        for choice, known in choices:
            own = choice == "signal" and callable(self.signal)
            if getattr(self, choice) not in get_args(known) and not own:
                names = ", ".join(get_args(known))
                raise ValueError(f"level {self.name!r}: there is no {choice} {getattr(self, choice)!r} ({names})")
        for count in ("period", "window"):
            if getattr(self, count) < 1:
                raise ValueError(f"level {self.name!r}: {count} must be at least 1, not {getattr(self, count)}")
        for size in ("lr_max", "step"):
            if getattr(self, size) <= 0:
                raise ValueError(f"level {self.name!r}: {size} must be above 0, not {getattr(self, size)}")
        for gate, value, below in (
            ("lr", self.lr, math.inf),
            ("momentum", self.momentum, 1),
            ("forget", self.forget, 1),
        ):
            if value != "learned" and (isinstance(value, str) or not 0 <= value < below):
                raise ValueError(f"level {self.name!r}: {gate} must be 'learned' or in [0, {below}), not {value!r}")
        self._check_learned()
        self._check_boundary()

    def _check_learned(self) -> None:
        if not 0 < self.forget_start < 1:
            raise ValueError(f"level {self.name!r}: forget_start must be in (0, 1), not {self.forget_start}")
        if self.forget != "learned" and self.forget_start != LEARNED_FORGET:
            raise ValueError(
                f"level {self.name!r}: forget_start is where a learned forgetting starts, and this one is "
                f"{self.forget}; set forget to 'learned', or forget_start to {LEARNED_FORGET}"
            )
        if self.gates == "static" and "learned" not in (self.lr, self.momentum, self.forget):
            raise ValueError(
                f"level {self.name!r}: gates 'static' are learned numbers, and this level learns none; "
                f"set gates to 'token', or lr to 'learned'"
            )

    def _check_boundary(self) -> None:
        for setting, given, none in (
            ("transform", self.transform != "none", "none" if self.step == 1 else "none and step to 1"),
            ("retention", bool(self.retention), "{}"),
            ("weight_norm", self.weight_norm, "false"),
        ):
            if given and self.period == 1:
                raise ValueError(
                    f"level {self.name!r}: {setting} acts on whole matrices, at the boundary of a period, and a level "
                    f"of period 1 never builds them; set period to the memory's chunk or a multiple of it, "
                    f"or {setting} to {none}"
                )
        if self.transform == "none" and self.step != 1:
            raise ValueError(
                f"level {self.name!r}: step is the size of a transformed step, and without a transform lr is its size; "
                f"set step to 1"
            )
        if self.transform in SCALE_FREE and self.lr not in ("learned", 0.0, 1.0):  # 0 writes nothing
            raise ValueError(
                f"level {self.name!r}: {self.transform} gives steps of a size of its own, so that lr {self.lr} would "
                f"change nothing; set step to {self.lr} and lr to 1, or lr to 'learned'"
            )
        if self.transform == "adam" and self.has_momentum:
            raise ValueError(f"level {self.name!r}: adam has a momentum of its own; set momentum to 0")

    @property
    def has_momentum(self) -> bool:
        """Whether the level keeps a momentum S."""
        return self.momentum != 0.0

    @property
    def forgets(self) -> bool:
        """Whether the level's component fades."""
        return self.forget != 0.0

    @property
    def forgets_init(self) -> bool:
        """Whether what fades includes W_init."""
        return self.forgets and self.forget_to == "zero"
