"""Figures, each written as a PNG that stands by itself: labels, units, legend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

Curves = Mapping[str, np.ndarray]  # method -> bits per token, [seeds, tokens]


def stream_figure(streams: Mapping[str, Curves], path: Path, title: str, window: int = 8192) -> None:
    """Bits per byte along each stream, a panel a stream, a line a method: a running mean over `window` bytes, with
    a band of ± one standard deviation over seeds."""
    figure, axes = pyplot.subplots(
        1, len(streams), figsize=(5.2 * len(streams), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, curves) in zip(axes[0], streams.items(), strict=True):
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
    axes[0, 0].set_ylabel(f"bits per byte (mean of the last {window // 1024} KiB)")
    figure.suptitle(title)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    total = np.cumsum(np.concatenate([[0.0], values]))
    return (total[window:] - total[:-window]) / window
