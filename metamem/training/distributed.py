"""Training in several processes, started by torchrun: the same command and numbers, each with its share of a batch.

    torchrun --standalone --nproc-per-node 4 -m metamem train CONFIG

Every process draws the whole batch from the same generator and takes its rows, so that the data and their order do not
depend on how many there are. Gradients, losses and counts are summed (`metamem.hierarchy.replicas`,
`metamem.collectives`); the first process alone evaluates, writes files and speaks. Random numbers of a forward pass
(dropout) are each process's own.

On CPUs processes talk by gloo; with `training.device: cuda` each has the GPU of its local rank and they talk by NCCL.
"""

from __future__ import annotations

import atexit
import os
import random
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from metamem.collectives import ALONE, World
from metamem.config.schema import RunTrainingConfig
from metamem.hierarchy.replicas import Replicas, Shards
from metamem.launch import launched
from metamem.training.random_states import seed_all

PATIENCE = timedelta(minutes=30)  # that others wait at most while the first process evaluates, or one hangs
LETTING_GO = 0.2  # seconds; see `_leave`


def join(settings: RunTrainingConfig) -> World:
    """The world of a training, whose processes all call this, with the device of each.

    Raises ConfigError for a batch that cannot be shared evenly, and for a device that is not there.
    """
    size, device = launched(), _device(settings)
    if size == 1:
        return World(device=device) if device.type != "cpu" else ALONE
    if settings.batch % size:
        near = max(size, round(settings.batch / size) * size)
        raise (settings.where / "batch").error(
            f"{settings.batch} cannot be shared evenly by {size} processes; make it a multiple of {size}, as {near} is"
        )
    if not dist.is_initialized():
        # Once in a process: a second group would meet the addresses of the first.
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=PATIENCE)
        atexit.register(_leave)
    return World(dist.get_rank(), size, device)


def _leave() -> None:
    """Leaves the group, and gives its threads time to let go of the last message.

    Those of gloo outlive the group while a cache of DTensor holds the mesh of shards. One that still has the tensors of
    a message when the interpreter ends, which it needs to free them, aborts the process (pytorch/pytorch#179291).
    """
    dist.destroy_process_group()
    time.sleep(LETTING_GO)


def part_ways(seed: int, world: World, step: int = 0) -> None:
    """Gives every process but the first random numbers of its own; the first has those of one process."""
    if not world.first:
        seed_all(random.Random(f"{seed} {world.rank} {step}").getrandbits(32))


def _device(settings: RunTrainingConfig) -> torch.device:
    if settings.device == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise (settings.where / "device").error(
            f"process {local} of this machine needs GPU {local}, and torch finds {torch.cuda.device_count()}; start "
            "fewer processes, or set it to cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def replicas(model: nn.Module, settings: RunTrainingConfig, world: World) -> Replicas:
    """The model on this process's device, whole or in parts. Raises ConfigError for what cannot be parted."""
    model.to(world.device)
    if world.size == 1 or settings.distributed == "ddp":
        return Replicas(model, world)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise (settings.where / "distributed").error(
                f"fsdp shares parameters by rows, and {name!r} is a single number: give it an axis, or set ddp"
            )
    return Shards(model, world)
