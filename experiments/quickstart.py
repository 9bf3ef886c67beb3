"""The quickstart: a memory that learns English as it reads it, from 2000 back to 1382.

Meta-trains a byte-level language model with a fast-weight memory on modern English (the World English Bible, 2000),
and a model of equal size without a memory; then streams books that neither has seen, in the English of Tyndale (1526),
of Wycliffe (1382), and, as the control, in modern English. Bits per byte:

    writes off    the memory is read and never written
    reset         the memory starts anew at every window of the training length: the model as trained
    carried       the memory goes on along the stream
    adapting      carried, and the inner level of the config moves the parameters that it names by the next-byte loss
    no memory     the model without a memory, frozen
    + SGD         the same under dynamic evaluation: plain SGD on all its weights along the stream
    + Adam        the same with the optimizer, period and rate of our inner level

The rate of `+ SGD` is the best of a grid on the validation book, in modern English and in that of 1587. Nothing is
tuned on the streamed books.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from metamem import Session, build_task, load_config, load_run, train
from metamem.analysis import Claim, Study, open_study, stream_figure
from metamem.tasks.english import TRANSLATIONS

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
OURS, BASELINE = "quickstart", "quickstart_memoryless"
SGD, ADAM = "no memory + SGD", "no memory + Adam"
SGD_RATES = (0.03, 0.06, 0.1, 0.2)
SMOKE = ("training.steps=4", "training.batch=2", "training.length=128", "vars.dim=32", "vars.blocks=1")


@dataclass(frozen=True)
class Method:
    """A row of the table: which model, what of it learns, and overrides of its inner level."""

    name: str
    model: str
    inner: bool = False
    writing: bool = True
    reset: bool = False
    overrides: tuple[str, ...] = ()


METHODS = (
    Method("writes off", OURS, writing=False),
    Method("reset", OURS, reset=True),
    Method("carried", OURS),
    Method("adapting", OURS, inner=True),
    Method("no memory", BASELINE),
    Method(SGD, BASELINE, inner=True),
    Method(ADAM, BASELINE, inner=True),
)


@dataclass(frozen=True)
class Streamed:
    """One stream read by one method: bits of every byte, seconds, bytes of state."""

    bits: np.ndarray
    seconds: float
    state_bytes: int


def run_training(name: str, seed: int, overrides: Sequence[str], root: Path, queue: Any) -> Path:
    """Meta-trains one model in its own process, one thread; gives its run folder."""
    torch.set_num_threads(1)
    config = load_config(CONFIGS / f"{name}.yaml", [*overrides, f"seed={seed}", f"name={name}-seed{seed}"])
    return train(config, root, progress=lambda _: queue.put(1)).folder


def stream(method: Method, run: Path, text: torch.Tensor) -> Streamed:
    """Streams a text through a trained model in its own process, one thread."""
    torch.set_num_threads(1)
    model, _ = load_run(run)
    config = load_config(run / "config.yaml", method.overrides)
    length = config.training.length
    session = Session(
        model, config, inner=method.inner, writing=method.writing, reset_every=length if method.reset else None
    )
    started = time.perf_counter()
    losses = [session.observe(text[None, at : at + length].long()).losses for at in range(0, len(text), length)]
    seconds = time.perf_counter() - started
    return Streamed(torch.cat(losses, 1)[0].numpy() / math.log(2), seconds, session.state_bytes)


def in_parallel(
    pool: ProcessPoolExecutor, bar: Progress, what: str, jobs: dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]]
) -> dict[Any, Any]:
    """Runs the jobs on the pool, with a bar; results by key."""
    task = bar.add_task(what, total=len(jobs))
    futures = {pool.submit(function, *arguments): key for key, (function, arguments) in jobs.items()}
    results = {}
    for future in as_completed(futures):
        results[futures[future]] = future.result()
        bar.advance(task)
    return results


def train_all(study: Study, pool: ProcessPoolExecutor, bar: Progress, overrides: Sequence[str], queue: Any) -> Any:
    """The run folders of both models for every seed."""
    steps = load_config(CONFIGS / f"{OURS}.yaml", overrides).training.steps
    futures = {
        (name, seed): pool.submit(run_training, name, seed, overrides, study.folder, queue)
        for seed in study.seeds
        for name in (OURS, BASELINE)
    }
    task = bar.add_task(f"meta-training {len(futures)} models, steps", total=steps * len(futures))
    while not all(future.done() for future in futures.values()):
        try:
            queue.get(timeout=0.2)
            bar.advance(task)
        except Empty:  # look at the futures again
            continue
    bar.update(task, completed=steps * len(futures))
    return {key: future.result() for key, future in futures.items()}


def choose_rates(
    study: Study, pool: ProcessPoolExecutor, bar: Progress, runs: Any, texts: list[torch.Tensor], rates: Sequence[float]
) -> dict[int, float]:
    """Per seed the SGD rate with the fewest bits per byte over the validation texts."""
    jobs = {}
    for seed in study.seeds:
        for rate in rates:
            method = with_rate(rate)
            for index, text in enumerate(texts):
                jobs[seed, rate, index] = (stream, (method, runs[BASELINE, seed], text))
    results = in_parallel(pool, bar, "choosing the baseline's rate", jobs)

    def score(seed: int, rate: float) -> float:
        total = sum(float(results[seed, rate, index].bits.mean()) for index in range(len(texts)))
        return total if math.isfinite(total) else math.inf

    return {seed: min(rates, key=lambda rate, seed=seed: score(seed, rate)) for seed in study.seeds}


def with_rate(rate: float) -> Method:
    """The baseline under plain SGD at a rate."""
    return Method(SGD, BASELINE, inner=True, overrides=(f"hierarchy.levels.stream.optimizer.lr={rate}",))


def with_our_level() -> Method:
    """The baseline under the optimizer of our own inner level."""
    level = next(level for level in load_config(CONFIGS / f"{OURS}.yaml").hierarchy.levels if level.clock == "inner")
    assert level.optimizer is not None
    optimizer = f"{{name: {level.optimizer.name}, lr: {level.optimizer.lr}, betas: {list(level.optimizer.betas)}}}"
    overrides = (f"hierarchy.levels.stream.optimizer={optimizer}", f"hierarchy.levels.stream.period={level.period}")
    return Method(ADAM, BASELINE, inner=True, overrides=overrides)


def report(study: Study, streams: Sequence[str], results: dict[tuple[str, str, int], Streamed]) -> list[Claim]:
    """Prints the table, draws the figure, and gives what must hold."""

    def bits(method: str, name: str) -> np.ndarray:
        return np.array([results[method, name, seed].bits.mean() for seed in study.seeds])

    rows = []
    for method in METHODS:
        cells = []
        for name in streams:
            mine, reset = bits(method.name, name), bits("reset", name)
            spread = f" ± {mine.std(ddof=1):.3f}" if len(mine) > 1 else ""
            cells.append(f"{mine.mean():.3f}{spread}")
            ratio = float((mine / reset).mean())
            study.add(f"{method.name}, {name}", float(mine.mean()), "bits/byte", "reset", ratio)
        of = [results[method.name, name, seed] for name in streams for seed in study.seeds]
        seconds = sum(one.seconds for one in of) / len(of)
        rows.append([method.name, *cells, f"{seconds:.1f}", f"{of[0].state_bytes:,}"])
        study.add(f"{method.name}, seconds a stream", seconds, "s")
        study.add(f"{method.name}, state", of[0].state_bytes, "bytes")
    study.table("Bits per byte on books never seen", ["", *streams, "s / stream", "state, bytes"], rows)

    curves = {
        f"{name}: {TRANSLATIONS[name]}": {
            method.name: np.stack([results[method.name, name, seed].bits for seed in study.seeds]) for method in METHODS
        }
        for name in streams
    }
    stream_figure(curves, study.folder / "stream.png", "A model of modern English reads older English")
    claims = []
    for name in streams[:-1]:
        adapting, reset, sgd = (bits(method, name) for method in ("adapting", "reset", SGD))
        claims.append(Claim(f"{name}: adapting below reset by", float(1 - (adapting / reset).mean()), 0.10))
        claims.append(Claim(f"{name}: adapting below no memory + SGD by", float(1 - (adapting / sgd).mean()), 0.0))
    return claims


def options(parser: argparse.ArgumentParser) -> None:
    """The quickstart's own options."""
    parser.add_argument("--stream-bytes", type=int, default=65_536, help="how much of each stream is read")


