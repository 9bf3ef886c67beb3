"""Cells as processes of this machine. None outlives the process that runs the ablation."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess

import torch

from metamem.analysis.cell import run_cell
from metamem.analysis.launchers.base import Finished, Sweep, cpus, died, log_name, redirect
from metamem.analysis.plan import Cell
from metamem.analysis.results import Result
from metamem.config import UserError

# Imported once, not for every cell; torch comes to the second at the first use of what may be compiled.
PRELOADED = ["__main__", "torch._dynamo", "metamem.analysis.cell"]


@dataclass(frozen=True)
class Job:
    """A process at work on a cell."""

    cell: Cell
    process: BaseProcess
    attempt: int


@dataclass(frozen=True)
class Local:
    """Processes of this machine, each on as many threads as a cell has CPUs."""

    def run(self, cells: Iterator[Cell], sweep: Sweep) -> Generator[Finished]:
        """See `Launcher`."""
        for name in ("gpus", "memory"):
            if getattr(sweep.resources, name):
                raise (sweep.resources.where / name).error("local cells share the machine; set it with --launcher ray")
        workers = sweep.workers or max(1, int(cpus() / sweep.resources.cpus))
        context, again = _context(), list[tuple[Cell, int]]()
        running: dict[Connection, Job] = {}
        try:
            while True:
                while len(running) < workers and (chosen := again.pop() if again else _next(cells)) is not None:
                    receiver, job = _start(context, *chosen, sweep)
                    running[receiver] = job
                if not running:
                    return
                finished, stop = Finished(), None
                for receiver in wait(list(running)):  # all that are ready, whatever one says: what is finished is kept
                    assert isinstance(receiver, Connection)
                    job = running.pop(receiver)
                    result = _received(receiver, job)
                    if isinstance(result, Exception):
                        stop = result
                    elif result is not None:
                        finished.append((job.cell, replace(result, attempts=job.attempt)))
                    elif job.attempt < sweep.attempts:
                        again.append((job.cell, job.attempt + 1))
                    else:
                        finished.append((job.cell, died(job.cell, _how(job.process), job.attempt)))
                yield finished
                if stop is not None:
                    raise stop
        finally:
            for job in running.values():
                job.process.kill()


def _next(cells: Iterator[Cell]) -> tuple[Cell, int] | None:
    cell = next(cells, None)
    return None if cell is None else (cell, 1)


def _start(context: ForkServerContext | SpawnContext, cell: Cell, attempt: int, sweep: Sweep) -> tuple[Connection, Job]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, cell, sweep))
    process.start()
    sender.close()  # so that the end of the process is the end of the pipe
    return receiver, Job(cell, process, attempt)


def _work(sender: Connection, cell: Cell, sweep: Sweep) -> None:
    """The process of a cell."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    torch.set_num_threads(sweep.resources.threads)
    log = sweep.folder / log_name(cell)
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        redirect(log)
        result: Result | Exception = run_cell(cell, sweep.function, sweep.folder)
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


def _how(process: BaseProcess) -> str:
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _context() -> ForkServerContext | SpawnContext:
    """Processes that are forked from a server which has imported all of it; new ones where there is no fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
