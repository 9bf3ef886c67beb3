"""A drawing of a network: modules as boxes, nested ones in the box that holds them; beside an edge how wide is what
passes along it, dashed what goes back to the next token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve
from torch import nn

from metamem.analysis.layout import Box, Layout, layout
from metamem.analysis.module_graph import Graph, graph_of

LETTER, LINE = 6.4, 13.0  # points: about the width of a letter of 9 points, the height of a line
PADDING, TITLE = 14.0, 24.0
BACK = 34.0  # room at the right side for an edge that goes back
FILLS = ("#ffffff", "#f1f4f8", "#e3e9f1", "#d4dde9")  # of boxes, by how deep they are
MOVE, STRAIGHT, CURVED = int(Curve.MOVETO), int(Curve.LINETO), int(Curve.CURVE4)
LINE_COLOR, TEXT_COLOR = "#44546a", "#1f2a3a"


def draw_network(network: nn.Module, name: str, path: Path) -> None:
    """The drawing of a network, as SVG, PNG or PDF by the path's suffix."""
    drawn = graph_of(name, network)
    width, height = size(drawn)
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "metamem", "font.size": 9}):
        figure = pyplot.figure(figsize=((width + 2 * PADDING) / 72, (height + 2 * PADDING) / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(-PADDING, width + PADDING)
        axes.set_ylim(height + PADDING, -PADDING)
        axes.axis("off")
        _draw(axes, drawn, Box(width / 2, height / 2, width, height), 0)
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def size(drawn: Graph) -> tuple[float, float]:
    """Width and height of a node."""
    words = max(len(drawn.name), len(drawn.kind)) * LETTER
    if drawn.nodes:
        placed = _layout(drawn)
        back = BACK if any(edge.back for edge in drawn.edges) else 0.0
        title = (len(drawn.name) + len(drawn.kind) + 2) * LETTER
        return max(placed.width + back, title) + 2 * PADDING, placed.height + TITLE + 2 * PADDING
    if not drawn.name or not drawn.kind:  # a junction, or an end: one line
        return max(words + 10, 20.0), LINE + 7
    return words + 2 * PADDING, 2 * LINE + 12


def _layout(drawn: Graph) -> Layout:
    edges = [(edge.source, edge.target) for edge in drawn.edges if not edge.back]
    return layout({key: size(node) for key, node in drawn.nodes.items()}, list(dict.fromkeys(edges)))


def _draw(axes: Axes, drawn: Graph, box: Box, depth: int) -> None:
    if not drawn.nodes:
        _leaf(axes, drawn, box)
        return
    _frame(axes, box, FILLS[min(depth, len(FILLS) - 1)], 10.0)
    title = f"{drawn.name}  {drawn.kind}" if drawn.name else drawn.kind
    style: dict[str, Any] = {"color": TEXT_COLOR, "va": "center"}
    axes.text(box.left + PADDING, box.top + TITLE / 2 + 2, title, weight="bold", **style)
    placed = _layout(drawn)
    back = BACK if any(edge.back for edge in drawn.edges) else 0.0
    left, top = box.x - (placed.width + back) / 2, box.top + TITLE + PADDING

    def moved(one: Box) -> Box:
        return Box(one.x + left, one.y + top, one.width, one.height)

    boxes = {key: moved(one) for key, one in placed.nodes.items()}
    for edge in drawn.edges:
        dim = "" if edge.dim is None else str(edge.dim)
        if edge.back:
            _back(axes, boxes[edge.source], boxes[edge.target], left + placed.width + BACK / 2, dim)
        else:
            stops = [boxes[edge.source], *(moved(one) for one in placed.passes[edge.source, edge.target])]
            start, end = placed.bands[edge.source][1] + top, placed.bands[edge.target][0] + top
            _edge(axes, [*stops, boxes[edge.target]], start, end, dim)
    for key, node in drawn.nodes.items():
        _draw(axes, node, boxes[key], depth + 1)


def _leaf(axes: Axes, drawn: Graph, box: Box) -> None:
    centred: dict[str, Any] = {"ha": "center", "va": "center", "color": TEXT_COLOR}
    if drawn.name and drawn.kind:
        _frame(axes, box, "#ffffff", 4.0)
        axes.text(box.x, box.y - LINE / 2, drawn.name, weight="bold", **centred)
        axes.text(box.x, box.y + LINE / 2, drawn.kind, **centred)
        return
    _frame(axes, box, "#fdf6e3" if drawn.kind else "#ffffff", box.height / 2)
    axes.text(box.x, box.y, drawn.kind or drawn.name, style="normal" if drawn.kind else "italic", **centred)


def _frame(axes: Axes, box: Box, fill: str, rounding: float) -> None:
    style = f"round,pad=0,rounding_size={rounding}"
    corner = (box.left, box.top)
    axes.add_patch(
        FancyBboxPatch(corner, box.width, box.height, style, facecolor=fill, edgecolor=LINE_COLOR, linewidth=1.0)
    )


def _edge(axes: Axes, stops: Sequence[Box], start: float, end: float, dim: str) -> None:
    """From the lower side of the first box to the upper side of the last, across between layers and straight down
    within them; `start` and `end`: where the first one's layer ends, and the last one's begins."""
    first, last = stops[0], stops[-1]
    lower = [start, *(box.bottom for box in stops[1:-1])]
    upper = [*(box.top for box in stops[1:-1]), end]
    points, codes = [(first.x, first.bottom), (first.x, start)], [MOVE, STRAIGHT]
    for (one, other), left, entered in zip(pairwise(stops), lower, upper, strict=True):
        middle = (left + entered) / 2
        points += [(one.x, middle), (other.x, middle), (other.x, entered)]
        codes += [CURVED] * 3
        points.append((other.x, last.top if other is last else other.bottom))
        codes.append(STRAIGHT)
    _line(axes, points, codes)
    _arrow(axes, last.x, last.top)
    _width(axes, 0.3 * stops[-2].x + 0.7 * last.x, lower[-1] + 0.62 * (end - lower[-1]), dim)


def _back(axes: Axes, source: Box, target: Box, right: float, dim: str) -> None:
    points = [(source.right, source.y), (right, source.y), (right, target.y), (target.right, target.y)]
    _line(axes, points, [MOVE, *[STRAIGHT] * 3], "--")
    arrow = {"arrowstyle": "-|>", "color": LINE_COLOR, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (target.right, target.y), (target.right + 8, target.y), arrowprops=arrow)
    _width(axes, right, (source.y + target.y) / 2, dim)


def _line(axes: Axes, points: Sequence[tuple[float, float]], codes: Sequence[int], style: str = "-") -> None:
    axes.add_patch(PathPatch(Curve(points, codes), fill=False, edgecolor=LINE_COLOR, linewidth=1.0, linestyle=style))


def _arrow(axes: Axes, x: float, y: float) -> None:
    arrow = {"arrowstyle": "-|>", "color": LINE_COLOR, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, y), (x, y - 5), arrowprops=arrow)


def _width(axes: Axes, x: float, y: float, dim: str) -> None:
    plate = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    if dim:
        axes.text(x, y, dim, fontsize=7.5, color=LINE_COLOR, ha="center", va="center", bbox=plate)
