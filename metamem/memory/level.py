"""A token level: one timescale of a fast-weight memory, with its objective already resolved to functions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from metamem.memory.signals import Objective

Learned = Literal["learned"]
Signal = Literal["backprop", "predicted_targets", "hebbian"]


@dataclass(frozen=True)
class TokenLevel:
    """One component of a fast weight, `S ← β S − η in ⊗ δ`, `Δ ← α Δ + S`, applied every `period` tokens.

    A level of period 1 is read token by token. A level of period P sums its products over its last P tokens and
    applies them at its boundary, with the momentum and forgetting gates of the boundary token; reads see them from
    the next token on.

    - `objectives`  objective -> weight; their signal is the weighted sum
    - `signal`      δ: by `backprop` of the objectives, by `predicted_targets` (a slow map of the value gives each
                    layer's target), or `hebbian` (−v)
    - `lr`          η: `learned` per token and head in (0, `lr_max`), or a constant. The writes of a chunk of C tokens
                    with signals at its start act at once: of unit keys, rates up to about 1 / C are stable
    - `momentum`    β: `learned` per token and head, or a constant in [0, 1); 0 keeps no momentum
    - `forget`      1 − α: `learned` per token and head, or a constant in [0, 1); 0 forgets nothing
    - `forget_to`   `init`: what is forgotten returns to W_init; `zero`: W_init is forgotten too
    - `reduction`   of the products over a period: `sum`, or `mean` (a rate that does not depend on the period)
    """

    name: str
    objectives: dict[Objective, float] = field(hash=False)
    period: int = 1
    signal: Signal = "backprop"
    lr: float | Learned = "learned"
    lr_max: float = 1.0
    momentum: float | Learned = 0.0
    forget: float | Learned = 0.0
    forget_to: Literal["init", "zero"] = "init"
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        if not self.objectives:
            raise ValueError(f"level {self.name!r} has no objective")
        if self.period < 1:
            raise ValueError(f"level {self.name!r}: period must be at least 1, not {self.period}")
        if self.signal not in get_args(Signal):
            raise ValueError(f"level {self.name!r}: there is no signal {self.signal!r} ({', '.join(get_args(Signal))})")
        if self.lr_max <= 0:
            raise ValueError(f"level {self.name!r}: lr_max must be above 0, not {self.lr_max}")
        for gate, value, below in (
            ("lr", self.lr, math.inf),
            ("momentum", self.momentum, 1),
            ("forget", self.forget, 1),
        ):
            if value != "learned" and (isinstance(value, str) or not 0 <= value < below):
                raise ValueError(f"level {self.name!r}: {gate} must be 'learned' or in [0, {below}), not {value!r}")

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
