"""Rates of an inner level: how far each parameter moves at each update, one number or learned.

    r_k[θ] = lr_k[θ] · multiplier_k[θ]

A learned rate is one for all that moves (`level`), for a parameter group, a tensor, a row of one, or every element
(Meta-SGD; Li et al. 2017): `metamem.hierarchy.rates`. With `per_step` each has an entry for each of the K updates, K of
them (MAML++; Antoniou et al. 2019); updates beyond the K-th take the last. The multiplier is that of a mask or a router
over rates (`metamem.episodes.gates`).

A learned rate may become negative, as in Meta-SGD's own code; `positive` keeps it above zero, as the exponential of
what is learned.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metamem.hierarchy.rates import LearnedRates, RatesPer, learned_rates_over


class Rates(nn.Module):
    """The rates of an inner level: `(step, losses, gradients) -> rate of each parameter`.

    - `parameters`  those that move, by name
    - `lr`          a number, or where a learned rate starts
    - `learned`, `per`, `per_step`, `positive`   as above; `steps`: K; `groups`: the group of each parameter
    - `multiplier`  a `RateRouter`
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        lr: float,
        *,
        learned: bool = False,
        per: RatesPer = "tensor",
        per_step: bool = False,
        positive: bool = False,
        steps: int = 1,
        groups: Mapping[str, str] | None = None,
        multiplier: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if positive and lr <= 0:
            raise ValueError(f"positive rates start above 0, not at {lr:g}")
        self.lr, self.learned, self.names, self.multiplier = lr, learned, tuple(parameters), multiplier
        if learned:
            self.layout = layout(parameters, per, groups, lr, positive)
            self.rates = nn.Parameter(self.layout.fresh().repeat(steps if per_step else 1, 1))

    @property
    def reads_gradients(self) -> bool:
        """Whether the rates of an update depend on its losses and gradients."""
        return getattr(self.multiplier, "reads_gradients", False)

    def forward(
        self, step: int, losses: Float[Tensor, "*tasks"], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor | float]:
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
        entry = min(step, len(self.rates) - 1)
        return dict(zip(self.names, self.layout.of_each(self.rates[entry]), strict=True))

    @torch.no_grad()
    def negative(self) -> float:
        """The share of learned rates that are below zero."""
        return float((self.rates < 0).double().mean()) if self.learned and not self.layout.positive else 0.0


def layout(
    parameters: Mapping[str, Tensor],
    per: RatesPer,
    groups: Mapping[str, str] | None,
    initial: float = 0.0,
    positive: bool = False,
) -> LearnedRates:
    """What has a number of its own, and where it stands in the vector of all. Raises ValueError without the groups that
    `per: group` needs."""
    if per == "group" and groups is None:
        raise ValueError("numbers per group need the group of every parameter")
    names = list(dict.fromkeys((groups or {}).get(name, "") for name in parameters))
    of = [names.index((groups or {}).get(name, "")) for name in parameters]
    return learned_rates_over(per, list(parameters.values()), of, initial, positive)
