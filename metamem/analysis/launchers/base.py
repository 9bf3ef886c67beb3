"""What a launcher is given, and what it gives."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from metamem.analysis.plan import Cell
from metamem.analysis.results import Result, result_of
from metamem.config.ablation import ResourcesConfig

Finished: TypeAlias = list[tuple[Cell, Result]]  # cells that have finished since the last time one asked


@dataclass(frozen=True)
class Sweep:
    """What all cells of an ablation share.

    - `function`   what measures a cell in place of a training
    - `folder`     where their run folders and logs go
    - `workers`    cells at once (None: as many as there is room for)
    - `attempts`   how often a cell is begun whose process dies
    """

    function: str | None
    folder: Path
    workers: int | None = None
    attempts: int = 2
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)


@runtime_checkable  # for the types that tests check
class Launcher(Protocol):
    """Runs cells, each in a process of its own; closed early, it ends those that run."""

    def run(self, cells: Iterator[Cell], sweep: Sweep) -> Generator[Finished]:
        """Rows of all cells, in the order in which they finish. Raises what no other cell would do better than: a full
        disk, a folder that cannot be made."""
        ...


def died(cell: Cell, how: str, attempt: int) -> Result:
    """The row of a cell whose process died in each of its tries."""
    return result_of(
        cell,
        "failed",
        message=f"its process died ({how}) in {attempt} of {attempt} tries; see {log_name(cell)}",
        attempts=attempt,
    )


def log_name(cell: Cell) -> str:
    """The file of what a cell's process said."""
    return f"{cell.slug}.log"


def redirect(log: Path) -> None:
    """Everything that this process says goes to a file from now on, what its libraries say too."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
