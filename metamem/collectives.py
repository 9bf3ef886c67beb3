"""What processes that train one model together tell one another: sums over them, differentiable or not.

A process is one of a `World` of `size`, and has its share of a batch's rows. What it computes is its share of the whole
too: losses, gradients and counts of all rows are sums over processes, so that none of them is ever a mean of means. A
world of one process, `ALONE`, leaves everything as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from metamem.launch import PeerLost

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The process `rank` of `size`, and the device that it computes on. Every method but `rows` is one that all
    processes call, in the same order."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This process's rows of a batch; `size` divides it."""
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum over processes of each tensor, by one message, and differentiable: what a process does with a sum is
        in the gradient of every process's part in it."""
        if self.size == 1 or not tensors:
            return list(tensors)
        flat: Any = _Sum.apply(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(like.shape).to(like.dtype) for part, like in zip(parts, tensors, strict=True)]

    def sum(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over processes, differentiable."""
        return self.sums([tensor])[0]

    def joined(self, tensor: Shaped[Tensor, "share *rest"]) -> Shaped[Tensor, "batch *rest"]:
        """The rows of all processes, differentiable."""
        if self.size == 1:
            return tensor
        whole = tensor.new_zeros(self.size * len(tensor), *tensor.shape[1:])
        whole[self.rows(len(whole))] = tensor
        return self.sum(whole)

    def means(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over processes of each number."""
        if self.size == 1 or not values:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, (add(total) / self.size).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        return flag if self.size == 1 else bool(self.means({"": float(flag)})[""])

    def told(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them."""
        if self.size == 1:
            return make()
        made: list[Any] = [make() if self.first else None]
        with peers():
            dist.broadcast_object_list(made, src=0)
        return made[0]

    def alike(self, tensors: Sequence[Tensor]) -> None:
        """Gives the tensors of all processes the values that the first has."""
        if self.size > 1:
            with torch.no_grad(), peers():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)


ALONE = World()


def add(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Adds the same tensor of all processes to this one, in place."""
    with peers():
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def peers() -> Iterator[None]:
    """Around a message: that no one answers any more is an error of its own."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        raise PeerLost(f"another process of this training has ended or hangs; see its message ({error})") from error


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return add(tensor.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return add(gradient.clone())
