"""The figure of a search: how good its points were, in the order in which they were chosen and against each key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from metamem.analysis.figures import Figure, scale
from metamem.analysis.groups import Group, optimum
from metamem.analysis.plan import short_names
from metamem.analysis.style import COLORS, INK, legend, panels
from metamem.config.ablation import SEARCH


def search(groups: Sequence[Group], goals: dict[str, str]) -> Figure | None:
    """The points of searches, of which `goals` says what they did with which metric: metric -> minimise or maximise."""
    groups = [group for group in groups if group.family == SEARCH and group.done]
    goals = {metric: goal for metric, goal in goals.items() if any(group.metric(metric).count for group in groups)}
    if not goals:
        return None
    metric, goal = next(iter(goals.items()))
    points = [(int(group.name.split()[1]), group, group.metric(metric).mean) for group in groups]
    points = sorted((point for point in points if not math.isnan(point[2])), key=lambda point: point[0])
    keys = [key for key, value in groups[0].factors.items() if isinstance(value, int | float) and value is not True]
    short = short_names(list(groups[0].factors))
    with panels(1 + len(keys), sharey=True) as (drawing, axes):
        _order(axes[0], [number for number, *_ in points], [mean for *_, mean in points], goal)
        for axis, key in zip(axes[1:], keys, strict=True):
            values = [group.factors[key] for _, group, _ in points]
            axis.plot(values, [mean for *_, mean in points], "o", color=COLORS[0], markersize=4, alpha=0.7)
            axis.set_xlabel(short[key])
            scale(axis, values, ticks=False)
        for axis in axes:
            if (least := optimum(groups, metric)) is not None:
                axis.axhline(least, color=INK, linewidth=1.1, linestyle=(0, (5, 2)), label="Bayes optimum")
        axes[0].set_ylabel(metric)
        legend(drawing, axes)
    caption = (
        f"A search that did {goal} {metric}: its points in the order in which they were chosen, with the best so far, "
        "and against each key that is a number. A point is the mean over seeds."
    )
    table: list[dict[str, Any]] = [
        {"trial": number, **{short[key]: value for key, value in group.factors.items()}, metric: mean}
        for number, group, mean in points
    ]
    return Figure("search", "The points of the search", caption, drawing, table)


def _order(axis: Any, numbers: Sequence[int], means: Sequence[float], goal: str) -> None:
    axis.plot(numbers, means, "o", color=COLORS[0], markersize=4, alpha=0.7, label="a point")
    axis.step(
        numbers,
        list(accumulate(means, min if goal == "minimise" else max)),
        where="post",
        color=COLORS[1],
        label="best",
    )
    axis.set_xlabel("trial")
