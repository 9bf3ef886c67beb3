"""Which parameters learn at which timescale? A regression whose rows drift at known speeds says.

Task `drift`: eight output rows of half-lives 20, 20, 200, 200, 2000, 2000, ∞, ∞ tokens, regressed online. The cells of
configs/experiment/timescale_ablation.yaml are learners of one level at each period, of several levels, of three levels
and a router of each kind, and of rates that each row has for itself. A few numbers each, meta-trained for a minute or
less: rates, forgetting, gates. Measured is the squared error without noise over that of the Kalman filter, which knows
all half-lives, on the second half of 12,000 tokens; 1 is the optimum.

The figure: quality against the period; each learner's excess over the optimum, by the rows that it comes from; where
the router sends each row. Cells that are done are rows of ablation/cells.jsonl; `--resume FOLDER` goes on with a run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot

from metamem import Config, build_task, train
from metamem.analysis import Claim, Result, Study, open_study, plan_ablation, run_ablation
from metamem.analysis.statistics import Interval, interval
from metamem.analysis.style import COLORS, look, panels, png
from metamem.memory.fast_weights import FastWeights
from metamem.progress import ablation_bar
from metamem.tasks.drift import inputs, rank_correlation

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "experiment" / "timescale_ablation.yaml"
SMOKE = (
    *("seeds=[0]", "training.steps=2", "training.batch=2", "training.length=512"),
    *("task.stream=800", "task.examples=1"),
)
PERIOD, REDUCTION = "hierarchy.levels.fast.period", "hierarchy.levels.fast.rule.reduction"
DIVERGED = 30.0  # times the optimum: five times the error of predicting zero
BOUND = 1.2  # what the routed hierarchy must keep
ROUTED = "static router"
LEARNERS = (  # at period 1, where a family has several
    *("tuned rate", "rate of each row", "tuned rate and forgetting", "two levels", "three levels"),
    *(
        "rate and forgetting of each row",
        "fixed router",
        "binary router",
        "top-1 router",
        "top-2 router",
        "dense router",
        ROUTED,
    ),
)


# A cell


def measure(config: Config, seed: int) -> dict[str, Any]:
    """Meta-trains a learner and measures it: the task's evaluation, what it learned, and how well the timescales that
    it gives the rows agree with theirs (`rank_correlation`)."""
    task = build_task(config)
    with TemporaryDirectory() as folder:
        model = train(config, Path(folder), task=task).model.eval()
    with torch.no_grad():
        metrics = task.evaluate(lambda seen, targets: model(seen).y)
        memory = model.get_submodule("memory")
        assert isinstance(memory, FastWeights)
        seen = inputs(task.evaluation)[:, :512].float()
        learned = levels_of(memory, seen) | gates_of(memory, seen)
    scale = timescales(memory, learned)
    agreement = rank_correlation(scale, task.half_lives) if scale else math.nan
    if math.isfinite(agreement):
        metrics["rank_correlation"] = agreement
    return {"metrics": metrics, "known": [str(life) for life in task.half_lives], **learned}


def levels_of(memory: FastWeights, seen: torch.Tensor) -> dict[str, Any]:
    """Each level's rate and half-life in tokens, by head."""
    gates = memory.writer(seen, seen.dtype).gates
    rates, half_lives = {}, {}
    for level in memory.levels:
        rates[level.name] = gates[level.name].lr.mean((0, 2, 3)).tolist()
        if (keep := gates[level.name].log_keep) is not None:
            half_lives[level.name] = (-level.period * math.log(2) / keep.mean((0, 2))).tolist()
    return {"rates": rates, "level_half_lives": half_lives}


def gates_of(memory: FastWeights, seen: torch.Tensor) -> dict[str, Any]:
    """The router's mean gates, rows by levels."""
    if memory.router is None:
        return {}
    return {"gates": memory.router(seen, seen.dtype).gates.mean((0, 1)).tolist()}


