"""Runs the cells of an ablation, each in a process of its own on one thread, and keeps a row for each.

    plan = plan_ablation("configs/ablation/periods.yaml")
    rows = run_ablation(plan, Path("runs/periods"), workers=4)

A folder that holds rows of the plan already is gone on with: only what is missing runs, so that a run that was killed
comes to the same rows as one that was not. A process that dies without a word (out of memory, killed) is tried again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import metamem
from metamem.analysis.cell import run_cell
from metamem.analysis.plan import Cell, Plan
from metamem.analysis.results import DiskFull, Result, ResultsFile, read_results
from metamem.config import UserError, to_yaml
from metamem.training.run_folder import new_folder

PLAN, CELLS = "ablation.json", "cells"
# Imported once, not for every cell; torch comes to the second at the first use of what may be compiled.
PRELOADED = ["__main__", "torch._dynamo", "metamem.analysis.cell"]
FINISHED = ("done", "diverged")  # a cell that failed is run again


@dataclass(frozen=True)
class AblationProgress:
    """How far an ablation is: cells done (of these, diverged and failed) of all, the one that finished last."""

    done: int
    diverged: int
    failed: int
    cells: int
    last: Result | None


@dataclass(frozen=True)
class Job:
    """A process at work on the cells of one fingerprint."""

    cells: list[Cell]
    process: BaseProcess
    attempt: int
    log: Path


def run_ablation(
    plan: Plan,
    folder: Path,
    workers: int | None = None,
    progress: Callable[[AblationProgress], None] | None = None,
    attempts: int = 2,
) -> list[Result]:
    """The rows of a plan, in its order, those that `folder` lacks computed by `workers` processes (default: one a CPU).

    Raises DiskFull where no more can be written: all that finished by then is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = ResultsFile(folder)
    finished = [row for row in read_results(folder) if row.status in FINISHED]
    known = {row.fingerprint: row for row in finished}
    found = {(row.cell, row.seed, row.fingerprint): row for row in finished}
    try:
        describe(plan, folder)

        def keep(cells: Sequence[Cell], result: Result) -> None:
            for cell in cells:
                row = _as_cell(result, cell)
                file.append(row)
                found[cell.name, cell.seed, cell.fingerprint] = row
                if progress is not None:
                    progress(_progress(plan, found, row))

        if progress is not None:
            progress(_progress(plan, found, None))
        left: dict[str, list[Cell]] = {}
        for cell in plan.cells:
            if (cell.name, cell.seed, cell.fingerprint) in found:
                continue
            if cell.fingerprint in known:  # another family's cell came to the same
                keep([cell], known[cell.fingerprint])
            else:
                left.setdefault(cell.fingerprint, []).append(cell)
        _run_all(plan, list(left.values()), folder, workers or _cpus(), attempts, keep, lambda: file.full)
    except DiskFull as error:
        kept = f"the rows of {len(found)} of {len(plan.cells)} cells are kept"
        raise DiskFull(f"{error}; {kept}: make space, and go on with --resume") from None
    finally:
        file.close()
    return [found[cell.name, cell.seed, cell.fingerprint] for cell in plan.cells]


def ablation_folder(name: str, root: Path, resume: bool) -> Path:
    """A new folder `root/name`, or `name-2`, …; the last of them that is there, to go on with, for `resume`."""
    numbered = [root / name, *(root / f"{name}-{number}" for number in range(2, 10_000))]
    there = [folder for folder in numbered if (folder / PLAN).is_file()] if resume else []
    return there[-1] if there else new_folder(root, name)


def describe(plan: Plan, folder: Path) -> None:
    """Writes what is run and how: the plan, the command, versions."""
    first = plan.cells[0]
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
            for cell in plan.cells
            if cell.seed == first.seed
        ],
        "fingerprints": [cell.fingerprint for cell in plan.cells],
        "config": to_yaml(first.config),
    }
    partial = folder / f"{PLAN}.partial"
    partial.write_text(json.dumps(described, indent=1, default=str))
    partial.replace(folder / PLAN)


def _run_all(
    plan: Plan,
    left: list[list[Cell]],
    folder: Path,
    workers: int,
    attempts: int,
    keep: Callable[[Sequence[Cell], Result], None],
    full: Callable[[], bool],
) -> None:
    context, waiting = _context(), [(cells, 1) for cells in left]
    running: dict[Connection, Job] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                cells, attempt = waiting.pop(0)
                receiver, job = _start(context, plan, cells, attempt, folder)
                running[receiver] = job
            ready, stop = wait(list(running)), None
            for receiver in ready:  # all of them, whatever one says: what is finished is kept
                assert isinstance(receiver, Connection)
                job = running.pop(receiver)
                result = _received(receiver, job)
                if isinstance(result, Exception):
                    stop = result
                elif result is None and job.attempt < attempts:
                    waiting.insert(0, (job.cells, job.attempt + 1))
                else:
                    keep(job.cells, replace(result or _died(job), attempts=job.attempt))
            if stop is not None or full():
                raise stop or DiskFull(f"{folder}: cannot be written: the disk is full")
    finally:
        for job in running.values():
            job.process.kill()


def _start(
    context: ForkServerContext | SpawnContext, plan: Plan, cells: list[Cell], attempt: int, folder: Path
) -> tuple[Connection, Job]:
    receiver, sender = context.Pipe(duplex=False)
    log = folder / CELLS / f"{cells[0].slug}.log"
    process = context.Process(target=_work, args=(sender, cells[0], plan.function, folder / CELLS, log))
    process.start()
    sender.close()  # so that the end of the process is the end of the pipe
    return receiver, Job(cells, process, attempt, log)


def _work(sender: Connection, cell: Cell, function: str | None, folder: Path, log: Path) -> None:
    """The process of a cell."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    torch.set_num_threads(1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        result: Result | Exception = run_cell(cell, function, folder)
        if log.stat().st_size == 0:
            log.unlink()
    except (OSError, UserError) as error:
        result = error
    sender.send(result)
    sender.close()


def _end_with_parent() -> None:
    """No cell goes on when the ablation was killed: it would write where the next one does."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _received(receiver: Connection, job: Job) -> Result | Exception | None:
    """What a process sent, an exception where no other cell would do better; None where it died before."""
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    job.process.join()
    receiver.close()
    return result


def _died(job: Job) -> Result:
    code = job.process.exitcode or 0
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    cell = job.cells[0]
    return Result(
        cell.name,
        cell.family,
        cell.factors,
        cell.overrides,
        cell.seed,
        cell.fingerprint,
        "failed",
        message=f"its process died ({how}) in {job.attempt} of {job.attempt} tries; see {job.log.name}",
    )


def _as_cell(result: Result, cell: Cell) -> Result:
    return replace(result, cell=cell.name, family=cell.family, factors=cell.factors, overrides=cell.overrides)


def _progress(plan: Plan, found: dict[Any, Result], last: Result | None) -> AblationProgress:
    rows = [found[key] for cell in plan.cells if (key := (cell.name, cell.seed, cell.fingerprint)) in found]
    by = {status: sum(row.status == status for row in rows) for status in ("diverged", "failed")}
    return AblationProgress(len(rows), by["diverged"], by["failed"], len(plan.cells), last)


def _context() -> ForkServerContext | SpawnContext:
    """Processes that are forked from a server which has imported all of it; new ones where there is no fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