def main() -> int:
    """Trains, streams, reports; the exit code is the verdict's."""
    study = open_study("quickstart", "Meta-train on modern English, stream older English.", options=options)
    overrides = list(SMOKE) if study.smoke else []
    length = 1024 if study.smoke else study.options.stream_bytes
    rates = SGD_RATES[:2] if study.smoke else SGD_RATES
    task = build_task(load_config(CONFIGS / f"{OURS}.yaml"))
    print(task.describe())
    texts = {name: text[:length] for name, text in task.streams().items()}
    validation = [task.validation_bytes(name)[: length // 4] for name in (None, "gb")]

    context = multiprocessing.get_context("forkserver")  # which imports torch once for all of them
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(min(2, context.cpu_count()), mp_context=context) as pool,
        Progress(*columns, console=Console(stderr=True)) as bar,
    ):
        runs = train_all(study, pool, bar, overrides, manager.Queue())
        chosen = choose_rates(study, pool, bar, runs, validation, rates)
        jobs = {}
        for method in METHODS:
            for seed in study.seeds:
                if method.name == SGD:
                    method = with_rate(chosen[seed])
                elif method.name == ADAM:
                    method = with_our_level()
                for name, text in texts.items():
                    jobs[method.name, name, seed] = (stream, (method, runs[method.model, seed], text))
        results = in_parallel(pool, bar, "streaming", jobs)
    print(f"the baseline's SGD rate, per seed: {', '.join(str(rate) for rate in chosen.values())}")
    return study.verdict(report(study, list(texts), results))


if __name__ == "__main__":
    sys.exit(main())
