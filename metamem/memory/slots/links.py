"""Temporal links: which slot was written after which (Graves et al. 2016, Methods), for each write head.

L_ij ← (1 − w_i − w_j) L_ij + w_i p_j,   L_ii = 0              L_ij: how much slot i was written next after slot j
p ← (1 − Σ w) p + w                                            p_j: how much slot j was the last one written
forward = L w^r,   backward = Lᵀ w^r                           where a read head goes on, or back, from where it was

A head that follows soft links is a little less sure at each; `resolved` makes up for it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory.slots.content import Weights
from metamem.memory.slots.location import sharpened

Links = Float[Tensor, "batch writes slots slots"]
Precedence = Float[Tensor, "batch writes slots"]
Directed = Float[Tensor, "batch writes heads slots"]

NOTHING = 1e-6  # of a distribution over slots: no link leads anywhere


def links_after(links: Links, precedence: Precedence, written: Weights) -> Links:
    """The links after a write; `precedence`: that before it."""
    # w_i + w_j and w_i p_j as products: their gradients, sums over rows and over columns, are products too, where a
    # compiled graph would run through rows and columns in one loop, transposing as it goes.
    ones = torch.ones_like(written)
    faded = torch.stack([written, ones], -1) @ torch.stack([ones, written], -2)
    links = (1 - faded) * links + written.unsqueeze(-1) @ precedence.unsqueeze(-2)
    return links * (1 - torch.eye(links.shape[-1], dtype=links.dtype, device=links.device))


def precedence_after(precedence: Precedence, written: Weights) -> Precedence:
    """The precedence after a write."""
    return torch.addcmul(written, 1 - written.sum(-1, keepdim=True), precedence)


def directed(links: Links, read: Weights) -> tuple[Directed, Directed]:
    """Where each link takes each read head: forward, and backward."""
    heads = read.unsqueeze(1)
    return heads @ links.mT, heads @ links


def resolved(weights: Directed, powers: Float[Tensor, "batch heads"]) -> Directed:
    """Each head's distribution to its power s ≥ 1, made one again: w^s / Σ w^s; where no link leads, nothing.

    Link distribution sharpness control (Csordás and Schmidhuber 2019, arXiv 1904.10278)."""
    total, writes = weights.sum(-1, keepdim=True), weights.shape[1]
    sharp = sharpened(weights.flatten(1, 2), powers.repeat(1, writes)).view_as(weights)
    return sharp * (total / (total + NOTHING))
