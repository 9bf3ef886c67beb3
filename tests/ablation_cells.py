"""Functions that measure a cell in the tests of ablations; what they leave behind lies in the folder `vars.marks`."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from metamem import Config
from metamem.training import Diverged


def parabola(config: Config, seed: int) -> dict[str, float]:
    """A metric with a best period, flat."""
    return {"error": (math.log2(config.vars["period"]) - 2) ** 2 + seed}


def measured(config: Config, seed: int) -> dict[str, Any]:
    """Metrics, a curve, a cost and more."""
    return {
        "metrics": {"error": 1.0},
        "curves": {"loss": {"x": [1], "y": [2.0]}},
        "cost": {"flops": 7},
        "gates": [[1, 0]],
    }


def slow(config: Config, seed: int) -> dict[str, float]:
    """Leaves its process's id, then takes a while."""
    mark(config, f"{config.vars['period']}-{seed}-{os.getpid()}")
    time.sleep(0.5)
    return {"error": float(config.vars["period"])}


def endless(config: Config, seed: int) -> dict[str, float]:
    """Leaves its process's id, then goes on for ever."""
    mark(config, str(os.getpid()))
    while True:
        time.sleep(1)


def diverging(config: Config, seed: int) -> dict[str, float]:
    """Diverges at period 4, gives no number at period 8."""
    mark(config, f"{config.vars['period']}-{time.monotonic_ns()}")
    if config.vars["period"] == 4:
        raise Diverged("step 17: the loss of level 'task' is nan", 17)
    return {"error": math.inf if config.vars["period"] == 8 else 1.0}


def broken(config: Config, seed: int) -> dict[str, float]:
    """Raises at period 4 until it is mended."""
    if config.vars["period"] == 4 and not (Path(config.vars["marks"]) / "mended").exists():
        raise KeyError("nothing here")
    return {"error": 1.0}


def dying(config: Config, seed: int) -> dict[str, float]:
    """Is killed: once at period 2, always at period 4."""
    first = mark(config, str(config.vars["period"]))
    if config.vars["period"] == 4 or (config.vars["period"] == 2 and first):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"error": 1.0}


def large(config: Config, seed: int) -> dict[str, Any]:
    """A row of a third of a megabyte."""
    return {"metrics": {"error": 1.0}, "noise": os.urandom(170_000).hex()}


def full(config: Config, seed: int) -> dict[str, Any]:
    """Finds the disk full."""
    raise OSError(28, os.strerror(28))


def mark(config: Config, name: str) -> bool:
    """Whether it is the first to leave this mark."""
    folder = Path(config.vars["marks"])
    folder.mkdir(exist_ok=True)
    first = not (folder / name).exists()
    (folder / name).touch()
    return first


def threads(config: Config, seed: int) -> dict[str, float]:
    """The threads that it has."""
    return {"threads": torch.get_num_threads()}


def waiting(config: Config, seed: int) -> dict[str, float]:
    """Leaves its process's id, then waits until it may go on."""
    mark(config, f"{config.vars['period']}-{os.getpid()}")
    while not (Path(config.vars["marks"]) / "go").exists():
        time.sleep(0.05)
    return {"error": float(config.vars["period"])}


def bowl(config: Config, seed: int) -> dict[str, float | None]:
    """Least at a rate of 0.1 and a period of 8; diverges above a rate of 10."""
    if config.vars["rate"] > 10:
        raise Diverged("step 3: the loss of level 'task' is nan", 3)
    error = math.log10(config.vars["rate"] / 0.1) ** 2 + math.log2(config.vars["period"] / 8) ** 2
    return {"error": error + seed, "score": -error, "none": None}
