"""Dynamic allocation: which slots are in use, and where a head writes that wants a free one (Graves et al. 2016).

    u ← (u + (1 − u)(1 − Π_heads (1 − w^w))) Π_heads (1 − f w^r)              the weights of the token before
    a_i = (1 − u_i) Π_{j before i} u_j,   u = ε + (1 − ε) u                  before: less used, or as used and lower

Released DNC: no gradient goes through the write weights into the usage; several write heads allocate in turn, each
after what the ones before it are about to take.
"""

from __future__ import annotations

import functools
import operator

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory.slots.content import EPSILON, Weights

Usage = Float[Tensor, "batch slots"]
PAIRWISE = 64  # slots up to which comparing all pairs is faster than a sort: a compiled graph fuses it

HeadGates = Float[Tensor, "batch heads"]
Written = Float[Tensor, "batch writes slots"]


def usage_after(usage: Usage, written: Written, read: Weights, free: HeadGates | None) -> Usage:
    """The usage once what was written is in use, and what was read and freed no more; None: nothing is freed."""
    used = 1 - _product(1 - written.detach()) * (1 - usage)
    return used if free is None else used * _product(1 - free.unsqueeze(-1) * read)


def allocation(usage: Usage) -> Usage:
    """A weight that is near 1 at the least used slot, the lowest of equal ones; 0 everywhere where all are in use."""
    usage = EPSILON + (1 - EPSILON) * usage
    if usage.shape[-1] <= PAIRWISE:
        # Which slot comes before which, in numbers: masks of a bit each would be combined one by one.
        mine, other = usage.detach().unsqueeze(-1), usage.detach().unsqueeze(-2)
        lower = torch.ones_like(mine * other).tril(-1)
        before = (other < mine).to(usage.dtype) + (other == mine).to(usage.dtype) * lower
        return (1 - usage) * torch.exp((before @ usage.log().unsqueeze(-1)).squeeze(-1))
    ordered, slots = usage.sort(dim=-1, stable=True)
    logs = ordered.log()
    shares = (1 - ordered) * torch.exp(logs.cumsum(-1) - logs)
    return torch.zeros_like(usage).scatter(-1, slots, shares)


def allocate(usage: Usage, gates: HeadGates) -> Weights:
    """Allocation weights of each write head; `gates`: how much of its allocation each is about to write."""
    weights: list[Tensor] = []
    for head in range(gates.shape[1]):
        if weights:
            usage = usage + (1 - usage) * gates[:, head - 1 : head] * weights[-1]
        weights.append(allocation(usage))
    return torch.stack(weights, 1)


def _product(factors: Float[Tensor, "batch _heads slots"]) -> Usage:
    return functools.reduce(operator.mul, factors.unbind(1))
