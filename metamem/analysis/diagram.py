"""The timing diagram of a hierarchy: a lane a level, fast to slow, over stretches of a sequence and of the training."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from metamem.config import Config, LevelConfig
from metamem.config.schema import CLOCKS
from metamem.hierarchy import Calendar
from metamem.hierarchy.timing import Stretch, timing

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

COLORS = dict(zip(CLOCKS, ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#5B4B8A"), strict=True))  # Okabe and Ito 2008
CUT = "#B00020"
DENSE = 70  # ticks more than which are a band
TEXT = 58  # characters of a line beside the lanes


def timing_diagram(config: Config, calendar: Calendar, owned: Mapping[str, Sequence[str]], path: Path) -> None:
    """Writes the diagram as PNG, SVG or PDF, by the ending of the path. `owned`: outer level -> its slow weights."""
    levels, stretches = config.hierarchy.levels, timing(config, calendar)
    height = 0.92 * len(levels) + 1.5
    figure, axes = pyplot.subplots(
        1,
        1 + len(stretches),
        figsize=(4.3 + 3.6 * len(stretches), height),
        width_ratios=[4.3, *[3.6] * len(stretches)],
        squeeze=False,
        layout="constrained",
    )
    _describe(axes[0, 0], config, owned)
    for axis, stretch in zip(axes[0, 1:], stretches, strict=True):
        _draw(axis, levels, stretch)
    figure.suptitle(f"{config.name}: which level fires when", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.legend(handles=_legend(stretches), loc="outside lower right", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _describe(axis: Any, config: Config, owned: Mapping[str, Sequence[str]]) -> None:
    levels = config.hierarchy.levels
    axis.set(xlim=(0, 1), ylim=(len(levels) - 0.5, -0.5))
    axis.axis("off")
    for lane, level in enumerate(levels):
        if lane:
            axis.axhline(lane - 0.5, color="#F0F0F0", linewidth=0.8)
        axis.text(0, lane - 0.33, level.name, fontsize=10.5, fontweight="bold", color=COLORS[level.clock], va="center")
        axis.text(1, lane - 0.33, _rhythm(level), fontsize=9, ha="right", va="center", color="#333333")
        lines = [line for part in _explained(level, config, owned) for line in textwrap.wrap(part, TEXT)]
        axis.text(0, lane - 0.16, "\n".join(lines[:4]), fontsize=8, va="top", color="#333333", linespacing=1.25)


def _rhythm(level: LevelConfig) -> str:
    unit = "token" if level.clock == "inner" else level.clock
    return f"every {unit}" if level.period == 1 else f"every {level.period} {unit}s"


def _explained(level: LevelConfig, config: Config, owned: Mapping[str, Sequence[str]]) -> list[str]:
    """What the level differentiates and moves, and how far the outer gradient flows through that."""
    weights = {path: f"{weight:g} · " if weight != 1 else "" for path, weight in level.objective.items()}
    lines = ["∂ " + " + ".join(f"{weight}{path}" for path, weight in weights.items())]
    groups = ", ".join(level.groups)
    if level.outer:
        count = len(owned[level.name])
        return [*lines, f"owns {count} slow tensor{'s' * (count != 1)} of {groups}"]
    lines.append(f"moves {'fast weights' if level.clock == 'token' else 'fast copies'} of {groups}")
    if level.unroll == 0:
        return [*lines, "at inference only"]
    cuts = [f"{level.unroll} updates"] if level.unroll else []
    cuts += [f"{config.training.unroll} tokens"] if config.training.unroll else []
    return [*lines, f"outer gradient cut every {' and '.join(cuts)}" if cuts else "outer gradient through all updates"]


def _draw(axis: Any, levels: Sequence[LevelConfig], stretch: Stretch) -> None:
    axis.set(xlim=(0, stretch.length * 1.01), ylim=(len(levels) - 0.5, -0.5), xlabel=f"{stretch.unit}s")
    axis.set_title(stretch.title, fontsize=9.5)
    axis.set_yticks([])
    axis.tick_params(labelsize=8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    for lane, level in enumerate(levels):
        axis.axhline(lane, color="#DDDDDD", linewidth=0.8, zorder=0)
        if lane:
            axis.axhline(lane - 0.5, color="#F0F0F0", linewidth=0.8, zorder=0)
        if level.name in stretch.fires:
            _lane(axis, lane, level, stretch)
        elif note := _elsewhere(level, stretch):
            style: dict[str, Any] = {
                "fontsize": 8,
                "color": "#888888",
                "style": "italic",
                "ha": "center",
                "va": "center",
            }
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axis.text(stretch.length / 2, lane, note, bbox=box, **style)


def _elsewhere(level: LevelConfig, stretch: Stretch) -> str:
    """Where a level fires that has no ticks in a stretch, as far as that is no later stretch."""
    if stretch.unit == "token":
        return "between sequences"
    if not level.outer:
        return "at inference only" if level.unroll == 0 else "inside each step"
    return "at each step" if level.clock == "step" and level.period == 1 else ""


def _lane(axis: Any, lane: int, level: LevelConfig, stretch: Stretch) -> None:
    fires, color = list(stretch.fires[level.name]), COLORS[level.clock]
    start = 0
    for number, end in enumerate(fires):
        axis.barh(
            lane, end - start, left=start, height=0.34, color=color, alpha=0.16 + 0.14 * (number % 2), linewidth=0
        )
        start = end
    if start < stretch.length:
        axis.barh(lane, stretch.length - start, left=start, height=0.34, color=color, alpha=0.08, linewidth=0)
    if len(fires) > DENSE:
        axis.barh(lane, fires[-1], height=0.34, color=color, alpha=0.75, linewidth=0)
    else:
        hollow = {"linestyles": "dotted"} if level.unroll == 0 else {}
        axis.vlines(fires, lane - 0.25, lane + 0.25, color=color, linewidth=1.8, **hollow)
    axis.vlines(stretch.cuts.get(level.name, []), lane - 0.4, lane + 0.4, color=CUT, linewidth=1.3, linestyles="dashed")


def _legend(stretches: Sequence[Stretch]) -> list[Any]:
    handles: list[Any] = [
        Line2D([], [], color="#333333", marker="|", markersize=11, markeredgewidth=1.8, linestyle="", label="fires"),
        Patch(color="#333333", alpha=0.2, label="gathers for its next step"),
    ]
    if any(any(stretch.cuts.values()) for stretch in stretches):
        handles.append(Line2D([], [], color=CUT, linestyle="dashed", linewidth=1.3, label="outer gradient is cut"))
    return handles
