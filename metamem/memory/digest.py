"""Digest: what a chunk's router knows, all of it of the chunks before; carried in the memory's state.

    mean of the chunk's inputs ∥ its mean surprise ∥ log ‖u‖ ∥ log(1 + age), of each group

u is how far the group's weights went over the chunk, and its age how many chunks ago a gate of it was open. Before the
first chunk all is zero: nothing was read, nothing moved, and every group is new.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from metamem.memory.component import by_layer, in_order
from metamem.memory.networks import Weights
from metamem.memory.schedule import Rows
from metamem.state import align

FLOOR = 1e-3  # of a norm, whose logarithm and its gradient stay bounded where nothing moved


class DigestState(TypedDict):
    """`Digest` as a state; `weights` by layer."""

    features: Float[Tensor, "batch features"]
    inputs: Float[Tensor, "batch dim"]
    surprise: Float[Tensor, "batch"]
    weights: dict[str, Float[Tensor, "batch heads _d_in _d_out"]]
    opened: Float[Tensor, "batch groups"]
    age: Float[Tensor, "batch groups"]


class Digest(NamedTuple):
    """The features of the chunk that is being read, and what is gathered for those of the next: sums of its inputs and
    surprises, the weights at its start, which groups were open in it, and the age of each at its start."""

    features: Float[Tensor, "batch features"]
    inputs: Float[Tensor, "batch dim"]
    surprise: Float[Tensor, "batch"]
    weights: Weights
    opened: Float[Tensor, "batch groups"]
    age: Float[Tensor, "batch groups"]


def fresh(init: Weights, batch: int, dim: int, groups: int) -> Digest:
    """Before the first token."""
    zeros = init[0].new_zeros(batch, dim + 1 + 3 * groups)
    features, opened = zeros.split([dim + 1 + 2 * groups, groups], 1)
    weights = [weight.detach().expand(batch, *weight.shape) for weight in init]
    return Digest(features, zeros[:, :dim], zeros[:, 0], weights, 1 + opened, opened)


def to_state(digest: Digest) -> DigestState:
    """A digest as a state."""
    weights = by_layer(digest.weights)
    rest = {name: value for name, value in digest._asdict().items() if name != "weights"}
    return {"weights": weights, **rest}  # pyright: ignore[reportReturnType]


def from_state(state: DigestState) -> Digest:
    """A state as a digest."""
    return Digest(**{**state, "weights": in_order(state["weights"])})


def begin(digest: Digest, rows: Rows, now: Weights, chunk: int, by: tuple[int, int, int]) -> Digest:
    """The digest at the start of a chunk, in the rows (all for `()`) that begin one: features of the chunk before.
    `by`: heads, layers and blocks that groups tell apart."""
    moved = [after - before for after, before in zip(now, digest.weights, strict=True)]
    age = torch.where(digest.opened > 0, 0.0, digest.age + 1)
    features = torch.cat(
        [digest.inputs / chunk, digest.surprise.unsqueeze(1) / chunk, log_norms(moved, by), age.log1p()], 1
    )
    begun = Digest(
        features,
        torch.zeros_like(digest.inputs),
        torch.zeros_like(digest.surprise),
        now,
        torch.zeros_like(digest.opened),
        age,
    )
    if not rows:
        return begun
    mask = torch.tensor(rows)

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(align(mask, old), new, old)

    weights = [choose(new, old) for new, old in zip(begun.weights, digest.weights, strict=True)]
    rest = {name: choose(getattr(begun, name), getattr(digest, name)) for name in Digest._fields if name != "weights"}
    return Digest(weights=weights, **rest)


def gather(
    digest: Digest,
    x: Float[Tensor, "batch tokens dim"],
    surprise: Float[Tensor, "batch tokens"],
    gates: Float[Tensor, "batch tokens groups levels"],
) -> Digest:
    """The digest after tokens of the chunk were read."""
    opened = (gates > 0).any(-1).any(1).to(digest.opened.dtype)
    return digest._replace(
        inputs=digest.inputs + x.sum(1),
        surprise=digest.surprise + surprise.sum(1),
        opened=torch.maximum(digest.opened, opened),
    )


def log_norms(
    moved: list[Float[Tensor, "batch heads _d_in _d_out"]], by: tuple[int, int, int]
) -> Float[Tensor, "batch groups"]:
    """log √(ε² + ‖u‖²) − log ε of each group: 0 where it did not move."""
    heads, layers, blocks = by
    squares = [rearrange(u.square().sum(-2), "b h (n o) -> b h n o", n=blocks).sum(-1) for u in moved]
    of_groups = torch.stack(squares, 2)  # batch, heads, layers, blocks
    of_groups = of_groups if heads > 1 else of_groups.sum(1, keepdim=True)
    of_groups = of_groups if layers > 1 else of_groups.sum(2, keepdim=True)
    return 0.5 * torch.log1p(of_groups / FLOOR**2).flatten(1)
