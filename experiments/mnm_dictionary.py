"""Dictionary inference: Metalearned Neural Memory against an LSTM, with attention and without.

An episode shows four pairs of a new one-to-one map of eight symbols and asks for translations. A model learns
nothing for long, until it finds the right pair: before, it names any of the targets that were shown, right one
time in four. That is the plateau. Rows:

    MNM-g, raw            the paper's wiring: embeddings, which are small, go straight to the controller
    … + reconstruction    raw, with the paper's meta-objective: the reconstruction before and after each write
    … + norm              raw, and the outer loss asks for large written values: −0.03 mean ‖v^w‖
    MNM-g                 inputs of size one, by a norm before the controller, as every row below has them
    MNM-g, alike          and read keys start as the same map of h as write keys, four times as large
    LSTM, LSTM + attention

and MNM-p: raw, plain, alike.

Each cell (row, seed) trains until it translates 99 % of the evaluation episodes of four pairs, or for `--updates`. What
it measured on the way is a JSONL file under runs/mnm_dictionary_cells/, so that a study that was stopped goes on.
Printed: updates and minutes to leave the plateau (50 % right) and to 99 %; the norm of written values on the plateau,
where it is least, and at the end; accuracy with more pairs than were trained. Figure: learning curves and norms.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot

from metamem import OuterLevels, build, build_task, load_config
from metamem.analysis import Claim, Study, open_study
from metamem.config import Config
from metamem.hierarchy import loss_per_token
from metamem.targets import mean_asked

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CELLS = Path("runs/mnm_dictionary_cells")
TASK = "losses.outer.next_token: 1.0"
PLATEAU, SOLVED = 0.5, 0.99


@dataclass(frozen=True)
class Method:
    """A row: the memory's preset, what of it is changed, and what the outer loss adds to the task's; `other`: what
    comes after the rows that count."""

    name: str
    preset: str
    overrides: tuple[str, ...] = ()
    adds: str = ""
    other: bool = False


APART = ("vars.memory.initial_keys=apart", "vars.memory.initial_gain=1.0")
NOTHING = "{kind: network, modules: {}, connections: [{from: in, to: out}]}"
RAW = (*APART, f"network.modules.blocks.modules.norm={NOTHING}")
RECONSTRUCTION = "aux.**.surprise: 0.1, aux.**.reconstruction: 0.1"
METHODS = {
    method.name: method
    for method in (
        Method("MNM-g, alike", "mnm_g"),
        Method("MNM-p, alike", "mnm_p"),
        Method("LSTM", "lstm"),
        Method("LSTM + attention", "lstm_attention"),
        Method("MNM-g", "mnm_g", APART),
        Method("MNM-p", "mnm_p", APART),
        Method("MNM-g, raw", "mnm_g", RAW, other=True),
        Method("MNM-p, raw", "mnm_p", RAW, other=True),
        Method("MNM-g, raw + norm", "mnm_g", RAW, "aux.**.value_norm: -0.03", other=True),
        Method("MNM-g, raw + reconstruction", "mnm_g", RAW, RECONSTRUCTION, other=True),
    )
}


@dataclass(frozen=True)
class Cell:
    """One training: a row and a seed, and how small it is."""

    method: str
    seed: int
    updates: int
    every: int
    overrides: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where its measurements are; another budget or size is another cell."""
        size = "".join(f"-{value.rpartition('=')[2]}" for value in self.overrides)
        name = self.method.lower().replace(", ", "-").replace(" + ", "-")
        return CELLS / f"{name}-seed{self.seed}-updates{self.updates}{size}.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """What was measured, from the first evaluation to the last; empty before the cell is finished."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []


def config_of(cell: Cell) -> Config:
    """The experiment's config around the row's memory."""
    method = METHODS[cell.method]
    experiment = f"extends: [{CONFIGS}/memory/{method.preset}.yaml, {CONFIGS}/experiment/mnm_dictionary.yaml]\n"
    objective = f"hierarchy.levels.task.objective={{{TASK}{', ' * bool(method.adds)}{method.adds}}}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mnm_dictionary.yaml"
        path.write_text(experiment)
        return load_config(path, [f"seed={cell.seed}", objective, *method.overrides, *cell.overrides])


