"""Runs the cells of an ablation, each in a process of its own, and keeps a row for each.

    plan = plan_ablation("configs/ablation/periods.yaml")
    rows = run_ablation(plan, Path("runs/periods"), workers=4)

A folder that holds rows of the plan already is gone on with: only what is missing runs, so that a run that was killed
comes to the same rows as one that was not. A process that dies without a word (out of memory, killed) is tried again.
Where the processes are is the launcher's matter (`metamem.analysis.launchers`); the rows are the same.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import metamem
from metamem.analysis.launchers import Launcher, Local, Sweep
from metamem.analysis.plan import Cell, Plan
from metamem.analysis.results import DiskFull, Result, ResultsFile, read_results
from metamem.analysis.search import search_cells
from metamem.atomic import replacing
from metamem.config import to_dict, to_yaml
from metamem.training.run_folder import new_folder

PLAN, CELLS = "ablation.json", "cells"
FINISHED = ("done", "diverged")  # a cell that failed is run again


@dataclass(frozen=True)
class AblationProgress:
    """How far an ablation is: cells done (of these, diverged and failed) of all, the one that finished last."""

    done: int
    diverged: int
    failed: int
    cells: int
    last: Result | None


def run_ablation(
    plan: Plan,
    folder: Path,
    workers: int | None = None,
    progress: Callable[[AblationProgress], None] | None = None,
    launcher: Launcher | None = None,
) -> list[Result]:
    """The rows of a plan, in its order, those that `folder` lacks computed by `workers` processes (default: as many as
    there is room for) where the launcher has them (default: on this machine).

    Raises DiskFull where no more can be written: all that finished by then is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(plan.function, folder / CELLS, workers, plan.retries + 1, plan.resources)
    with closing(ResultsFile(folder)) as file:
        rows = _Rows(plan, folder, file, read_results(folder), progress)
        try:
            rows.begin()
            with closing((launcher or Local()).run(rows.missing(), sweep)) as batches:
                for batch in batches:
                    for cell, result in batch:
                        rows.finished(cell, result)
                    if file.full:
                        raise DiskFull(f"{folder}: cannot be written: the disk is full")
        except DiskFull as error:
            kept = f"the rows of {len(rows.found)} of {plan.count} cells are kept"
            raise DiskFull(f"{error}; {kept}: make space, and go on with --resume") from None
        return rows.all()


class _Rows:
    """The rows of a plan's cells: those that are there, those that are waited for, and which cells have none yet."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        file: ResultsFile,
        before: list[Result],
        progress: Callable[[AblationProgress], None] | None,
    ) -> None:
        self.plan, self.folder, self.file, self.before, self.progress = plan, folder, file, before, progress
        finished = [row for row in before if row.status in FINISHED]
        self.known = {row.fingerprint: row for row in finished}
        self.found = {(row.cell, row.seed, row.fingerprint): row for row in finished}
        self.running: dict[str, list[Cell]] = {}
        self.chosen, self.refused = list(plan.cells), list[Result]()

    def begin(self) -> None:
        """Writes what is run, and tells how far it is already."""
        if self.chosen:
            describe(self.plan, self.folder, self.chosen)
        self._tell(None)

    def missing(self) -> Iterator[Cell]:
        """The cells that have to run, one of those that come to the same."""
        for cell in self._wanted():
            if _key(cell) in self.found:
                continue
            if cell.fingerprint in self.known:  # another family's cell came to the same
                self._keep(_as_cell(self.known[cell.fingerprint], cell))
            elif cell.fingerprint in self.running:
                self.running[cell.fingerprint].append(cell)
            else:
                self.running[cell.fingerprint] = [cell]
                yield cell

    def finished(self, cell: Cell, result: Result) -> None:
        """Keeps the row of a cell, and of those that come to the same."""
        if result.status in FINISHED:
            self.known[cell.fingerprint] = result
        for one in self.running.pop(cell.fingerprint):
            self._keep(_as_cell(result, one))

    def all(self) -> list[Result]:
        """The rows of all cells; last those of points of a search that no config could have."""
        return [*(self.found[_key(cell)] for cell in self.chosen), *self.refused]

    def _wanted(self) -> Iterator[Cell]:
        """All cells, those of a search when they are chosen."""
        yield from self.plan.cells
        if self.plan.search is not None:
            for cell in search_cells(
                self.plan.search, self.before, lambda cell: self.found.get(_key(cell)), self._refuse
            ):
                self.chosen.append(cell)
                describe(self.plan, self.folder, self.chosen)
                yield cell

    def _refuse(self, row: Result) -> None:
        self.refused.append(row)
        self._keep(row)

    def _keep(self, row: Result) -> None:
        if row not in self.before:  # a point that no config can have is refused again
            self.file.append(row)
        self.found[row.cell, row.seed, row.fingerprint] = row
        self._tell(row)

    def _tell(self, last: Result | None) -> None:
        if self.progress is not None:
            rows = [self.found[_key(cell)] for cell in self.chosen if _key(cell) in self.found] + self.refused
            by = {status: sum(row.status == status for row in rows) for status in ("diverged", "failed")}
            self.progress(AblationProgress(len(rows), by["diverged"], by["failed"], self.plan.count, last))


def _key(cell: Cell) -> tuple[str, int, str]:
    return cell.name, cell.seed, cell.fingerprint


def ablation_folder(name: str, root: Path, resume: bool) -> Path:
    """A new folder `root/name`, or `name-2`, …; the last of them that is there, to go on with, for `resume`."""
    numbered = [root / name, *(root / f"{name}-{number}" for number in range(2, 10_000))]
    there = [folder for folder in numbered if (folder / PLAN).is_file()] if resume else []
    return there[-1] if there else new_folder(root, name)


def describe(plan: Plan, folder: Path, cells: Sequence[Cell]) -> None:
    """Writes what is run and how: the cells so far, the command, versions."""
    first = cells[0]
    described = {
        "name": plan.name,
        "source": plan.source,
        "base": plan.base,
        "function": plan.function,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "versions": {
            "metamem": metamem.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "seeds": plan.seeds,
        "cells": [
            {"name": cell.name, "family": cell.family, "factors": cell.factors, "overrides": cell.overrides}
            for cell in cells
            if cell.seed == first.seed
        ],
        "fingerprints": [cell.fingerprint for cell in cells],
        "search": None if plan.search is None else to_dict(plan.search.settings),
        "config": to_yaml(first.config),
    }
    with replacing(folder / PLAN) as partial:
        partial.write_text(json.dumps(described, indent=1, default=str))


def _as_cell(result: Result, cell: Cell) -> Result:
    return replace(result, cell=cell.name, family=cell.family, factors=cell.factors, overrides=cell.overrides)
