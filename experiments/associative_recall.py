"""Associative recall: how many pairs does each memory remember, at which width?

Multi-query associative recall (Zoology, Arora et al. 2023) with every memory of configs/memory in turn, causal
attention and an LSTM among them, in one network of two blocks (configs/experiment/associative_recall.yaml): a cell is a
memory, a width (of the model and of its one head's keys) and a seed, trained on sequences of 4 to 16 pairs in a process
of its own. Accuracy is on sequences never trained on, for each number of pairs, and for twice as many as were trained.

All cells train alike, on as many sequences. Each memory has the better of two rates (`rates`) at the smallest width and
the first seed, on validation sequences which are not those of the table; a memory in a controller's loop (`LOOPED`), of
minutes a cell, has the shipped one. A memory that learns late is told by its number here, not excused.
A cell that is done is a line of cells.jsonl; `--resume FOLDER` takes the lines of an earlier run over.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from metamem import UserError, build_task, load_config, train
from metamem.analysis import Claim, Study, accuracy_figure, open_study
from metamem.state import state_bytes
from metamem.tasks import AssociativeRecall

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WIDTHS = (16, 32)
RATES = (1e-2, 3e-3)  # of the outer optimizer
DEEP = (
    "atlas",
    "cms",
    "lact",
    "titans",
    "ttt_mlp",
)  # of several layers: their inner loops diverge at 1e-2
DEEP_RATES = (3e-3, 1e-3)
LOOPED = ("mnm_g", "mnm_p")
SHIPPED_RATE = 4e-3
ELSEWHERE = ("dnc", "ntm", "sam", "sdnc", "episodic", "key_value", "window")  # slots: with a controller, on their tasks
WITHOUT = ("attention", "lstm")  # no fast weights: what memories are measured against
EXACT = ("delta_net", "gated_delta_net", "momentum_delta")  # each token's error at its own weights
# A sequence has 64 tokens: a memory that is read before its chunk is written needs shorter ones than it ships with.
OVERRIDES = {"lact": ("vars.chunk=16",)}
SMOKE = ("training.steps=2", "training.batch=2", "task.examples=8")


@dataclass(frozen=True)
class Cell:
    """One model to train: which memory, how wide, which seed and rate, what else differs from the shipped config."""

    memory: str
    width: int
    seed: int
    rate: float
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its run's name."""
        return f"{self.memory}-{self.width}-rate{self.rate:.3f}-seed{self.seed}"


@dataclass(frozen=True)
class Result:
    """What a cell gave: accuracy per number of pairs, those beyond training last, and its mean over the numbers trained
    on other sequences, by which a rate is chosen; `failed` says why there is none."""

    cell: Cell
    accuracy: dict[int, float]
    validation: float = 0.0
    parameters: int = 0
    state_bytes: int = 0
    tokens_per_second: float = math.nan
    seconds: float = 0.0
    failed: str = ""


def config_file(cell: Cell, folder: Path) -> Path:
    """The config of a cell: a memory swapped in by one line."""
    path = folder / "configs" / f"{cell.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [CONFIGS / "memory" / f"{cell.memory}.yaml", CONFIGS / "experiment" / "associative_recall.yaml"]
    lines = "".join(f"  - {os.path.relpath(file, path.parent)}\n" for file in files)
    path.write_text(
        f"extends:\n{lines}vars: {{dim: {cell.width}}}\nseed: {cell.seed}\n"
        f"hierarchy: {{levels: {{task: {{optimizer: {{lr: {cell.rate:.3e}}}}}}}}}\n"
    )
    return path