def run_cell(cell: Cell) -> None:
    """Trains, and writes down what it measures; under the cell's name once it is finished."""
    torch.set_num_threads(1)
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, rows = cell.path.with_suffix(".partial"), []
    with unfinished.open("w") as file:
        for row in trained(cell):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    unfinished.replace(cell.path)
    last = rows[-1]
    print(f"{cell.method}, seed {cell.seed}: {last['accuracy']:.3f} after {last['update']:,} updates", flush=True)


def trained(cell: Cell) -> Iterator[dict[str, Any]]:
    """The measurements of a training that ends at 99 %."""
    config = config_of(cell)
    task, settings = build_task(config), config.training
    model = build(config)
    outer, generator, seconds = OuterLevels(config, model), torch.Generator().manual_seed(cell.seed), 0.0
    pairs, norms = task.pairs[0], []
    for update in range(1, cell.updates + 1):
        started = time.perf_counter()
        inputs, targets = task.sample(generator, settings.batch, settings.length)
        out = model(inputs)
        outer.backward(lambda o, y=out.y, t=targets: mean_asked(loss_per_token(o, y, t), t), out.aux)
        outer.step(update, min(1.0, update / max(1, settings.warmup)), settings.gradient_clip)
        seconds += time.perf_counter() - started
        norms += [float(aux.detach().mean()) for name, aux in out.aux.items() if name.endswith("value_norm")]
        if update % cell.every == 0 or update == cell.updates:
            with torch.no_grad():
                found = task.evaluate(lambda inputs, _: model(inputs).y)
            accuracy = found[f"accuracy/pairs-{pairs}"]
            norm = statistics.fmean(norms) if norms else None
            yield {"update": update, "seconds": round(seconds, 2), "accuracy": accuracy, "value_norm": norm, **found}
            norms = []
            if accuracy >= SOLVED:
                return


@dataclass(frozen=True)
class Summary:
    """What a cell comes to; None where it did not within its updates. `plateau_norm`: ‖v^w‖ at its least."""

    left: dict[str, Any] | None
    solved: dict[str, Any] | None
    last: dict[str, Any]
    lowest_norm: float | None


def summary(rows: Sequence[dict[str, Any]]) -> Summary:
    """Of a cell's measurements."""
    norms = [row["value_norm"] for row in rows if row["value_norm"] is not None]
    left, solved = (next((row for row in rows if row["accuracy"] >= bound), None) for bound in (PLATEAU, SOLVED))
    return Summary(left, solved, rows[-1], min(norms, default=None))


def shown(values: Sequence[float | None], unit: float, form: str, beyond: float) -> str:
    """The cells of a row side by side; `> beyond` where one did not come so far."""
    return " · ".join(f"> {beyond / unit:{form}}" if value is None else f"{value / unit:{form}}" for value in values)


def tables(study: Study, found: dict[str, list[Summary]], updates: int) -> None:
    """Updates and minutes; norms; accuracy by the number of pairs."""
    learning, norms, pairs = [], [], []
    numbers = [key for key in next(iter(found.values()))[0].last if key.startswith("accuracy/")]
    for name, cells in found.items():
        left, solved = ([getattr(cell, what) for cell in cells] for what in ("left", "solved"))
        reached = [shown([row and row["update"] for row in rows], 1, ",.0f", updates) for rows in (left, solved)]
        longest = max(cell.last["seconds"] for cell in cells)
        minutes = shown([row and row["seconds"] for row in solved], 60, ".1f", longest)
        last = [cell.last["accuracy"] for cell in cells]
        learning.append([name, *reached, minutes, shown(last, 0.01, ".1f", 0)])
        if cells[0].lowest_norm is not None:
            lowest, final = [cell.lowest_norm for cell in cells], [cell.last["value_norm"] for cell in cells]
            norms.append([name, shown(lowest, 1, ".2f", 0), shown(final, 1, ".2f", 0)])
        means = [statistics.fmean(cell.last[key] for cell in cells) for key in numbers]
        pairs.append([name, *(f"{100 * mean:.1f}" for mean in means)])
        for cell, row in zip(cells, solved, strict=True):
            study.add(f"{name}, updates to 99 %", row["update"] if row else float("inf"), "updates")
            study.add(f"{name}, last accuracy", cell.last["accuracy"], "share")
    headings = ["", "updates to 50 %", "updates to 99 %", "minutes to 99 %", "last accuracy, %"]
    study.table(f"Four pairs, a seed each · at most {updates:,} updates", headings, learning)
    study.table("Norm of written values", ["", "least", "last"], norms)
    columns = [key.removeprefix("accuracy/pairs-") + " pairs" for key in numbers]
    study.table("Symbols translated right, %, mean over seeds; four pairs trained", ["", *columns], pairs)


