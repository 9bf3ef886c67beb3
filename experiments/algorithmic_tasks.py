"""Sort, argmax, adding, associative recall and shortest paths: each memory and an LSTM within one budget.

A cell (task, row, seed) is a training of the task's own number of updates, stated below, the same for all rows: at most
30 minutes on one thread of a desktop CPU. Printed, for each task and row: the accuracy of the answers at the largest
size that is trained, a seed beside the other, and at each beyond, mean over seeds; minutes. Figure: accuracy along
training, a panel a task.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
from matplotlib import pyplot

from experiments.memory_rows import ROWS, Row, cell_of, run_cells
from metamem.analysis import Claim, Study, open_study
from metamem.analysis.plan import Cell
from metamem.analysis.results import Result

RATE = "hierarchy.levels.task.optimizer.lr=3.0e-3"
MSE = "hierarchy.levels.task.objective={losses.recall.mse: 1.0}"


@dataclass(frozen=True)
class Task:
    """A task: its network, the updates of its budget, what is changed of its config; the first of `sizes` is the
    largest that is trained, the others are beyond."""

    name: str
    network: str
    steps: int
    sizes: tuple[str, ...]
    overrides: tuple[str, ...] = ()


TASKS = {
    task.name: task
    for task in (
        Task("sort", "recurrent", 1_500, ("length-8", "length-12", "length-16")),
        Task("argmax", "recurrent", 1_250, ("length-8", "length-12", "length-16")),
        Task("adding", "numbers", 1_000, ("length-50", "length-100", "length-200"), (MSE,)),
        Task(
            "associative_recall",
            "recurrent",
            1_500,
            ("pairs-8",),
            ("task.pairs=[2, 4, 8]", "vars.vocabulary=32", "training.length=32"),
        ),
        Task("graph", "recurrent", 1_000, ("nodes-7", "nodes-10", "metro-6", "metro-8")),
    )
}


def cell(task: Task, row: Row, seed: int, evaluations: int, smoke: bool) -> Cell:
    """A row's training on a task."""
    overrides = [
        RATE,
        *task.overrides,
        f"training.steps={task.steps}",
        f"training.evaluate_every={max(1, task.steps // evaluations)}",
        *(("training.batch=4", "task.examples=4", "vars.dim=16") if smoke else ("task.examples=128",)),
    ]
    return cell_of(row, task.network, task.name, overrides, seed)


def accuracy(results: list[Result], size: str) -> list[float]:
    """Of each seed; 0 where a cell did not finish."""
    return [one.metrics[f"accuracy/{size}"] or 0.0 if one.status == "done" else 0.0 for one in results]


def table(study: Study, task: Task, found: dict[str, list[Result]]) -> None:
    """A line a row."""
    lines = []
    for name, results in found.items():
        means = {size: statistics.fmean(accuracy(results, size)) for size in task.sizes}
        seeds = " · ".join(f"{100 * share:.1f}" for share in accuracy(results, task.sizes[0]))
        minutes = statistics.fmean(one.cost.get("seconds", 0.0) for one in results) / 60
        lines.append([name, seeds, *(f"{100 * means[size]:.1f}" for size in task.sizes[1:]), f"{minutes:.1f}"])
        for size, share in means.items():
            study.add(f"{task.name}, {name}, {size}", share, "share")
    title = f"{task.name}: answers right, %, after {task.steps:,} updates; {task.sizes[0]}, a seed beside the other"
    study.table(title, ["", *task.sizes, "minutes"], lines)


def figure(path: Path, found: dict[str, dict[str, list[Result]]]) -> None:
    """Accuracy at the largest size trained, a panel a task, a line a seed, a colour a row."""
    matplotlib.use("Agg")
    panels, axes = pyplot.subplots(1, len(found), figsize=(4.4 * len(found), 4), squeeze=False, layout="constrained")
    for axis, (task, rows) in zip(axes[0], found.items(), strict=True):
        for index, (name, results) in enumerate(rows.items()):
            for number, result in enumerate(one for one in results if one.status == "done"):
                curve = result.curves[f"accuracy/{TASKS[task].sizes[0]}"]
                label = name if number == 0 else None
                axis.plot(curve["x"], curve["y"], color=f"C{index}", linewidth=1.4, label=label)
        axis.set_title(f"{task}, {TASKS[task].sizes[0]}")
        axis.set_xlabel("updates")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("answers right")
    panels.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    panels.savefig(path, dpi=130)
    pyplot.close(panels)


def claims(found: dict[str, dict[str, list[Result]]]) -> list[Claim]:
    """Of sort and argmax, the best memory's answers, mean over seeds; an LSTM is no memory."""
    made = []
    for task in ("sort", "argmax"):
        rows = {name: results for name, results in found.get(task, {}).items() if name != "LSTM"}
        if rows:
            means = {name: statistics.fmean(accuracy(results, TASKS[task].sizes[0])) for name, results in rows.items()}
            best = max(means, key=means.__getitem__)
            made.append(Claim(f"{task}: answers right, best memory ({best})", means[best], 0.99))
    return made


def options(parser: argparse.ArgumentParser) -> None:
    """The study's own options."""
    parser.add_argument("--evaluations", type=int, default=10, help="along a training")
    parser.add_argument("--processes", type=int, default=2, help="cells trained at once, a thread each")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="which rows")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="which tasks")


def main() -> int:
    """Trains the cells that are not there yet, then reports on all."""
    study = open_study("algorithmic_tasks", "Memories on algorithmic tasks.", seeds=1, options=options)
    chosen = study.options
    evaluations = 2 if study.smoke else chosen.evaluations
    tasks = {name: replace(TASKS[name], steps=4) if study.smoke else TASKS[name] for name in chosen.tasks}
    cells = {
        f"{name}/{row}": [cell(task, ROWS[row], seed, evaluations, study.smoke) for seed in study.seeds]
        for name, task in tasks.items()
        for row in chosen.rows
    }
    runs = run_cells("algorithmic_tasks", cells, chosen.processes)
    found = {name: {row: runs[f"{name}/{row}"] for row in chosen.rows} for name in tasks}
    for name, rows in found.items():
        table(study, tasks[name], rows)
    figure(study.folder / "learning.png", found)
    return study.verdict(claims(found))


if __name__ == "__main__":
    sys.exit(main())