def timescales(memory: FastWeights, learned: Mapping[str, Any]) -> list[float]:
    """What a learner gives each row: the period of its levels, a geometric mean weighted by the gates; or the half-life
    that the row's head learned; or nothing of its own."""
    if "gates" in learned:
        gates = torch.tensor(learned["gates"])
        slowness = torch.tensor([math.log2(level.period) for level in memory.levels])
        return ((gates @ slowness) / gates.sum(-1)).tolist()
    lives = list(learned["level_half_lives"].values())
    return lives[0] if len(lives) == 1 and len(lives[0]) > 1 else []


# What the cells come to


def found_by(rows: Sequence[Result], family: str, **factors: Any) -> list[Result]:
    """The finished cells of a family, those at some of its factors' values."""
    wanted = {PERIOD: factors.get("period"), REDUCTION: factors.get("reduction")}
    return [
        row
        for row in rows
        if row.family == family
        and row.status == "done"
        and all(value is None or row.factors.get(key, value) == value for key, value in wanted.items())
    ]


def learner(rows: Sequence[Result], family: str) -> list[Result]:
    """The cells of a learner, at period 1."""
    return found_by(rows, family, period=1)


def metric(rows: Sequence[Result], name: str) -> Interval:
    """The mean of a metric over seeds, with its confidence."""
    return interval([value for row in rows if (value := row.metrics.get(name)) is not None])


def excess(rows: Sequence[Result]) -> dict[str, Interval]:
    """The excess over the optimum by the half-life of the rows that it comes from, both rows of each together."""
    speeds = dict.fromkeys(rows[0].more["known"])
    found = {}
    for speed in speeds:
        of = [f"excess/row-{row}" for row, life in enumerate(rows[0].more["known"]) if life == speed]
        found[speed] = interval([sum(row.metrics[name] or 0.0 for name in of) for row in rows])
    return found


CURVES = {
    "rate tuned at each period": ("tuned rate", None),
    "rate of period 1 at each": ("one rate", "sum"),
    "rate of period 1, over the period": ("one rate", "mean"),
    "rate and forgetting tuned, implicit steps": ("tuned rate and forgetting", None),
}


def curves(rows: Sequence[Result]) -> dict[str, dict[int, list[Result]]]:
    """The cells of one level by curve and period; of none where all diverged."""
    periods = sorted({row.factors[PERIOD] for row in rows if PERIOD in row.factors})
    return {
        name: {period: found_by(rows, family, period=period, reduction=reduction) for period in periods}
        for name, (family, reduction) in CURVES.items()
    }


def tables(study: Study, rows: Sequence[Result]) -> None:
    """Prints what was measured, and keeps it as rows of the study."""
    shown = []
    for family in LEARNERS:
        if not (cells := learner(rows, family)):
            shown.append([family, "diverged", *[""] * 5])
            continue
        ratio, agreement = metric(cells, "ratio"), metric(cells, "rank_correlation")
        study.add(family, ratio.mean, "error / Kalman filter's", against="Kalman filter", ratio=ratio.mean)
        parts = [f"{100 * part.mean:.1f}" for part in excess(cells).values()]
        shown.append([family, str(ratio), *parts, f"{agreement.mean:.2f}" if agreement.count else "–"])
        if agreement.count:
            study.add(f"{family}, rank correlation", agreement.mean, "Spearman's ρ")
    headings = ["", "error / optimum", *(f"h = {shown_life(life)}, %" for life in speeds_of(rows)), "rank correlation"]
    study.table("Squared error over the Kalman filter's; its excess by the half-life h of the rows", headings, shown)

    by_period = curves(rows)
    periods = list(next(iter(by_period.values())))
    shown = []
    for name, line in by_period.items():
        for period, cells in line.items():
            study.add(f"{name}, period {period}", metric(cells, "ratio").mean, "error / Kalman filter's")
        shown.append([name, *(str(metric(cells, "ratio")) if cells else "diverged" for cells in line.values())])
    study.table("One level, by its period", ["", *map(str, periods)], shown)

    shown = []
    for family in [name for name in LEARNERS if name.endswith("router")]:
        cells = learner(rows, family)
        for level, name in enumerate(cells[0].more["rates"] if cells else []):
            gates = np.mean([[row[level] for row in cell.more["gates"]] for cell in cells], 0)
            rate = np.mean([cell.more["rates"][name][0] for cell in cells])
            life = np.median([cell.more["level_half_lives"][name][0] for cell in cells])
            shown.append([f"{family}, {name}", f"{rate:.3g}", f"{life:,.0f}", *(f"{gate:.2f}" for gate in gates)])
    headings = ["", "rate", "half-life", *(f"h = {shown_life(life)}" for life in known(rows))]
    study.table("Learned rates and half-lives, and gates of each row, mean over seeds", headings, shown)