def figure(path: Path, runs: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Accuracy and norm of written values along training, a line a seed, a colour a row."""
    matplotlib.use("Agg")
    panels, axes = pyplot.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for index, (name, cells) in enumerate(runs.items()):
        for number, rows in enumerate(cells):
            updates = [row["update"] for row in rows]
            style = {"color": f"C{index}", "linewidth": 1.4, "label": name if number == 0 else None}
            axes[0].plot(updates, [100 * row["accuracy"] for row in rows], **style)
            if rows[0]["value_norm"] is not None:
                axes[1].plot(updates, [row["value_norm"] for row in rows], **style)
    axes[0].axhline(25, color="grey", linestyle=":", linewidth=1)
    chance = {"color": "grey", "fontsize": 8, "ha": "right", "transform": axes[0].get_yaxis_transform()}
    axes[0].text(0.99, 21, "one of the four shown, whichever", **chance)
    for axis, label in zip(axes, ("symbols translated right, four pairs (%)", "norm of written values"), strict=True):
        axis.set_xlabel("updates")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    panels.suptitle("Dictionary inference: a line a seed, each until 99 % or the end of its updates")
    panels.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    panels.savefig(path, dpi=130)
    pyplot.close(panels)


def claims(found: dict[str, list[Summary]], updates: int) -> list[Claim]:
    """What must hold."""

    def mean(name: str, what: str) -> float:
        """Updates, counted as all of them where they were not enough."""
        rows = [getattr(cell, what) for cell in found[name]]
        return statistics.fmean(row["update"] if row else updates for row in rows)

    shorter = [
        Claim(f"{base}: plateau, raw / alike", mean(f"{base}, raw", "left") / mean(f"{base}, alike", "left"), 1.5)
        for base in ("MNM-g", "MNM-p")
    ]
    worst = [min(cell.last["accuracy"] for cell in found[f"{base}, alike"]) for base in ("MNM-g", "MNM-p")]
    more = {
        name: statistics.fmean(cell.last["accuracy/pairs-8"] for cell in found[name])
        for name in ("MNM-g, alike", "LSTM", "LSTM + attention")
    }
    beyond = [
        Claim(f"eight pairs, MNM-g, alike / {name}", more["MNM-g, alike"] / more[name], 1.5)
        for name in ("LSTM", "LSTM + attention")
    ]
    return [
        *shorter,
        *beyond,
        *(
            Claim(f"MNM-{name}, alike: accuracy, worst seed", a, 0.99)
            for name, a in zip(("g", "p"), worst, strict=True)
        ),
    ]


def options(parser: argparse.ArgumentParser) -> None:
    """The study's own options."""
    parser.add_argument("--updates", type=int, default=8000, help="of a cell that does not come to 99 %% before")
    parser.add_argument("--every", type=int, default=250, help="updates from one evaluation to the next")
    parser.add_argument("--processes", type=int, default=2, help="cells trained at once, a thread each")
    parser.add_argument("--rows", nargs="+", choices=METHODS, default=list(METHODS), metavar="ROW", help="which rows")


def main() -> int:
    """Trains the cells that are not there yet, then reports on all."""
    study = open_study("mnm_dictionary", "MNM and LSTMs on dictionary inference.", seeds=3, options=options)
    chosen = study.options
    size = ("vars.dim=8", "training.batch=4", "task.examples=8") if study.smoke else ()
    updates, every = (20, 10) if study.smoke else (chosen.updates, chosen.every)
    cells = {name: [Cell(name, seed, updates, every, size) for seed in study.seeds] for name in chosen.rows}
    # Seed by seed, so that a study that is stopped has every row that counts.
    order = sorted((cell for row in cells.values() for cell in row), key=lambda c: (METHODS[c.method].other, c.seed))
    missing = [cell for cell in order if not cell.rows()]
    with ProcessPoolExecutor(chosen.processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(run_cell, missing))
    runs = {name: [cell.rows() for cell in row] for name, row in cells.items()}
    found = {name: [summary(rows) for rows in row] for name, row in runs.items()}
    tables(study, found, updates)
    figure(study.folder / "learning.png", runs)
    return study.verdict(claims(found, updates) if set(METHODS) <= set(found) else [])


if __name__ == "__main__":
    sys.exit(main())
