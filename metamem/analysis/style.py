"""How figures look: Okabe and Ito's colours, which colour-blind readers tell apart, and ink that follows the page."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure as Drawing

# Okabe and Ito (2008) without black and yellow: all of these show on white and on black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS, LINES = "osD^vP", ("-", "--", ":", "-.")
INK = "#2b2b2b"
PANEL = (3.7, 2.8)  # inches
ZOOM = 1.35  # of a figure on a page that is wide enough for it

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.7,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "path",
    **{
        key: INK
        for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    },
}


@contextmanager
def panels(
    count: int, columns: int = 3, size: tuple[float, float] = PANEL, **settings: Any
) -> Iterator[tuple[Drawing, list]]:
    """A drawing with `count` panels, at most `columns` in a row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    with rc_context(_STYLE):
        drawing = Drawing(figsize=(columns * size[0], rows * size[1]), layout="constrained")
        axes = drawing.subplots(rows, columns, squeeze=False, **settings)
        for spare in axes.flat[count:]:
            spare.remove()
        yield drawing, list(axes.flat[:count])


def look(index: int) -> dict[str, Any]:
    """Colour, marker and line of the index-th curve: told apart by more than the colour."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(COLORS) % len(LINES)],
    }


def legend(drawing: Drawing, axes: Sequence[Any]) -> None:
    """One legend below all panels, each label once."""
    found = [axis.get_legend_handles_labels() for axis in axes]
    pairs = itertools.chain.from_iterable(zip(labels, handles, strict=True) for handles, labels in found)
    labelled = dict(pairs)
    if labelled:
        longest = max(len(label) for label in labelled)
        columns = min(len(labelled), max(1, int(drawing.get_figwidth() * 13 / (longest + 7))))
        drawing.set_figheight(drawing.get_figheight() + 0.18 * -(-len(labelled) // columns))
        drawing.legend(labelled.values(), labelled.keys(), loc="outside lower left", ncols=columns)


def png(drawing: Drawing, title: str = "") -> bytes:
    """The drawing on white, under a title."""
    file = io.BytesIO()
    with rc_context(_STYLE):
        if title:
            drawing.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        drawing.savefig(file, format="png", dpi=160, facecolor="white")
    return file.getvalue()


def svg(drawing: Drawing, name: str) -> str:
    """The drawing as an element of a page: no ground of its own, ink in the colour of the page's text, ids that no
    other figure has."""
    file = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for reference in ('id="', 'href="#', "url(#"):
        text = text.replace(reference, f"{reference}{name}-")
    width = f'style="max-width: {ZOOM * drawing.get_figwidth():.1f}in" '
    return text.replace("<svg ", f"<svg {width}", 1).replace(INK, "currentColor")
