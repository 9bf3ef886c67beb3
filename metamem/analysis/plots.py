"""Figures, each written as a PNG that stands by itself: labels, units, legend."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

Curves = Mapping[str, np.ndarray]  # method -> values, [seeds, tokens or settings]
MARKERS = "os^vDPX<>*hd"
COLUMNS = 3


def stream_figure(streams: Mapping[str, Curves], path: Path, title: str, window: int = 8192) -> None:
    """Bits per byte along each stream, a panel a stream, a line a method: a running mean over `window` bytes, with
    a band of ± one standard deviation over seeds. Streams of one row have one scale, those of several their own."""
    columns = min(len(streams), COLUMNS)
    rows = math.ceil(len(streams) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.2 * columns, 4.2 * rows), sharey=rows == 1, squeeze=False, layout="constrained"
    )
    for unused in axes.flat[len(streams) :]:
        unused.set_axis_off()
    for axis, (name, curves) in zip(axes.flat, streams.items(), strict=False):
        for index, (method, bits) in enumerate(curves.items()):
            running = np.stack([_running_mean(row, min(window, len(row))) for row in bits])
            at = (np.arange(running.shape[1]) + min(window, bits.shape[1])) / 1024
            mean, spread = running.mean(0), running.std(0)
            (line,) = axis.plot(at, mean, label=method, color=f"C{index}", linewidth=1.6)
            if len(bits) > 1:
                axis.fill_between(at, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_title(name)
        axis.set_xlabel("read so far (KiB)")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel(f"bits per byte (mean of the last {window // 1024} KiB)")
    figure.suptitle(title)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def accuracy_figure(
    panels: Mapping[str, Curves],
    at: Sequence[int],
    path: Path,
    title: str,
    label: str,
    apart: Collection[str] = (),
) -> None:
    """Accuracy over a number on a logarithmic axis, a panel a setting, a line a method ([seeds, numbers]), with a band
    of ± one standard deviation over seeds; the methods `apart` are black and dashed."""
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 5.2), sharey=True, squeeze=False, layout="constrained"
    )
    colors = pyplot.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
        for index, (method, values) in enumerate(curves.items()):
            mean, spread = values.mean(0), values.std(0)
            style = {"color": "black", "linestyle": "--"} if method in apart else {"color": colors[index % 20]}
            axis.plot(
                at, mean, label=method, marker=MARKERS[index % len(MARKERS)], linewidth=1.6, markersize=6, **style
            )
            if len(values) > 1:
                axis.fill_between(at, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [str(number) for number in at])
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy")
    figure.suptitle(title)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    total = np.cumsum(np.concatenate([[0.0], values]))
    return (total[window:] - total[:-window]) / window
