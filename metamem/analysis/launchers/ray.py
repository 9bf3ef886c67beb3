"""Cells as tasks of a Ray cluster, each in a worker process of its own that ends with it.

A cluster's machines may share no folder: a cell runs in a temporary one, and what it leaves there (its run folder, its
log) comes back through Ray with its row.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from metamem.analysis.cell import run_cell
from metamem.analysis.launchers.base import Finished, Sweep, cpus, died, log_name, redirect
from metamem.analysis.plan import Cell
from metamem.analysis.results import DiskFull, Result, is_full
from metamem.config import UserError
from metamem.config.ablation import ResourcesConfig

# Read by Ray as it is imported: it reports its use to its makers, and hides GPUs from tasks in a way it warns about.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass(frozen=True)
class Job:
    """A task at work on a cell."""

    cell: Cell
    attempt: int


@dataclass(frozen=True)
class Ray:
    """A Ray cluster: the one at `address`, or one of this machine that ends with the ablation."""

    address: str | None = None

    def run(self, cells: Iterator[Cell], sweep: Sweep) -> Generator[Finished]:
        """See `Launcher`."""
        ray = import_ray()
        with _cluster(ray, self.address, sweep):
            _check_room(ray, sweep.resources)
            submit = _submitter(ray, sweep)
            again = list[Job]()
            running: dict[Any, Job] = {}
            try:
                while True:
                    while len(running) < _room(ray, sweep) and (job := again.pop() if again else _next(cells)):
                        running[submit(job.cell)] = job
                    if not running:
                        return
                    ray.wait(list(running), num_returns=1)
                    ready, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
                    finished, stop = Finished(), None
                    for reference in ready:  # all of them, whatever one says: what is finished is kept
                        job = running.pop(reference)
                        result = _received(ray, reference, job, sweep)
                        if isinstance(result, Exception):
                            stop = result
                        elif isinstance(result, Result):
                            finished.append((job.cell, replace(result, attempts=job.attempt)))
                        elif job.attempt < sweep.attempts:
                            again.append(Job(job.cell, job.attempt + 1))
                        else:
                            finished.append((job.cell, died(job.cell, result, job.attempt)))
                    yield finished
                    if stop is not None:
                        raise stop
            finally:
                for reference in running:
                    ray.cancel(reference, force=True)


def import_ray() -> Any:
    """Ray, quiet; or a UserError that names the extra."""
    os.environ.update(SETTINGS)
    try:
        import ray
    except ImportError:
        raise UserError("the launcher 'ray' needs Ray: pip install 'metamem-torch[ray]'") from None
    return ray


@contextmanager
def _cluster(ray: Any, address: str | None, sweep: Sweep) -> Iterator[None]:
    """Joined, or begun; one that this process has joined already is used, and stays."""
    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"address": address or "local"}
    if address is not None:
        _check_address(address)
    else:
        wanted = (sweep.workers or 0) * sweep.resources.cpus
        settings |= {"include_dashboard": False, "num_cpus": max(cpus(), int(-(-wanted // 1)))}
    try:
        ray.init(**settings, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"{address or 'a cluster of this machine'}: no Ray cluster: {error}") from None
    try:
        with redirect_stdout(sys.stderr):  # where Ray tells of workers that died, whatever its settings
            yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raises UserError where nothing answers: Ray would try again for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=30).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"{address}: no Ray cluster: {error}") from None


def _submitter(ray: Any, sweep: Sweep) -> Callable[[Cell], Any]:
    """What gives a cell to the cluster, and a reference to what comes of it."""
    needs = sweep.resources
    # Retried by us, who count the tries. `max_calls`: a process a cell, as everywhere.
    options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "max_retries": 0, "max_calls": 1}
    task = ray.remote(**options, **({"memory": needs.memory} if needs.memory else {}))(_work)
    paths = [str(Path(path).absolute()) for path in sys.path]
    return lambda cell: task.options(name=cell.slug).remote(cell, sweep.function, needs.threads, os.getcwd(), paths)


def _next(cells: Iterator[Cell]) -> Job | None:
    cell = next(cells, None)
    return None if cell is None else Job(cell, 1)


def _needs(resources: ResourcesConfig) -> dict[str, float]:
    """Ray's name of each resource -> how much of it a cell takes."""
    named = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory or 0}
    return {name: amount for name, amount in named.items() if amount}


def _machines(ray: Any) -> list[dict[str, float]]:
    """What each machine that is now in the cluster has of every resource."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _check_room(ray: Any, resources: ResourcesConfig) -> None:
    """Raises ConfigError where no machine of the cluster has room for a cell: Ray would wait for ever."""
    nodes, needs = _machines(ray), _needs(resources)
    if not any(all(node.get(name, 0) >= amount for name, amount in needs.items()) for node in nodes):
        wanted = ", ".join(f"{name} {amount:g}" for name, amount in needs.items())
        there = "; ".join(", ".join(f"{name} {node.get(name, 0):g}" for name in needs) for node in nodes)
        raise resources.where.error(f"no machine of the cluster has {wanted} (it has {there or 'none'})")


def _room(ray: Any, sweep: Sweep) -> int:
    """Cells at once: as many as asked for, or as the cluster that it is now has room for."""
    if sweep.workers:
        return sweep.workers
    nodes, needs = _machines(ray), _needs(sweep.resources)
    return max(1, sum(min(int(node.get(name, 0) / amount) for name, amount in needs.items()) for node in nodes))


def _received(ray: Any, reference: Any, job: Job, sweep: Sweep) -> Result | Exception | str:
    """The row of a cell, its files written; an exception where no other cell would do better; how its process died."""
    try:
        result, files = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # raised in the cell's process, which has ended by it
        return f"{type(error.cause).__name__}: {error.cause}"
    except ray.exceptions.RayError as error:
        return type(error).__name__
    try:
        _write(files, sweep.folder, job.cell)
    except OSError as error:
        if not is_full(error):
            return UserError(f"{sweep.folder}: cannot be written: {error.strerror}")
        return DiskFull(f"{sweep.folder}: cannot be written: the disk is full")
    return result


def _write(files: Mapping[str, bytes], folder: Path, cell: Cell) -> None:
    """What a cell left, in place of what an earlier try did."""
    shutil.rmtree(folder / cell.slug, ignore_errors=True)
    (folder / log_name(cell)).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _work(
    cell: Cell, function: str | None, threads: int, folder: str, paths: list[str]
) -> tuple[Result | Exception, dict[str, bytes]]:
    """The task of a cell: its row, or an exception where no other cell would do better, and the files that it left."""
    if os.path.isdir(folder):
        os.chdir(folder)  # relative paths in a config are those of the ablation's
    sys.path += [path for path in paths if path not in sys.path]
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="metamem-") as made:
        root, log = Path(made), Path(made) / log_name(cell)
        try:
            redirect(log)
            result: Result | Exception = run_cell(cell, function, root)
            if log.stat().st_size == 0:
                log.unlink()
            files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        except (OSError, UserError) as error:
            return error, {}
    return result, files