def known(rows: Sequence[Result]) -> list[str]:
    """The half-lives of the task's rows."""
    return next(row.more["known"] for row in rows if row.status == "done")


def shown_life(life: str) -> str:
    """A half-life as it is read."""
    return "∞" if life == "inf" else f"{float(life):g}"


def speeds_of(rows: Sequence[Result]) -> list[str]:
    """The half-lives of the task, each once."""
    return list(dict.fromkeys(known(rows)))


def figure(rows: Sequence[Result], path: Path) -> None:
    """Quality against the period; excess by learner; gates of the routed hierarchy."""
    with panels(3, size=(5.6, 4.6)) as (drawing, (by_period, by_learner, gates)):
        draw_periods(by_period, rows)
        draw_learners(by_learner, rows)
        draw_gates(gates, learner(rows, ROUTED))
        if (seeds := len({row.seed for row in rows})) > 1:
            drawing.supxlabel(f"bands and bars: 95 % intervals of the mean over {seeds} seeds", fontsize=8)
        path.write_bytes(png(drawing))
        pyplot.close(drawing)


def draw_periods(axis: Any, rows: Sequence[Result]) -> None:
    """A line a curve with its band; what diverged ends it."""
    for index, (name, line) in enumerate(curves(rows).items()):
        at = {period: metric(cells, "ratio") for period, cells in line.items() if cells}
        at = {period: ratio for period, ratio in at.items() if ratio.mean < DIVERGED}
        gone = [period for period in line if period not in at]
        means, reach = (np.array([getattr(ratio, part) for ratio in at.values()]) for part in ("mean", "reach"))
        axis.plot(list(at), means, label=name + (f" (diverges at {gone[0]})" if gone else ""), **look(index))
        axis.fill_between(list(at), means - reach, means + reach, color=look(index)["color"], alpha=0.2, linewidth=0)
    axis.axhline(1, color="black", linewidth=1, linestyle=":", label="Kalman filter")
    periods = list(next(iter(curves(rows).values())))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(periods, [str(period) for period in periods])
    ticks = [tick for tick in (1, 1.4, 2, 3, 4, 6, 8, 16) if tick <= axis.get_ylim()[1]]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("period of the level (tokens)")
    axis.set_ylabel("squared error / Kalman filter's")
    axis.set_title("One level at each period")
    axis.legend(loc="upper left")


def draw_learners(axis: Any, rows: Sequence[Result]) -> None:
    """A bar a learner, its excess stacked by where it comes from, with the interval of the whole."""
    present = [(family, cells) for family in LEARNERS if (cells := learner(rows, family))]
    for place, (_, cells) in enumerate(present):
        left = 1.0
        for index, (speed, part) in enumerate(excess(cells).items()):
            label = f"half-life {shown_life(speed)}" if place == 0 else None
            axis.barh(place, part.mean, left=left, color=COLORS[index], label=label, height=0.7)
            left += part.mean
        ratio = metric(cells, "ratio")
        axis.errorbar(ratio.mean, place, xerr=np.nan_to_num(ratio.reach), color="black", capsize=2, linewidth=1)
    axis.axvline(BOUND, color="black", linewidth=1, linestyle="--", label=f"bound, {BOUND:g}")
    axis.set_axisbelow(True)
    axis.set_yticks(range(len(present)), [family for family, _ in present])
    axis.invert_yaxis()
    axis.set_xlim(1.0, 1.0 + 1.35 * (axis.get_xlim()[1] - 1.0))  # room for the legend
    axis.set_xlabel("squared error / Kalman filter's (1: the optimum)")
    axis.set_title("Excess over the optimum, by the rows that it comes from")
    axis.legend(loc="lower right")


