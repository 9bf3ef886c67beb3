"""Sinusoid regression: eight learners, one inner loop, and what Li et al. (2017) report.

A task is a sine of unknown amplitude (0.1–5), phase (0–π) and, in Li's setting, frequency (0.8–1.2), seen at 5, 10 or
20 points. Every learner is a config of `configs/episodes`, trained and tested at the same number of points. Measured is
the mean squared error on 600 new tasks after 0, 1, 5 and 10 inner updates, with 95 % intervals, and how many tasks
diverged (an error that is not finite, or above ten times the mean before any update).

Beside it: the published figures for one update, and the Bayes optimum. Three points without noise determine the sine
(two, where its frequency is known), so that the least possible error is 0 at 5, 10 and 20.

Each cell (learner, points, seed) leaves a JSON file under runs/sinusoid_cells/, so that a study that was stopped goes
on. Figure: what the learners predict of one task, before adapting and after 1 and 10 updates.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot

from metamem.analysis import Claim, Study, open_study
from metamem.episodes.evaluation import Evaluation
from metamem.episodes.learner import Learner
from metamem.episodes.level import Batch, Episode
from metamem.episodes.schema import load_episodes
from metamem.episodes.tasks import Sinusoid
from metamem.episodes.training import train_episodes

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "episodes"
CELLS = Path("runs/sinusoid_cells")
LEARNERS = {
    "MAML": "maml",
    "MAML, first order": "first_order_maml",
    "ANIL": "anil",
    "Meta-SGD": "meta_sgd",
    "MAML++": "maml_plus_plus",
    "CAVIA": "cavia",
    "sparse-MAML": "sparse_maml",
    "routed MAML": "routed_maml",
}
UPDATES, SHOTS = (0, 1, 5, 10), (5, 10, 20)
SETTINGS = {"li": "[0.8, 1.2]", "finn": "[1.0, 1.0]"}
# Li et al. 2017, table 1, as quoted: one update, trained and tested at the same number of points.
PUBLISHED = {
    "MAML": {5: "1.13 ± 0.18", 10: "0.77 ± 0.11", 20: "0.48 ± 0.08"},
    "Meta-SGD": {5: "0.90 ± 0.16", 10: "0.53 ± 0.09", 20: "0.31 ± 0.05"},
}
SHOWN = 2  # tasks of which a cell keeps what it predicts


@dataclass(frozen=True)
class Cell:
    """One training: a learner at a number of points, with a seed."""

    learner: str
    shots: int
    seed: int
    setting: str
    steps: int
    tasks: int

    @property
    def path(self) -> Path:
        """Where its results are."""
        name = f"{LEARNERS[self.learner]}-{self.setting}-{self.shots}-{self.steps}-{self.tasks}-{self.seed}.json"
        return CELLS / name

    @property
    def overrides(self) -> list[str]:
        """What of the learner's config is the study's."""
        return [
            f"seed={self.seed}",
            f"task.shots={self.shots}",
            f"task.frequency={SETTINGS[self.setting]}",
            f"training.steps={self.steps}",
            f"training.evaluated_tasks={self.tasks}",
            f"training.evaluated_steps={list(UPDATES)}",
            f"training.evaluate_every={max(self.steps // 5, 1)}",
            "training.batch=25",
            "training.schedule=cosine",
            "hierarchy.levels.meta.optimizer.lr=2.0e-3",
            "training.threads=1",
        ]

    def result(self) -> dict[str, Any] | None:
        """What was measured, or None where it is not there yet."""
        return json.loads(self.path.read_text()) if self.path.is_file() else None


def run_cell(cell: Cell) -> None:
    """Trains a cell and keeps its evaluation and curves."""
    config = load_episodes(CONFIGS / f"{LEARNERS[cell.learner]}.yaml", cell.overrides)
    with tempfile.TemporaryDirectory() as folder:
        trained = train_episodes(config, Path(folder))
    rates = trained.learner.rates
    result = {
        "seconds": trained.seconds,
        "best": trained.best,
        "updates": {str(count): measured(found) for count, found in trained.evaluation.items()},
        "negative_rates": rates.negative() if rates is not None else 0.0,  # pyright: ignore[reportCallIssue]
        "curves": curves(trained.learner, cell),
    }
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    partial = cell.path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.replace(cell.path)


def measured(found: Evaluation) -> dict[str, float]:
    """The error of an evaluation."""
    mse = found.figures["mse"]
    return {
        "mse": mse.mean,
        "interval": mse.interval,
        "median": mse.median,
        "tasks": mse.tasks,
        "diverged": found.diverged,
    }


@torch.no_grad()
def curves(learner: Learner, cell: Cell) -> dict[str, Any]:
    """What a learner predicts of some evaluation tasks all over the range, by the number of updates."""
    low, high = json.loads(SETTINGS[cell.setting])
    task = Sinusoid(shots=cell.shots, query=200, frequency=(low, high))
    generator = torch.Generator().manual_seed(1)
    waves = task.waves(generator, SHOWN)
    shown = -5 + 10 * torch.rand(SHOWN, cell.shots, 1, generator=generator)
    x = torch.linspace(-5, 5, 200).view(1, -1, 1).expand(SHOWN, -1, -1)
    episode = Episode(Batch(shown, waves(shown)), Batch(x, waves(x)))
    predictions = {str(count): learner(episode, count)[..., 0].tolist() for count in (0, 1, 10)}
    points = {"x": shown[..., 0].tolist(), "y": episode.support.targets[..., 0].tolist()}
    return {"x": x[0, :, 0].tolist(), "truth": episode.query.targets[..., 0].tolist(), "points": points, **predictions}


def pooled(results: Sequence[dict[str, Any]], updates: int) -> tuple[float, float, int]:
    """Mean error over seeds, half its interval, and the tasks that diverged."""
    found = [result["updates"][str(updates)] for result in results]
    interval = sum(one["interval"] ** 2 for one in found) ** 0.5 / len(found)
    return statistics.fmean(one["mse"] for one in found), interval, sum(one["diverged"] for one in found)


def tables(
    study: Study, found: dict[tuple[str, int], list[dict[str, Any]]], bayes: dict[int, float], tasks: int
) -> None:
    """The error by learner, points and updates."""
    for shots in sorted({shots for _, shots in found}):
        rows = []
        for learner in LEARNERS:
            results = found.get((learner, shots))
            if results is None:
                continue
            cells, diverged = [], []
            for updates in UPDATES:
                mean, interval, lost = pooled(results, updates)
                median = statistics.fmean(result["updates"][str(updates)]["median"] for result in results)
                cells.append(f"{mean:.1e}, median {median:.2f}" if lost else f"{mean:.3f} ± {interval:.3f}")
                diverged.append(str(lost))
                study.add(f"{learner}, {shots} points, {updates} updates", mean, "mse")
            negative = statistics.fmean(result["negative_rates"] for result in results)
            published = PUBLISHED.get(learner, {}).get(shots, "")
            rows.append([learner, *cells, published, " · ".join(diverged), f"{100 * negative:.0f} %"])
        rows.append(["Bayes optimum", *[f"{bayes[shots]:.3f}"] * len(UPDATES), "", "", ""])
        updates = [f"{count} updates" if count != 1 else "1 update" for count in UPDATES]
        headings = ["", *updates, "published, 1 update", "diverged", "rates below 0"]
        seeds = len(next(iter(found.values())))
        study.table(f"Mean squared error, {shots} points · {seeds} × {tasks} tasks", headings, rows)


def bayes_optimum(shots: Sequence[int], setting: str, tasks: int) -> dict[int, float]:
    """The least expected error, of the exact posterior."""
    low, high = json.loads(SETTINGS[setting])
    found = {}
    for count in shots:
        task = Sinusoid(shots=count, frequency=(low, high))
        episode = task.evaluation(tasks)
        found[count] = float(task.measure(task.bayes(episode), episode.query.targets)["mse"].mean())
    return found


def figure(path: Path, found: dict[tuple[str, int], list[dict[str, Any]]], shots: int) -> None:
    """What each learner predicts of a task, a panel a learner."""
    matplotlib.use("Agg")
    names = [learner for learner in LEARNERS if (learner, shots) in found]
    columns = min(4, len(names))
    panels, axes = pyplot.subplots(
        -(-len(names) // columns),
        columns,
        figsize=(4 * columns, 6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes.flat, names, strict=False):
        shown = found[name, shots][0]["curves"]
        axis.plot(shown["x"], shown["truth"][0], color="black", linewidth=1, label="the sine")
        axis.plot(shown["points"]["x"][0], shown["points"]["y"][0], "k^", markersize=5, label="points shown")
        for updates, style in (("0", ":"), ("1", "--"), ("10", "-")):
            label = {"0": "before", "1": "after 1 update", "10": "after 10"}[updates]
            axis.plot(shown["x"], shown[updates][0], style, color="C3", linewidth=1.4, label=label)
        axis.set_title(name)
        axis.grid(alpha=0.3)
    panels.suptitle(f"One task, {shots} points: predictions before and after adapting")
    panels.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    panels.savefig(path, dpi=130)
    pyplot.close(panels)


def claims(found: dict[tuple[str, int], list[dict[str, Any]]]) -> list[Claim]:
    """What must hold: errors after one update at or below the published means. The budgets are not the same: nothing is
    claimed of which method is better."""
    return [
        Claim(f"{learner}, {shots} points, 1 update", pooled(found[learner, shots], 1)[0], float(mean.split()[0]), True)
        for learner, published in PUBLISHED.items()
        for shots, mean in published.items()
        if (learner, shots) in found
    ]


def options(parser: argparse.ArgumentParser) -> None:
    """The study's own options."""
    parser.add_argument("--steps", type=int, default=15_000, help="outer steps of a training, 25 tasks each")
    parser.add_argument("--tasks", type=int, default=600, help="tasks of the evaluation")
    parser.add_argument("--setting", choices=SETTINGS, default="li", help="frequency 0.8–1.2 (li) or 1 (finn)")
    parser.add_argument("--shots", nargs="+", type=int, choices=SHOTS, default=list(SHOTS), help="points shown")
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=list(LEARNERS), metavar="LEARNER")
    parser.add_argument("--processes", type=int, default=2, help="cells trained at once, a thread each")


def main() -> int:
    """Trains the cells that are not there yet, then reports on all."""
    study = open_study("sinusoid", "Learners on sinusoid regression.", options=options)
    chosen = study.options
    steps, tasks = (4, 10) if study.smoke else (chosen.steps, chosen.tasks)
    keys = [(learner, shots) for learner in chosen.learners for shots in chosen.shots]
    cells = {key: [Cell(*key, seed, chosen.setting, steps, tasks) for seed in study.seeds] for key in keys}
    missing = [cell for row in cells.values() for cell in row if cell.result() is None]
    with ProcessPoolExecutor(chosen.processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(run_cell, missing))
    found = {key: [result for cell in row if (result := cell.result()) is not None] for key, row in cells.items()}
    tables(study, found, bayes_optimum(chosen.shots, chosen.setting, tasks), tasks)
    figure(study.folder / "functions.png", found, 10 if 10 in chosen.shots else chosen.shots[0])
    return study.verdict(claims(found) if chosen.setting == "li" else [])


if __name__ == "__main__":
    sys.exit(main())
