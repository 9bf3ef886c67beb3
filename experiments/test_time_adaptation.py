"""Does learning on at inference pay? Real shifts, a stream that returns home, and one that never leaves.

A model of modern English with a fast-weight memory, the quickstart's, and an attention of equal size whose window holds
as many bytes as the adapting session's whole state (`full attention`); streams of books that neither was trained on:

    kjv, tyn, wyc    modern English, then that of 1611, 1526, 1382
    python           modern English, then source of Python's standard library
    home             modern English, then that of 1382, then modern English again
    stayed           modern English and no other: what `home` would be without its journey

    frozen               the model as trained; its memory is written
    adapting             the last MLP, the last norm and the head, guarded (`configs/quickstart_light.yaml`)
    adapting, all        every weight, guarded
    dynamic evaluation   every weight by plain SGD, no guards; the rate is the best of a grid on a validation book

Bits per byte after the shift; bytes until half of the gain over frozen is there; and, at home again, forgetting: bits
per byte over the first bytes above those of the same method in the stream that stayed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quickstart import in_parallel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from metamem import Session, UserError, build, build_task, load_config, load_run, train
from metamem.analysis import Claim, Study, open_study, stream_figure
from metamem.tasks.sources import load_source

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LIGHT, ATTENTION = "quickstart_light", "quickstart_memoryless"
RATES = (0.01, 0.03, 0.06, 0.1)
SMOKE = ("training.steps=3", "training.batch=1", "vars.dim=32")
ALL = "hierarchy.levels.stream.groups=[all]"
UNGUARDED = ("adaptation.guards=null", "adaptation.fallback=null")
WINDOW = 2048  # of the running mean by which half of the gain is found
PAYS = 0.005  # bits per byte


@dataclass(frozen=True)
class Method:
    """Which model, what of it learns, by which overrides."""

    model: str = LIGHT
    inner: bool = True
    overrides: tuple[str, ...] = ()


METHODS = {
    "frozen": Method(inner=False),
    "adapting": Method(),
    "adapting, all": Method(overrides=(ALL,)),
    "dynamic evaluation": Method(overrides=(ALL, *UNGUARDED)),
    "full attention": Method(ATTENTION, inner=False),
}


@dataclass(frozen=True)
class Stream:
    """A text of several parts, and where the last begins (of `home`: where it comes home)."""

    text: Tensor
    shift: int
    end: int


@dataclass(frozen=True)
class Streamed:
    """Bits of every byte, updates refused, bytes of state."""

    bits: np.ndarray
    refused: int
    state_bytes: int


def streams(length: int) -> dict[str, Stream]:
    """The streams, of parts of `length` bytes, after half as much of modern English."""
    texts = build_task(load_config(CONFIGS / f"{LIGHT}.yaml", ["task.stream=[kjv, tyn, wyc]"])).streams()
    texts["python"] = load_source("python").held_out
    english, half = texts.pop("web"), length // 2
    found = {name: _joined([english[:half], text[:length]]) for name, text in texts.items()}
    home = english[: half + length]
    found["home"] = _joined([home[:half], texts["wyc"][:length], home[half:]])
    found["stayed"] = _joined([home[:half], home[half:]])
    return found


def _joined(parts: list[Tensor]) -> Stream:
    return Stream(torch.cat(parts), len(parts[0]), sum(map(len, parts)))


def run_training(name: str, seed: int, overrides: tuple[str, ...], root: Path) -> Path:
    """Meta-trains one model in its own process, one thread; gives its run folder."""
    torch.set_num_threads(1)
    return train(
        load_config(CONFIGS / f"{name}.yaml", [*overrides, f"seed={seed}", f"name={name}-{seed}"]), root
    ).folder


def read(method: Method, run: Path, text: Tensor) -> Streamed:
    """Streams a text through a trained model in its own process, one thread."""
    torch.set_num_threads(1)
    model, _ = load_run(run)
    session = Session(model, load_config(run / "config.yaml", method.overrides), inner=method.inner)
    bits = np.full(len(text), np.inf)
    try:
        for at in range(0, len(text), 128):
            bits[at : at + 128] = session.observe(text[None, at : at + 128].long()).losses[0] / math.log(2)
    except UserError:  # without guards it diverged: from there on nothing is predicted
        pass
    return Streamed(bits, sum(session.refused.values()), session.state_bytes)


def with_rate(rate: float) -> Method:
    """Dynamic evaluation at a rate."""
    own = METHODS["dynamic evaluation"]
    optimizer = f"hierarchy.levels.stream.optimizer={{name: sgd, lr: {rate}}}"
    return Method(overrides=(*own.overrides, optimizer))


def equal_window(overrides: tuple[str, ...]) -> int:
    """The window of the attention whose cache is as large as the adapting session's state."""
    config = load_config(CONFIGS / f"{LIGHT}.yaml", overrides)
    state = Session(build(config), config).state_bytes
    return max(2, state // (int(config.vars["blocks"]) * 2 * int(config.vars["dim"]) * 4))


def half_of_gain(gain: np.ndarray) -> int | None:
    """Bytes until the running mean of the gain first reaches half of what it is in the last quarter; None where that is
    no gain."""
    window = min(WINDOW, len(gain) // 4)
    last = gain[-len(gain) // 4 :].mean()
    if last < PAYS:
        return None
    total = np.cumsum(np.concatenate([[0.0], gain]))
    running = (total[window:] - total[:-window]) / window
    return int(np.argmax(running >= last / 2)) + window // 2


Results = dict[tuple[str, str, int], Streamed]  # method, stream, seed


def report(study: Study, found: dict[str, Stream], results: Results) -> list[Claim]:
    """Prints the tables, draws the figure, says where adapting does not pay, and gives what must hold."""

    def after(method: str, name: str) -> np.ndarray:
        """Bits after the shift, [seeds, bytes]; of `home`, before it returns."""
        stream = found[name]
        end = stream.end - (stream.end - stream.shift) // 2 if name == "home" else stream.end
        return np.stack([results[method, name, seed].bits[stream.shift : end] for seed in study.seeds])

    rows, halves, claims, unpaid = [], [], [], []
    names = [name for name in found if name != "home"]
    for method in METHODS:
        own = results[method, "stayed", 0]
        cells = []
        for name in names:
            mine, frozen = after(method, name), after("frozen", name)
            gain = float(frozen.mean() - mine.mean())
            cells.append(f"{mine.mean():.3f}")
            ratio = float(mine.mean() / frozen.mean())
            study.add(f"{method}, {name}", float(mine.mean()), "bits/byte", "frozen", ratio)
            if method != "frozen" and gain < PAYS:
                unpaid.append(f"{method} on {name} ({gain:+.3f})")
        refused = sum(results[method, name, seed].refused for name in found for seed in study.seeds)
        rows.append([method, *cells, str(refused), f"{own.state_bytes:,}"])
        if method != "frozen":
            times = [half_of_gain((after("frozen", name) - after(method, name)).mean(0)) for name in names]
            until = ("–" if time is None else f"{time:,}" for time in times)
            halves.append([method, *until, _forgetting(study, found, results, method)])
    study.table("Bits per byte after the shift", ["", *names, "refused", "state, bytes"], rows)
    title = "Bytes until half of the gain; forgetting, bits per byte at home again"
    study.table(title, ["", *names, "forgetting"], halves)
    print(f"where learning on gains less than {PAYS} bits per byte: {'; '.join(unpaid) or 'nowhere'}")
    shown = ("kjv", "tyn", "wyc", "python", "home")
    curves = {
        name: {m: np.stack([results[m, name, seed].bits for seed in study.seeds]) for m in METHODS} for name in shown
    }
    stream_figure(curves, study.folder / "streams.png", "A model of modern English meets other text", window=4096)
    for name in ("kjv", "tyn", "wyc", "python"):
        ratio = float((after("adapting", name).mean(1) / after("frozen", name).mean(1)).mean())
        claims.append(Claim(f"{name}: adapting over frozen", ratio, 1.0, at_most=True))
    return claims


def _forgetting(study: Study, found: dict[str, Stream], results: Results, method: str) -> str:
    """Bits per byte over the first bytes at home again, above those of the same method where it stayed."""
    stayed, home = found["stayed"], found["home"]
    length = (stayed.end - stayed.shift) // 4
    at = home.end - (stayed.end - stayed.shift)
    costs = [
        results[method, "home", seed].bits[at : at + length].mean()
        - results[method, "stayed", seed].bits[stayed.shift : stayed.shift + length].mean()
        for seed in study.seeds
    ]
    study.add(f"{method}, forgetting", float(np.mean(costs)), "bits/byte")
    return f"{np.mean(costs):+.3f}"


def options(parser: argparse.ArgumentParser) -> None:
    """The study's own options."""
    parser.add_argument("--steps", type=int, default=500, help="outer steps of each training")
    parser.add_argument("--part-bytes", type=int, default=49_152, help="how long a part of a stream is")


def main() -> int:
    """Trains, chooses the rate, streams, reports."""
    study = open_study("test_time_adaptation", "Real shifts, met by learning on.", options=options)
    overrides = SMOKE if study.smoke else (f"training.steps={study.options.steps}",)
    found = streams(512 if study.smoke else study.options.part_bytes)
    window = equal_window(overrides)
    attention = (*overrides, f"vars.window={window}", "training.batch=1", "training.length=1024")
    if study.smoke:
        attention = (*overrides, f"vars.window={window}", "training.length=64")
        overrides = (*overrides, "training.length=64")
    print(f"an attention with as many bytes of state has a window of {window:,} bytes")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(2, context.cpu_count()), mp_context=context) as pool,
        Progress(*columns, console=Console(stderr=True)) as bar,
    ):
        trainings: dict[Any, Any] = {}
        for seed in study.seeds:
            for name, own in ((LIGHT, overrides), (ATTENTION, attention)):
                trainings[name, seed] = (run_training, (name, seed, own, study.folder))
        runs = in_parallel(pool, bar, "meta-training", trainings)
        task = build_task(load_config(CONFIGS / f"{LIGHT}.yaml"))
        validation = torch.cat([task.validation_bytes(name)[: len(found["stayed"].text) // 4] for name in (None, "gb")])
        rates = RATES[:2] if study.smoke else RATES
        tried = {
            (rate, seed): (read, (with_rate(rate), runs[LIGHT, seed], validation))
            for rate in rates
            for seed in study.seeds
        }
        scores = in_parallel(pool, bar, "the rate of dynamic evaluation", tried)

        def score(rate: float, seed: int) -> float:
            return float(np.nan_to_num(scores[rate, seed].bits.mean(), nan=math.inf))

        chosen = {seed: min(rates, key=lambda rate, seed=seed: score(rate, seed)) for seed in study.seeds}
        jobs = {}
        for name, stream in found.items():
            for method, settings in METHODS.items():
                for seed in study.seeds:
                    own = with_rate(chosen[seed]) if method == "dynamic evaluation" else settings
                    jobs[method, name, seed] = (read, (own, runs[settings.model, seed], stream.text))
        results = in_parallel(pool, bar, "streaming", jobs)
    print(f"the rate of dynamic evaluation, per seed: {', '.join(map(str, chosen.values()))}")
    return study.verdict(report(study, found, results))


if __name__ == "__main__":
    sys.exit(main())