def draw_gates(axis: Any, cells: Sequence[Result]) -> None:
    """Rows by levels, the mean over seeds written in; what is missing to 1 is held."""
    gates = np.mean([cell.more["gates"] for cell in cells], 0)
    levels, lives = list(cells[0].more["rates"]), cells[0].more["known"]
    half_lives = [np.median([cell.more["level_half_lives"][name][0] for cell in cells]) for name in levels]
    axis.imshow(gates, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, level in np.ndindex(gates.shape):
        ink = "white" if gates[row, level] > 0.6 else "black"
        axis.text(level, row, f"{gates[row, level]:.2f}", ha="center", va="center", color=ink)
    names = [f"{name}\nhalf-life {float(f'{life:.2g}'):,.0f}" for name, life in zip(levels, half_lives, strict=True)]
    axis.set_xticks(range(len(levels)), names)
    axis.set_xlabel("level, and the half-life that it learned (tokens)")
    axis.set_yticks(range(len(lives)), [shown_life(life) for life in lives])
    axis.set_ylabel("half-life of the output row (tokens)")
    agreement = metric(cells, "rank_correlation")
    axis.set_title(f"Gates of the {ROUTED}; rank correlation {agreement.mean:.2f}")
    axis.grid(visible=False)


def claims(rows: Sequence[Result]) -> list[Claim]:
    """What must hold."""
    routed, alone = learner(rows, ROUTED), learner(rows, "three levels")
    ratio, agreement = metric(routed, "ratio").mean, [row.metrics.get("rank_correlation") for row in routed]
    worst = min((value for value in agreement if value is not None), default=math.nan)
    best = min(metric(learner(rows, family), "ratio").mean for family in ("tuned rate", "rate of each row"))
    return [
        Claim(f"{ROUTED}: error / optimum", ratio, BOUND, at_most=True),
        Claim(f"{ROUTED}: rank correlation, worst seed", worst, 0.9),
        Claim("excess of three levels without a router / with", (metric(alone, "ratio").mean - 1) / (ratio - 1), 1.5),
        Claim("excess of the best rates of normalised LMS / routed", (best - 1) / (ratio - 1), 2.0),
    ]


def options(parser: argparse.ArgumentParser) -> None:
    """The study's own options."""
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="cells at once, a thread each (default 2)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the cells of an earlier run's folder")


def main() -> int:
    """Runs the cells, reports; the exit code is the verdict's."""
    if str(ROOT) not in sys.path:  # where the cells' function is found, also by their processes
        sys.path.append(str(ROOT))
    study = open_study("timescale_ablation", "Which parameters learn at which timescale?", seeds=5, options=options)
    chosen = study.options
    plan = plan_ablation(CONFIG, SMOKE if study.smoke else [f"seeds={list(study.seeds)}"])
    with ablation_bar() as show:
        rows = run_ablation(plan, (chosen.resume or study.folder) / "ablation", chosen.workers, show)
    for row in rows:
        if row.status != "done":
            print(f"{row.cell}, seed {row.seed}: {row.status}" + (f": {row.message}" if row.status == "failed" else ""))
    tables(study, rows)
    figure(rows, study.folder / "timescales.png")
    return study.verdict(claims(rows))


if __name__ == "__main__":
    sys.exit(main())
