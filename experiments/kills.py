"""`kill -9` at random moments: what was gone on with after it comes to the bits of what nothing interrupted.

Each function kills `count` processes and gives how many were killed, and how many of these lost nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from experiments.small_runs import SMALL_EPISODES, TEXT, write_inputs
from metamem import Session, load_config, load_run, load_state, train
from metamem.analysis import read_results
from metamem.analysis.results import Result
from metamem.episodes.schema import load_episodes
from metamem.episodes.training import resume_episodes, train_episodes
from metamem.state import State, flatten
from metamem.tasks import load_text
from metamem.training import resume
from metamem.training.checkpoint import load_resumable
from metamem.training.run_folder import CHECKPOINT, CONFIG, METRICS

TIMES = ("seconds", "tokens_per_second")
TRIES = 20  # at a moment that comes before a process has ended by itself


def training(count: int, folder: Path, seed: int) -> tuple[int, int]:
    """Trainings on sequences, two levels of different periods, a checkpoint after every step."""
    return _killed_runs(count, folder, seed, _train)


def episodes(count: int, folder: Path, seed: int) -> tuple[int, int]:
    """Meta-trainings over tasks."""
    return _killed_runs(count, folder, seed, _train_episodes)


def adapting(count: int, folder: Path, seed: int) -> tuple[int, int]:
    """Sessions that are saved after every piece of a stream: the file is whole or absent, and goes on exactly."""
    random, run = Random(seed), train(load_config(write_inputs(folder)), folder / "runs").folder
    seconds = _took(_adapt, run, folder / "whole")
    whole, survived = load_state(folder / "whole")[0], 0
    for number in range(count):
        path = folder / f"session-{number}"
        _kill(random, seconds, _adapt, run, path)
        _adapt(run, path)  # raises where what is there cannot be read
        survived += equal(load_state(path)[0], whole)
    return count, survived


def sweeping(count: int, folder: Path, seed: int) -> tuple[int, int]:
    """`metamem ablate`, the process and with it its cells; what was finished is not computed again."""
    random = Random(seed)
    write_inputs(folder)
    (folder / "sweep.yaml").write_text(
        "base: sequences.yaml\nset: {training.steps: 2}\ncells: {batches: {grid: {training.batch: [1, 2, 3]}}}\n"
    )
    started = time.monotonic()
    _sweep(folder, folder / "whole").wait()
    seconds, survived = time.monotonic() - started, 0
    whole = [_lasting(row) for row in read_results(folder / "whole" / "sweep")]
    for number in range(count):
        runs = folder / f"sweep-{number}"
        process = _sweep(folder, runs)
        time.sleep(random.uniform(0.3, 0.9) * seconds)
        process.kill()
        process.wait()
        code = _sweep(folder, runs).wait()
        rows = [_lasting(row) for row in read_results(runs / "sweep")]
        survived += code == 0 and len(whole) == 3 and sorted(rows, key=str) == sorted(whole, key=str)
    return count, survived


def same_run(one: Path, other: Path, python: bool = True) -> bool:
    """Whether two runs have the same weights, rows and last checkpoints, less how long they took; without `python`,
    also less Python's own random state, from which the type checks of a test draw."""
    last, other_last = load_resumable(one), load_resumable(other)
    if last is None or other_last is None or last.step != other_last.step:
        return False
    if not python:
        for found in (last, other_last):
            del found.state["random"]["python"]
    weights = equal(load_state(one / CHECKPOINT)[0], load_state(other / CHECKPOINT)[0])
    return weights and equal(last.state, other_last.state) and _rows(one) == _rows(other)


def equal(one: State, other: State) -> bool:
    """Whether two states are equal, bit for bit."""
    left, right = flatten(one), flatten(other)
    return left.keys() == right.keys() and all(
        (a is None and b is None) or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in ((left[key], right[key]) for key in left)
    )


def _killed_runs(count: int, folder: Path, seed: int, work: Callable[[Path, Path], None]) -> tuple[int, int]:
    random, config = Random(seed), write_inputs(folder)
    seconds, survived = _took(work, config, folder / "whole"), 0
    for number in range(count):
        root = folder / f"run-{number}"
        _kill(random, seconds, work, config, root)
        process = _process(work, config, root)  # with no other's random draws between its own
        process.join()
        assert process.exitcode == 0
        (run,), (whole,) = root.iterdir(), (folder / "whole").iterdir()
        survived += same_run(run, whole)
    return count, survived


def _train(config: Path, root: Path) -> None:
    if (run := root / "sequences").is_dir() and (run / CONFIG).is_file():
        resume(run)
        return
    shutil.rmtree(root, ignore_errors=True)  # a kill before the run had a config left nothing to go on with
    train(load_config(config), root)


def _train_episodes(config: Path, root: Path) -> None:
    if (run := root / "maml").is_dir() and (run / CONFIG).is_file():
        resume_episodes(run)
        return
    shutil.rmtree(root, ignore_errors=True)
    train_episodes(load_episodes(SMALL_EPISODES[0], SMALL_EPISODES[1:]), root)


def _adapt(run: Path, path: Path) -> None:
    session, stream = Session(*load_run(run)), load_text(run.parent.parent / TEXT).long()
    if path.exists():
        session.load(path)
    for start in range(session.position, len(stream), 64):
        session.observe(stream[None, start : start + 64])
        session.save(path)


def _kill(random: Random, seconds: float, work: Callable[..., None], *arguments: Any) -> None:
    """Starts the work in a process of its own and kills it at a random moment of the time that it takes."""
    for _ in range(TRIES):
        process = _process(work, *arguments)
        process.join(random.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return
        assert process.exitcode == 0, f"it ended by itself, with {process.exitcode}"
        made = arguments[-1]
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    raise RuntimeError(f"no process could be killed within {seconds:.2g} s")


def _took(work: Callable[..., None], *arguments: Any) -> float:
    """Does the work in a process of its own, and gives its seconds."""
    _process(_nothing).join()  # the server from which they fork is up
    started = time.monotonic()
    process = _process(work, *arguments)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


def _nothing() -> None:
    pass


def _process(work: Callable[..., None], *arguments: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_alone, args=(work, *arguments))
    try:
        process.start()
    except EOFError:  # the server was ended: the next start makes another
        process = context.Process(target=_alone, args=(work, *arguments))
        process.start()
    return process


def _alone(work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    work(*arguments)


def _sweep(folder: Path, runs: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "metamem.cli", "ablate", "sweep.yaml", "--workers", "1", "--resume"]
    return subprocess.Popen(
        [*command, "--runs", str(runs)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _lasting(row: Result) -> dict[str, Any]:
    cost = {key: value for key, value in row.cost.items() if not key.endswith(("seconds", "resident_bytes"))}
    return asdict(replace(row, cost=cost, attempts=1))


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows if row["kind"] != "resume"]