def run_cell(cell: Cell, folder: Path) -> Result:
    """Trains and evaluates a cell, in its own process, on one thread."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    config = load_config(config_file(cell, folder), cell.overrides)
    task: AssociativeRecall = build_task(config)
    try:
        trained = train(config, folder, task=task)
    except UserError as error:
        return Result(cell, {}, failed=str(error), seconds=time.perf_counter() - started)
    model = trained.model.eval()
    length, most = config.training.length, max(task.pairs)
    sizes = {"vocabulary": task.vocabulary, "examples": task.examples}
    beyond, other = AssociativeRecall(pairs=2 * most, **sizes), AssociativeRecall(pairs=task.pairs, seed=1, **sizes)

    def predict(inputs: Tensor, targets: Tensor) -> Tensor:
        return model(inputs).y

    with torch.no_grad():
        found = task.evaluate(predict, length) | beyond.evaluate(predict, 2 * length)
        validation = float(np.mean(list(other.evaluate(predict, length).values())))
        state = model(beyond.evaluation(2 * most, 2 * length)[0][:1]).state
    accuracy = {int(name.rpartition("-")[2]): value for name, value in found.items()}
    tokens = config.training.steps * config.training.batch * length
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - started
    return Result(cell, accuracy, validation, parameters, state_bytes(state), tokens / trained.seconds, seconds)


def read_cells(path: Path) -> list[Result]:
    """The cells that are done, from their JSON lines; a line cut short by the end of a run is left out."""
    results = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        cell = Cell(**{**row["cell"], "overrides": tuple(row["cell"]["overrides"])})
        accuracy = {int(pairs): value for pairs, value in row["accuracy"].items()}
        results.append(Result(**{**row, "cell": cell, "accuracy": accuracy}))
    return results


def run_all(study: Study, cells: Sequence[Cell], label: str) -> dict[Cell, Result]:
    """The results of all cells: those of a run that this one resumes, and the others, each written when it is done."""
    earlier: Path | None = study.options.resume
    found = {result.cell: result for result in (read_cells(earlier / "cells.jsonl") if earlier else [])}
    done = {cell: found[cell] for cell in cells if cell in found}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        (study.folder / "cells.jsonl").open("a", buffering=1) as file,
        ProcessPoolExecutor(study.options.workers, mp_context=multiprocessing.get_context("spawn")) as pool,
        Progress(*columns, console=Console(stderr=True)) as bar,
    ):
        file.writelines(json.dumps(asdict(result)) + "\n" for result in done.values())
        task = bar.add_task(label, total=len(cells), completed=len(done))
        futures = [pool.submit(run_cell, cell, study.folder) for cell in cells if cell not in done]
        for future in as_completed(futures):
            result = future.result()
            file.write(json.dumps(asdict(result)) + "\n")
            done[result.cell] = result
            bar.advance(task)
    return {cell: done[cell] for cell in cells}


def best_rates(tried: Sequence[Result]) -> dict[str, float]:
    """Memory -> its rate of the best validation; of equal ones the first tried."""
    best: dict[str, Result] = {}
    for result in tried:
        if (name := result.cell.memory) not in best or result.validation > best[name].validation:
            best[name] = result
    return {name: result.cell.rate for name, result in best.items()}


def rates(memory: str) -> tuple[float, ...]:
    """The rates that are tried for a memory."""
    if memory in LOOPED:
        return (SHIPPED_RATE,)
    return DEEP_RATES if memory in DEEP else RATES


def report_rates(study: Study, tried: Sequence[Result], chosen: dict[str, float]) -> None:
    """Prints what each rate gave on the validation sequences."""
    rows, every = [], sorted({result.cell.rate for result in tried}, reverse=True)
    for memory, best in chosen.items():
        own = {result.cell.rate: result for result in tried if result.cell.memory == memory}
        cells = []
        for rate in every:
            shown = "" if rate not in own else "diverged" if own[rate].failed else f"{own[rate].validation:.3f}"
            if rate in own and not own[rate].failed:
                study.add(f"{memory}, rate {rate:g}, validation", own[rate].validation, "accuracy")
            cells.append(shown)
        rows.append([memory, *cells, f"{best:g}"])
    study.table("Rates, on validation sequences", ["", *(f"{rate:g}" for rate in every), "chosen"], rows)


def report(study: Study, results: dict[Cell, Result], memories: Sequence[str], widths: Sequence[int]) -> list[Claim]:
    """Prints the table, draws the figure, and gives what is claimed."""
    numbers = sorted({pairs for result in results.values() for pairs in result.accuracy})

    def accuracy(memory: str, width: int, pairs: int) -> np.ndarray:
        own = [results[cell] for cell in results if (cell.memory, cell.width) == (memory, width)]
        return np.array([result.accuracy.get(pairs, math.nan) for result in own])

    for width in widths:
        rows = []
        for memory in memories:
            of = [result for cell, result in results.items() if (cell.memory, cell.width) == (memory, width)]
            cells = []
            for pairs in numbers:
                values = accuracy(memory, width, pairs)
                study.add(f"{memory}, width {width}, {pairs} pairs", float(values.mean()), "accuracy")
                cells.append(f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""))
            for result in of:
                if result.failed:
                    print(f"{result.cell.name} failed: {result.failed}")
            rate = np.mean([result.tokens_per_second for result in of])
            study.add(f"{memory}, width {width}, training", float(rate), "tokens/s")
            size = f"{of[0].parameters:,}", f"{of[0].state_bytes:,}", f"{rate:,.0f}"
            rows.append([memory, *cells, *size])
        headings = ["", *(f"{pairs} pairs" for pairs in numbers), "parameters", "state, bytes", "tokens/s"]
        headings[len(numbers)] += " (not trained)"
        study.table(f"Accuracy, width {width}", headings, rows)

    panels = {
        f"width {width}": {
            memory: np.stack([accuracy(memory, width, pairs) for pairs in numbers], 1) for memory in memories
        }
        for width in widths
    }
    title = "Associative recall: the share of queries answered right"
    accuracy_figure(panels, numbers, study.folder / "recall.png", title, "pairs in the sequence", apart=WITHOUT)

    claims = []
    for memory in EXACT:
        worst = min(float(accuracy(memory, widths[-1], pairs).mean()) for pairs in numbers[:-1])
        claims.append(Claim(f"{memory}, width {widths[-1]}, as many pairs as trained: accuracy", worst, 0.9))
    return claims


def options(parser: argparse.ArgumentParser) -> None:
    """The study's own options."""
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="take over the cells of an earlier run's folder")
    parser.add_argument("--workers", type=int, default=2, help="cells trained at once, a thread each (default 2)")
    parser.add_argument("--memories", nargs="+", metavar="NAME", help="only these, and those that the verdict needs")


