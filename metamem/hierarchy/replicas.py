"""Where the slow weights of a model are that several processes train, and how the gradients of all become one.

- `Replicas`  every process has all of them (data parallelism): one all-reduce of all gradients
- `Shards`    every process has its part of each, of its gradient and of its optimizer's state, and the whole only while
              a step is computed (FSDP2 of the root; ZeRO-3, Rajbhandari et al. 2020, arXiv 1910.02054): one
              all-gather of the weights and one reduce-scatter of the gradients

Each outer level has a loss of its own, and takes the gradient of it by its own parameters (`OuterLevels`). So there is
no one backward pass that could fill every `.grad`, and neither the hooks of `DistributedDataParallel` nor those of a
sharded module (nor Lightning Fabric, which wraps both) would see a gradient. What reduces here is all that they do
without hooks: one bucket, the sum of shares (`metamem.collectives`), at every outer step, also for a level that fires
later, so that what it has gathered is the same whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn import functional

from metamem.collectives import ALONE, World, peers

Gradients = list[Tensor | None]
M = TypeVar("M", bound=nn.Module)


class Replicas:
    """A model whole in every process; those of the first process are everyone's weights and buffers."""

    def __init__(self, model: nn.Module, world: World = ALONE) -> None:
        self.model, self.world = model, world
        world.alike([*model.parameters(), *model.buffers()])

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, the model has its weights, all of them, as plain tensors: it can run, be differentiated and saved."""
        yield

    def live(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """What the model runs with, of these that an optimizer has, and what a gradient is taken by."""
        return list(parameters)

    def reduced(
        self, gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter], values: Sequence[Tensor]
    ) -> tuple[Gradients, list[Tensor]]:
        """The sums over processes of gradients, None where a parameter has one in none, as its optimizer takes them;
        and of values beside them."""
        if self.world.size == 1:
            return list(gradients), list(values)
        used = _used(gradients, values[0])
        filled = [p.new_zeros(p.shape) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        with torch.no_grad():
            *sums, used = self.world.sums([*values, *filled, used])
        return _with_none(sums[len(values) :], used), sums[: len(values)]

    def full(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """All of a parameter, of its gradient or of what an optimizer keeps of it."""
        return tensor

    def own(self, tensor: Shaped[Tensor, "*shape"], parameter: nn.Parameter) -> Shaped[Tensor, "*shape"]:
        """What this process keeps of a whole tensor of a parameter's shape; the inverse of `full`."""
        return tensor.to(parameter.device)

    def weights(self) -> dict[str, Tensor]:
        """The model's `state_dict`, all of each tensor: all processes call it."""
        return {name: self.full(value) for name, value in self.model.state_dict().items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the model such weights, of which each process keeps its own."""
        of = dict(self.model.named_parameters(remove_duplicate=False))
        self.model.load_state_dict({k: self.own(v, of[k]) if k in of else v for k, v in weights.items()})

    def trained(self, make: Callable[[], M]) -> M:
        """The model whole and as `make` makes it, after the last step."""
        return cast(M, self.model)


class Shards(Replicas):
    """A model in parts: row by row, a contiguous share of each parameter in each process.

    The root alone is sharded, so that memories whose fast weights start at slow ones find them whole, as every module
    does. A 0-d parameter has no rows, and cannot be shared.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        super().__init__(model, world)
        self.tensor: Any = DTensor
        root = nn.Module()
        root.add_module("model", model)
        mesh = init_device_mesh(world.device.type, (world.size,))
        # Its hooks would fire at a call of the root, and no one calls it.
        self.root: Any = fully_shard(root, mesh=mesh, reshard_after_forward=False)
        self.sharded = dict(model.named_parameters())
        self.unsharded: dict[nn.Parameter, nn.Parameter] = {}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, every process has all of the weights: all processes enter."""
        with peers():
            self.root.unshard()
        self.unsharded = {self.sharded[name]: parameter for name, parameter in self.model.named_parameters()}
        try:
            yield
        finally:
            self.root.reshard()

    def live(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """The whole of each, `whole` only."""
        return [self.unsharded[parameter] for parameter in parameters]

    def reduced(
        self, gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter], values: Sequence[Tensor]
    ) -> tuple[Gradients, list[Tensor]]:
        """This process's part of each sum."""
        size, used, whole = self.world.size, _used(gradients, values[0]), self.live(parameters)
        filled = [p.new_zeros(p.shape) if g is None else g for g, p in zip(gradients, whole, strict=True)]
        with torch.no_grad():
            shares = [_by_process(gradient, size) for gradient in filled]
            packed = torch.cat(shares, 1)
            own = packed.new_empty(packed.shape[1])
            with peers():
                dist.reduce_scatter_single(own, packed.flatten())
            *sums, used = self.world.sums([*values, used])
            parts = own.split([share.shape[1] for share in shares])
            mine = [self._part(part, p) for part, p in zip(parts, parameters, strict=True)]
        return _with_none(mine, used), sums

    def full(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """All of it, gathered: all processes call it."""
        if not isinstance(tensor, self.tensor):
            return tensor
        with torch.no_grad(), peers():
            return tensor.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]

    def own(self, tensor: Shaped[Tensor, "*shape"], parameter: nn.Parameter) -> Shaped[Tensor, "*shape"]:
        """The rows that this process keeps."""
        if tensor.shape != parameter.shape:  # a count of steps
            return tensor.to(parameter.device)
        return self._part(_by_process(tensor.to(parameter.device), self.world.size)[self.world.rank], parameter)

    def trained(self, make: Callable[[], M]) -> M:
        """A plain model with the weights."""
        model = make().to(self.world.device)
        model.load_state_dict(self.weights())
        return model

    def _part(self, rows: Tensor, parameter: Any) -> Tensor:
        """This process's rows of a tensor of a parameter's shape, flat and filled up to the length of the longest part,
        as the distributed tensor that the optimizer takes."""
        here = parameter.to_local().shape
        return self.tensor.from_local(
            rows[: here.numel()].view(here),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def _by_process(tensor: Tensor, size: int) -> Tensor:
    """[size, numbers]: the rows of each process, as FSDP2 shares them, zeros where the last ones have fewer."""
    rows = -(-len(tensor) // size)
    return functional.pad(tensor.reshape(len(tensor), -1), (0, 0, 0, rows * size - len(tensor))).reshape(size, -1)


def _used(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    return like.new_tensor([float(gradient is not None) for gradient in gradients])


def _with_none(sums: Sequence[Tensor], used: Tensor) -> Gradients:
    """A gradient that no process has is none: an optimizer leaves its parameter alone."""
    return [total if flag else None for total, flag in zip(sums, used.tolist(), strict=True)]
