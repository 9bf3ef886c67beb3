"""Rates of an inner level: how far each parameter moves at each update, one number or learned.

    r_k[θ] = lr_k[unit of θ] · multiplier_k[θ]

A unit is what has a rate of its own: all that moves (`level`), a parameter group, a tensor, a row of one, or every
element (Meta-SGD; Li et al. 2017). With `per_step` each has one for each of the K updates, K of them (MAML++; Antoniou
et al. 2019); updates beyond the K-th take the last. The multiplier is that of a mask or a router over rates
(`metamem.episodes.gates`).

A learned rate may become negative, as in Meta-SGD's own code; `positive` keeps it above zero, as the exponential of
what is learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

Granularity: TypeAlias = Literal["level", "group", "tensor", "row", "element"]
Shapes: TypeAlias = Mapping[str, Sequence[int]]


class Multiplier(Protocol):
    """What multiplies rates, from the losses [tasks] and gradients [tasks, *shape] of an update."""

    reads_gradients: bool

    def __call__(self, step: int, losses: Tensor, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...


class Units(NamedTuple):
    """The unit of each parameter, and the shape of each unit's tensor: () for one number."""

    of: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def units(per: Granularity, shapes: Shapes, groups: Mapping[str, str] | None = None) -> Units:
    """What has a rate, or a gate, of its own; `groups`: the group of each parameter."""
    if per == "level":
        return Units(dict.fromkeys(shapes, "all"), {"all": ()})
    if per == "group":
        if groups is None:
            raise ValueError("rates per group need the group of every parameter")
        return Units({name: groups[name] for name in shapes}, {groups[name]: () for name in shapes})
    of = {name: name.replace(".", "/") for name in shapes}  # a dot would not be allowed in a parameter's name
    if per == "tensor":
        return Units(of, {unit: () for unit in of.values()})
    if per == "row":
        rows = {name: (shape[0], *(1,) * (len(shape) - 1)) if shape else () for name, shape in shapes.items()}
        return Units(of, {of[name]: shape for name, shape in rows.items()})
    return Units(of, {of[name]: tuple(shape) for name, shape in shapes.items()})


class Rates(nn.Module):
    """The rates of an inner level: `(step, losses, gradients) -> rate of each parameter`.

    - `shapes`      name -> shape of the parameters that move
    - `lr`          a number, or where a learned rate starts
    - `learned`, `per`, `per_step`, `positive`   as above; `steps`: K; `groups`: the group of each parameter
    - `multiplier`  a mask or a router over rates
    """

    def __init__(
        self,
        shapes: Shapes,
        lr: float,
        *,
        learned: bool = False,
        per: Granularity = "tensor",
        per_step: bool = False,
        positive: bool = False,
        steps: int = 1,
        groups: Mapping[str, str] | None = None,
        multiplier: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if positive and lr <= 0:
            raise ValueError(f"positive rates start above 0, not at {lr:g}")
        self.lr, self.learned, self.per_step, self.positive, self.steps = lr, learned, per_step, positive, steps
        self.names = tuple(shapes)
        self.multiplier = multiplier
        if learned:
            self.unit_of, unit_shapes = units(per, shapes, groups)
            start = math.log(lr) if positive else lr
            lead = steps if per_step else 1
            self.rates = nn.ParameterDict(
                {unit: nn.Parameter(torch.full((lead, *shape), start)) for unit, shape in unit_shapes.items()}
            )

    @property
    def reads_gradients(self) -> bool:
        """Whether the rates of an update depend on its losses and gradients."""
        return getattr(self.multiplier, "reads_gradients", False)

    def forward(self, step: int, losses: Tensor, gradients: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
        """The rate of each parameter at update `step`, which broadcasts against [tasks, *shape]."""
        rates = self.at(step)
        if self.multiplier is None:
            return rates
        factors = self.multiplier(step, losses, gradients)
        return {name: rate * factors[name] for name, rate in rates.items()}

    def at(self, step: int) -> dict[str, Tensor | float]:
        """The rates themselves, before what multiplies them."""
        if not self.learned:
            return dict.fromkeys(self.names, self.lr)
        entry = min(step, self.steps - 1) if self.per_step else 0
        found = {unit: value[entry] for unit, value in self.rates.items()}
        if self.positive:
            found = {unit: value.exp() for unit, value in found.items()}
        return {name: found[self.unit_of[name]] for name in self.names}

    @torch.no_grad()
    def negative(self) -> float:
        """The share of learned rates that are below zero."""
        if not self.learned or self.positive:
            return 0.0
        values = torch.cat([value.flatten() for value in self.rates.values()])
        return float((values < 0).double().mean())