def main() -> int:
    """Runs the cells, reports; the exit code is the verdict's."""
    shipped = sorted({path.stem for path in (CONFIGS / "memory").glob("*.yaml")} - set(ELSEWHERE))
    study = open_study("associative_recall", "How many pairs does each memory remember?", options=options)
    memories = [*(name for name in shipped if name not in WITHOUT), *WITHOUT]
    if study.options.memories:
        memories = [name for name in memories if name in {*study.options.memories, *EXACT}]
    widths = (16,) if study.smoke else WIDTHS
    more = SMOKE if study.smoke else ()

    def cells(memory: str, width: int, seeds: Sequence[int], rates: Sequence[float]) -> list[Cell]:
        overrides = (*OVERRIDES.get(memory, ()), *more)
        return [Cell(memory, width, seed, rate, overrides) for rate in rates for seed in seeds]

    first = study.seeds[:1]
    most = 1 if study.smoke else None
    tried = [cell for memory in memories for cell in cells(memory, widths[0], first, rates(memory)[:most])]
    results = run_all(study, tried, "rates")
    chosen = best_rates(list(results.values()))
    report_rates(study, list(results.values()), chosen)
    rest = [
        cell
        for width in sorted(widths, reverse=True)  # what takes longest comes first
        for memory in memories
        for cell in cells(memory, width, study.seeds, [chosen[memory]])
    ]
    results |= run_all(study, [cell for cell in rest if cell not in results], "cells")
    results = {cell: results[cell] for cell in rest}
    return study.verdict(report(study, results, memories, widths))


if __name__ == "__main__":
    sys.exit(main())
