"""Figures of timescales: what levels hold and how they move, where a router sends writes, how long all of it lasts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import NullFormatter

from metamem.analysis.figures import INTERVAL, Figure, band
from metamem.analysis.groups import Group
from metamem.analysis.spectrum import ALL, Decay, fit_half_life
from metamem.analysis.statistics import interval
from metamem.analysis.style import look, panels

MOST_PANELS = 6
NORMS = {"delta": "‖Δ‖", "update": "move of Δ since the point before"}


def level_norms(groups: Sequence[Group]) -> Figure | None:
    """‖Δ‖ of every level along a sequence, and how far it moves."""
    groups = [group for group in groups if group.curves("delta/")]
    shown, table = choose(groups), []
    if not shown:
        return None
    with panels(2 * len(shown), columns=len(shown) if len(shown) <= 3 else 3) as (drawing, axes):
        order = _stacked(len(shown))
        for (index, kind), axis in zip(order, axes, strict=True):
            group, name = shown[index], list(NORMS)[kind]
            for number, (level, label, tokens, values) in enumerate(group.level_curves(f"{name}/")):
                at = [interval(column.tolist()) for column in values.T]
                band(axis, tokens, at, label, number, marker="")
                table += [
                    {"cell": group.name, "level": level, "what": name, "token": int(t), "mean": one.mean}
                    | {"95 % reach": one.reach, "seeds": one.count}
                    for t, one in zip(tokens, at, strict=True)
                ]
            axis.set_title(group.name)
            axis.set_xlabel("token")
            axis.set_ylabel(NORMS[name])
            axis.set_ylim(bottom=0)
            axis.legend(loc="best")
    caption = (
        "What each level has added to the fast weights (norm over all of a memory's weights, mean over sequences) and "
        f"how far it moved between two points, on a batch after training. {INTERVAL}{_left_out(groups)}"
    )
    return Figure("levels-along-a-sequence", "‖Δ‖ and updates of each level", caption, drawing, table)


def gates(groups: Sequence[Group]) -> Figure | None:
    """A router's gates over time, parameter group × level."""
    groups = [group for group in groups if group.curves("gates/")]
    shown, table = choose(groups), []
    if not shown:
        return None
    rows = max(len(_gate_rows(group)[0]) for group in shown)
    size = (4.6, min(9.0, 1.3 + 0.2 * rows))
    with panels(len(shown), columns=2, size=size) as (drawing, axes):
        images = []
        for axis, group in zip(axes, shown, strict=True):
            labels, tokens, values = _gate_rows(group)
            edges = np.concatenate([[0], tokens])
            rows = np.arange(len(labels) + 1)
            images.append(axis.pcolormesh(edges, rows, values, vmin=0, vmax=1, cmap="cividis"))
            axis.set_yticks(np.arange(len(labels)) + 0.5, labels)
            axis.invert_yaxis()
            axis.grid(False)
            axis.set_title(group.name)
            axis.set_xlabel("token")
            table += [
                {"cell": group.name, "gate": label, "token": int(token), "mean": float(value)}
                for label, row in zip(labels, values, strict=True)
                for token, value in zip(tokens, row, strict=True)
            ]
        drawing.colorbar(images[0], ax=axes, label="gate, mean over sequences and seeds", shrink=0.8)
    caption = (
        "What share of a write the router lets through into each level's component of each parameter group, along a "
        f"batch of sequences after training.{_left_out(groups)}"
    )
    return Figure("gates", "Gates over time, group × level", caption, drawing, table)


def spectra(groups: Sequence[Group]) -> Figure | None:
    """The memory spectrum of each level, with the half-life fitted to it."""
    groups = [group for group in groups if group.curves("spectrum/")]
    shown, table = choose(groups), []
    if not shown:
        return None
    with panels(len(shown)) as (drawing, axes):
        for axis, group in zip(axes, shown, strict=True):
            for number, (level, label, lags, values) in enumerate(group.level_curves("spectrum/")):
                mean = values.mean(0)
                fit = level_half_life(group, level)
                style = look(number)
                if level.endswith(f"/{ALL}"):
                    style |= {"color": "#9a9a9a", "marker": "", "linewidth": 5, "alpha": 0.55, "zorder": 1}
                if (mean > 0).any():
                    axis.plot(lags, np.where(mean > 0, mean, np.nan), label=f"{label}: {_life(fit)}", **style)
                table += [
                    {
                        "cell": group.name,
                        "level": level,
                        "lag": int(lag),
                        "mean": float(value),
                        "half-life": fit.half_life,
                    }
                    | {"explained": fit.explained, "seeds": len(values)}
                    for lag, value in zip(lags, mean, strict=True)
                ]
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(group.name)
            axis.set_xlabel("lag τ (tokens)")
            axis.set_ylabel("S(τ), size of ∂y$_t$ / ∂x$_{t-τ}$")
            axis.legend(loc="best")
    caption = (
        "The memory spectrum: the root mean square over t of ‖∂y_t / ∂x_{t−τ}‖, by autograd with random probes, of "
        "what each memory reads of a batch; of a level, along the path through its component alone; grey: along all. "
        "Legend: the half-life of the exponential through it, from the level's period on, by least squares of log S."
        f"{_left_out(groups)}"
    )
    return Figure("spectrum", "Memory spectrum", caption, drawing, table)


def level_half_life(group: Group, level: str) -> Decay:
    """The half-life of `<memory>/<level>`, of the spectrum that is the mean over seeds."""
    name = f"spectrum/{level}"
    curve = group.curve(name)
    if curve is None:
        return Decay(math.nan, math.nan, math.nan)
    period = next(row.curves[name].get("period", 1) for row in group.done if name in row.curves)
    return fit_half_life(curve[0].tolist(), curve[1].mean(0).tolist(), period)


def _life(fit: Decay) -> str:
    if math.isnan(fit.half_life):
        return "no decay to fit"
    return "does not decay" if math.isinf(fit.half_life) else f"{fit.half_life:.3g} tokens"


def _gate_rows(group: Group) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Labels, tokens, and the gates [row, token], a row for each group and level."""
    labels, rows, tokens = [], [], np.zeros(0)
    for _, label, at, values in group.level_curves("gates/"):  # values: [seeds, tokens, groups]
        tokens = at
        for index, row in enumerate(values.mean(0).T):
            labels.append(f"{label} · group {index}")
            rows.append(row)
    return labels, tokens, np.array(rows)


def _stacked(count: int) -> list[tuple[int, int]]:
    """(group, kind of norm) panel by panel, row by row: the norms of a group one above the other."""
    columns = count if count <= 3 else 3
    pairs = []
    for start in range(0, count, columns):
        here = range(start, min(start + columns, count))
        pairs += [(index, kind) for kind in range(2) for index in here]
    return pairs


def choose(groups: Sequence[Group]) -> list[Group]:
    """At most as many groups as there are panels for, none of which came to the same computation: those with more
    levels than others, then from all over the list."""
    distinct = list({group.done[0].fingerprint: group for group in reversed(groups)}.values())[::-1]
    levels = [len(group.curves("delta/")) for group in distinct]
    rich = [group for group, count in zip(distinct, levels, strict=True) if count > min(levels)][:MOST_PANELS]
    others = [group for group in distinct if group not in rich]
    count = min(MOST_PANELS - len(rich), len(others))
    chosen = [*rich, *(others[index * len(others) // count] for index in range(count))]
    return [group for group in distinct if group in chosen]


def _left_out(groups: Sequence[Group]) -> str:
    shown = len(choose(groups))
    return f" {shown} of {len(groups)} cells." if shown < len(groups) else ""
