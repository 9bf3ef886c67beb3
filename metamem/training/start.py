"""How a training begins in each of its processes, before it makes anything."""

from __future__ import annotations

import torch

from metamem.collectives import World
from metamem.config.schema import RunConfig
from metamem.training.distributed import join
from metamem.training.random_states import seed_all
from metamem.training.tracking import check_trackers


def start(config: RunConfig) -> World:
    """Threads and seed as the config says; the processes that train together, and this one's place among them.

    Raises ConfigError for trackers that cannot be, and for a batch or a device that these processes cannot have.
    """
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    check_trackers(config)
    world = join(config.training)
    seed_all(config.seed)
    return world
