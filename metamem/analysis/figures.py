"""Figures of what cells come to: quality against a factor, which level carries which gain, cost, learning curves.

Each is a drawing, a caption that says what is seen and how it was measured, and a table of all numbers in it; None
where the rows have nothing to draw. Bands and bars are 95 % intervals of the mean over seeds (Student's t).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from metamem.analysis.groups import Group, costs_of, optimum
from metamem.analysis.plan import LEVELS, short_names, value_text
from metamem.analysis.statistics import Interval, interval
from metamem.analysis.style import COLORS, INK, PANEL, legend, look, panels

COSTS = {
    "training_flops": "operations of the training (FLOP)",
    "flops": "operations (FLOP)",
    "training_seconds": "training (s)",
    "seconds": "the cell, all in all (s)",
    "state_bytes": "state of one sequence (bytes)",
}
INTERVAL = "Bands and bars: 95 % intervals of the mean over seeds (Student's t)."
MOST_LINES, MOST_CELLS = 12, 40


@dataclass(frozen=True)
class Figure:
    """A drawing that stands by itself; `name` names its files, `table` holds its numbers, a row a point."""

    name: str
    title: str
    caption: str
    drawing: Drawing
    table: list[dict[str, Any]]


def numeric_factors(groups: Sequence[Group]) -> list[str]:
    """The factors that are numbers, and of which some family has several; not one that goes with another before it."""
    keys = dict.fromkeys(key for group in groups for key, value in group.factors.items() if _is_number(value))
    several = [key for key in keys if any(len({x for x, _ in line}) > 1 for line in _lines(groups, key).values())]
    return [key for i, key in enumerate(several) if not any(_follows(groups, key, other) for other in several[:i])]


def quality(groups: Sequence[Group], metrics: Sequence[str], factor: str) -> Figure:
    """The metrics against a factor, a line for each family and value of its other factors."""
    short = short_names([factor])[factor]
    lines = {name: line for name, line in _lines(groups, factor).items() if len(line) > 1}
    shown = [group for line in lines.values() for _, group in line]
    metrics = [name for name in metrics if any(group.metric(name).count for group in shown)] or metrics[:1]
    table = []
    with panels(len(metrics), sharex=True) as (drawing, axes):
        for axis, metric in zip(axes, metrics, strict=True):
            for index, (name, line) in enumerate(lines.items()):
                points = [(x, group.metric(metric)) for x, group in line]
                points = [(x, at) for x, at in points if at.count]
                if points:
                    band(axis, [x for x, _ in points], [at for _, at in points], name, index)
                table += [{"line": name, short: x, "metric": metric, **_row(at)} for x, at in points]
            _optimum(axis, optimum(groups, metric))
            axis.set_ylabel(metric)
            axis.set_xlabel(short)
            scale(axis, [x for line in lines.values() for x, _ in line])
        legend(drawing, axes)
    caption = f"{', '.join(metrics)} at the end, against {factor}. {INTERVAL}{_optimum_caption(groups, metrics)}"
    return Figure(f"quality-{short.replace('.', '-')}", f"Quality against {short}", caption, drawing, table)


def attribution(groups: Sequence[Group], metrics: Sequence[str]) -> Figure | None:
    """Which level carries which gain: all levels, all but one, one alone."""
    groups = [group for group in groups if LEVELS in group.factors and group.done]
    if not groups:
        return None
    labels = [_without(group, LEVELS) + group.factors[LEVELS] for group in groups]
    table = []
    with panels(len(metrics), size=(PANEL[0], 1.3 + 0.3 * len(groups)), sharey=True) as (drawing, axes):
        for axis, metric in zip(axes, metrics, strict=True):
            for index, group in enumerate(groups):
                at, kind = group.metric(metric), group.factors[LEVELS].split()[0]
                color = COLORS[("all", "without", "only").index(kind)]
                if at.count:
                    _dot(axis, at, index, color)
                gain = _gain(group, groups, metric)
                table.append({"cell": group.name, "metric": metric, **_row(at), **_row(gain, "difference to all")})
                if kind == "all" and at.count:
                    axis.axvline(at.mean, color=color, linewidth=0.9, linestyle=":")
            _optimum(axis, optimum(groups, metric), upright=True)
            axis.set_xlabel(metric)
        _names(axes[0], labels)
        legend(drawing, axes)
    caption = (
        "All fast levels, all but one (what a level gives that no other does: leave one out), and one alone (what it "
        f"gives by itself: add one in). The table has the differences, seed by seed. {INTERVAL}"
    )
    return Figure("levels", "Which level carries which gain", caption, drawing, table)


def overview(groups: Sequence[Group], metrics: Sequence[str]) -> Figure | None:
    """All cells side by side."""
    groups = [group for group in groups if group.done][:MOST_CELLS]
    if len(groups) < 2:
        return None
    families, table = list(dict.fromkeys(group.family for group in groups)), []
    with panels(len(metrics), size=(PANEL[0], 1.2 + 0.24 * len(groups)), sharey=True) as (drawing, axes):
        for axis, metric in zip(axes, metrics, strict=True):
            for index, group in enumerate(groups):
                at = group.metric(metric)
                if at.count:
                    _dot(axis, at, index, COLORS[families.index(group.family) % len(COLORS)])
                table.append({"cell": group.name, "metric": metric, **_row(at)})
            _optimum(axis, optimum(groups, metric), upright=True)
            axis.set_xlabel(metric)
        _names(axes[0], [group.name for group in groups])
        legend(drawing, axes)
    caption = f"Every cell, a colour a family. {INTERVAL}{_optimum_caption(groups, metrics)}"
    return Figure("cells", "All cells", caption, drawing, table)


def cost(groups: Sequence[Group], metric: str) -> Figure | None:
    """Cost against quality: operations, seconds, bytes."""
    groups = [group for group in groups if group.metric(metric).count]
    there = costs_of(groups, COSTS)
    if "training_flops" in there:
        there.pop("flops", None)
    if "training_seconds" in there:
        there.pop("seconds", None)
    if not there:
        return None
    table, families = [], list(dict.fromkeys(group.family for group in groups))
    with panels(len(there), sharey=True) as (drawing, axes):
        for axis, (name, label) in zip(axes, there.items(), strict=True):
            for group in groups:
                at, paid = group.metric(metric), group.cost(name)
                if not paid.count:
                    continue
                style = look(families.index(group.family)) | {"linestyle": "none"}
                bars = {"yerr": _reach(at), "xerr": _reach(paid), "elinewidth": 0.9, "capsize": 2}
                axis.errorbar([paid.mean], [at.mean], label=group.family, **bars, **style)
                table.append({"cell": group.name, "cost": name, **_row(paid, "cost"), "metric": metric, **_row(at)})
            _optimum(axis, optimum(groups, metric))
            axis.set_xlabel(label)
            scale(axis, [group.cost(name).mean for group in groups if group.cost(name).count], ticks=False)
        axes[0].set_ylabel(metric)
        legend(drawing, axes)
    caption = (
        f"What {metric} costs, a point a cell. Operations are those of matrix products, forward and backward, counted "
        f"on one batch; seconds are of one thread. {INTERVAL}{_optimum_caption(groups, [metric])}"
    )
    return Figure("cost", "Cost against quality", caption, drawing, table)


def learning(groups: Sequence[Group]) -> Figure | None:
    """Losses along training."""
    names = list(dict.fromkeys(f"loss/{name}" for group in groups for name in group.curves("loss/")))
    groups = [group for group in groups if group.curves("loss/")][:MOST_LINES]
    if not names or all(len(curve[0]) < 2 for group in groups for name in names if (curve := group.curve(name))):
        return None
    table = []
    with panels(len(names)) as (drawing, axes):
        for axis, name in zip(axes, names, strict=True):
            for index, group in enumerate(groups):
                if (curve := group.curve(name)) is None:
                    continue
                steps, values = curve
                at = [interval(column.tolist()) for column in values.T]
                band(axis, steps, at, group.name, index, marker="")
                table += [
                    {"cell": group.name, "level": name.removeprefix("loss/"), "step": int(step), **_row(mean)}
                    for step, mean in zip(steps, at, strict=True)
                ]
            axis.set_title(f"level {name.removeprefix('loss/')}")
            axis.set_xlabel("outer step")
            axis.set_ylabel("loss per token")
            low, high = _extremes([row for row in table if row["level"] == name.removeprefix("loss/")])
            if low > 0 and high / low > 30:
                axis.set_yscale("log")
        legend(drawing, axes)
    caption = f"The loss of each outer level on its training batches. {INTERVAL}"
    return Figure("learning", "Learning curves", caption, drawing, table)


# ----------------------------------------------------------------------------------------------------------- parts


def _lines(groups: Sequence[Group], factor: str) -> dict[str, list[tuple[float, Group]]]:
    """Family, with the values of its other factors -> (value, group), in the order of the value. A factor that goes
    with this one, a value of its own for each, names no line."""
    lines: dict[str, list[tuple[float, Group]]] = {}
    for group in groups:
        if group.done and _is_number(group.factors.get(factor)):
            own = [one for one in groups if one.family == group.family and factor in one.factors]
            kept = {key: value for key, value in group.factors.items() if not _goes_with(own, key, factor)}
            name = group.family + _without(replace(group, factors=kept), factor, " ")
            lines.setdefault(name, []).append((group.factors[factor], group))
    return {name: sorted(line, key=lambda point: point[0]) for name, line in lines.items()}


def _follows(groups: Sequence[Group], other: str, factor: str) -> bool:
    """Whether a factor goes with another in every family that has it."""
    families = {group.family for group in groups if other in group.factors}
    members = [[one for one in groups if one.family == family] for family in families]
    return all(factor in own[0].factors and _goes_with(own, other, factor) for own in members)


def _goes_with(groups: Sequence[Group], other: str, factor: str) -> bool:
    """Whether a factor varies, and has one value for each value of another."""
    pairs = {(value_text(group.factors[factor]), value_text(group.factors.get(other))) for group in groups}
    values = {value for value, _ in pairs}
    return other != factor and len(pairs) == len(values) and len({value for _, value in pairs}) > 1


def _without(group: Group, factor: str, before: str = "") -> str:
    """The other factors of a group, in words."""
    short = short_names(list(group.factors))
    others = [f"{short[key]}={value_text(value)}" for key, value in group.factors.items() if key != factor]
    return before + " ".join(others) + (" " if others and not before else "") if others else ""


def _gain(group: Group, groups: Sequence[Group], metric: str) -> Interval:
    """The differences to the group with all levels, seed by seed."""
    others = {key: value for key, value in group.factors.items() if key != LEVELS}
    whole = next((g for g in groups if g.family == group.family and g.factors == {**others, LEVELS: "all"}), None)
    if whole is None:
        return interval([])
    by_seed = {row.seed: row.metrics.get(metric) for row in whole.done}
    pairs = [(row.metrics.get(metric), by_seed.get(row.seed)) for row in group.done]
    return interval([mine - all_of for mine, all_of in pairs if mine is not None and all_of is not None])


def band(axis: Any, x: Any, at: Sequence[Interval], label: str, index: int, **style: Any) -> None:
    """A line of means in the look of a number, and a band as wide as their intervals."""
    mean, reach = np.array([one.mean for one in at]), np.array([one.reach for one in at])
    axis.plot(x, mean, label=label, **(look(index) | style))
    if np.isfinite(reach).any():
        axis.fill_between(x, mean - reach, mean + reach, color=look(index)["color"], alpha=0.15, linewidth=0)


def _dot(axis: Any, at: Interval, row: int, color: str) -> None:
    axis.errorbar([at.mean], [row], xerr=_reach(at), color=color, marker="o", elinewidth=1.2, capsize=2.5)


def _reach(at: Interval) -> list[float] | None:
    return [at.reach] if at.count > 1 else None


def _names(axis: Any, labels: Sequence[str]) -> None:
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)


def _optimum(axis: Any, value: float | None, upright: bool = False) -> None:
    if value is not None:
        draw = axis.axvline if upright else axis.axhline
        draw(value, color=INK, linewidth=1.1, linestyle=(0, (5, 2)), label="Bayes optimum")


def _optimum_caption(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    known = any(optimum(groups, metric) is not None for metric in metrics)
    return " Dashed: the Bayes optimum." if known else ""


def scale(axis: Any, values: Sequence[float], ticks: bool = True) -> None:
    """A logarithmic axis for positive values that reach over an order of magnitude, with a tick at each of a few."""
    values = sorted(set(values))
    wide = bool(values) and values[0] > 0 and values[-1] / values[0] >= 8
    if wide:
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
    if ticks and len(values) <= 8:
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.xaxis.set_minor_locator(NullLocator())
    elif not wide:
        axis.xaxis.set_major_locator(MaxNLocator(4))


def _extremes(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    means = [row["mean"] for row in rows]
    return min(means, default=0.0), max(means, default=0.0)


def _row(at: Interval, name: str = "") -> Mapping[str, float | int]:
    before = f"{name} " if name else ""
    return {f"{before}mean": at.mean, f"{before}95 % reach": at.reach, f"{before}seeds": at.count}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
