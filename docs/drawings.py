"""The drawings of the concepts page and of the front page, as SVG: `python docs/drawings.py`.

- `idea.svg`      one sequence, the levels that learn along it, what each moves and by which loss
- `kernels.svg`   A[t, s], how much of the write at s a read at t sees, as the engine computes it, for four settings
- `signals.svg`   where the error at each layer comes from
- `router.svg`    the gates of a router over levels, token by token
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from losses.recall import mse
from metamem import FastWeights, RouterConfig, TokenLevel

HERE = Path(__file__).resolve().parent
BLUE, ORANGE, GREEN, PURPLE, INK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#2b2b2b"
STYLE = {"font.family": "DejaVu Sans", "font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "metamem"}
TOKENS = 24


def idea() -> Figure:
    """Lanes of levels under a sequence; an arrow goes from where a level fires to what it moves."""
    lanes = [
        ("surprise", "token, every 1", "recall error", "fast weights", BLUE, 1),
        ("gist", "token, every 8", "recall error", "fast weights", GREEN, 8),
        ("stream", "inner, every 12", "next token", "any parameters", ORANGE, 12),
        ("task", "outer step", "next token", "slow weights", PURPLE, TOKENS),
    ]
    figure = Figure(figsize=(9.4, 3.5), layout="constrained")
    axis = figure.subplots()
    for index in range(TOKENS):
        axis.add_patch(FancyBboxPatch((index + 0.12, 4.25), 0.76, 0.5, "round,pad=0.02", fc="#eeeeee", ec=INK, lw=0.6))
    axis.text(-0.4, 4.5, "a sequence", ha="right", va="center")
    for row, (name, clock, loss, moved, color, period) in enumerate(lanes):
        y = 3.3 - row
        axis.plot([0, TOKENS], [y, y], color=color, alpha=0.25, lw=1)
        for start in range(0, TOKENS, period):
            axis.fill_between([start + 0.05, start + period - 0.05], y - 0.28, y + 0.28, color=color, alpha=0.16, lw=0)
            axis.plot(start + period - 0.1, y, marker="v", color=color, ms=6)
        axis.text(-0.4, y, f"{name}\n", ha="right", va="center", color=color, weight="bold", linespacing=1.0)
        axis.text(-0.4, y - 0.02, f"\n{clock}", ha="right", va="center", color=INK, fontsize=8.5, linespacing=1.0)
        axis.add_patch(
            FancyArrowPatch((TOKENS + 0.2, y), (TOKENS + 1.5, y), arrowstyle="-|>", mutation_scale=11, color=color)
        )
        axis.text(TOKENS + 1.7, y, f"{moved}\n", ha="left", va="center", color=color, weight="bold", linespacing=1.0)
        axis.text(TOKENS + 1.7, y - 0.02, f"\nby the {loss}", ha="left", va="center", fontsize=8.5, linespacing=1.0)
    axis.set_xlim(-6.6, TOKENS + 8.6)
    axis.set_ylim(-0.5, 5)
    axis.axis("off")
    return figure


@torch.no_grad()
def kernel(**settings: float | int | str) -> torch.Tensor:
    """A[t, s] of a linear memory: what is read at t of a one written at s, keys and queries alike, by writing ones."""
    level = TokenLevel("level", {mse: 1.0}, lr=1.0, signal="hebbian", **settings)  # pyright: ignore[reportArgumentType]
    memory = FastWeights(3, [level], heads=1, d_key=1, d_value=1, initial="zero", projections="none", chunk=8)
    reads = []
    for written in range(TOKENS):
        x = torch.ones(1, TOKENS, 3)  # query, key, value
        x[..., 2] = 0
        x[:, written, 2] = 1
        reads.append(memory(x).y[0, :, 0])
    return torch.stack(reads, 1)


def kernels() -> Figure:
    """Heat maps of A."""
    panels = {
        "period 1": {},
        "period 8: late by up to 8": {"period": 8},
        "forget 0.15": {"forget": 0.15},
        "momentum 0.8, forget 0.15": {"momentum": 0.8, "forget": 0.15},
    }
    figure = Figure(figsize=(10.4, 2.8), layout="constrained")
    for axis, (name, settings) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        seen = kernel(**settings)
        axis.imshow(seen / seen.max(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("written at s")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.axes[0].set_ylabel("read at t")
    return figure


def signals() -> Figure:
    """Two layers of a memory network, and three ways to their errors."""
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    for axis, name in zip(figure.subplots(1, 3), ("backprop", "predicted_targets", "hebbian"), strict=True):
        layers = [(1.6, "$z$")] if name == "hebbian" else [(1.6, "$z^1$"), (3.4, "$z^2$")]
        axis.set_title(name, fontsize=10)
        for x, label in [(0.0, "key"), *layers]:
            axis.add_patch(FancyBboxPatch((x - 0.4, 0.6), 0.8, 0.8, "round,pad=0.04", fc="#eef4fa", ec=BLUE))
            axis.text(x, 1.0, label, ha="center", va="center")
        for (start, _), (end, _) in zip([(0.0, ""), *layers], layers, strict=False):
            _arrow(axis, (start + 0.5, 1.0), (end - 0.5, 1.0), INK)
        last = layers[-1][0]
        axis.text(last + 0.9, 2.5, "value", color=ORANGE, ha="center", va="center")
        if name == "backprop":
            _arrow(axis, (last + 0.6, 2.35), (last + 0.1, 1.55), ORANGE)
            _arrow(axis, (last - 0.3, 1.6), (1.75, 1.6), ORANGE, bend=0.35)
            axis.text(1.2, 2.55, r"$\delta^2 W^{2\top} \odot \varphi'$", color=ORANGE, ha="center", fontsize=9)
        elif name == "predicted_targets":
            for x, _ in layers:
                _arrow(axis, (last + 0.5, 2.5), (x + 0.05, 1.55), ORANGE, bend=0.15)
            axis.text(1.5, 2.75, r"$z^l - v P^l$, each layer its own", color=ORANGE, ha="center", fontsize=9)
        else:
            _arrow(axis, (last + 0.6, 2.35), (last + 0.1, 1.55), ORANGE)
            axis.text(0.6, 2.5, r"$\delta = -v$", color=ORANGE, ha="center", fontsize=9)
        axis.set_xlim(-0.7, 5)
        axis.set_ylim(0.2, 3.2)
        axis.axis("off")
    return figure


def _arrow(axis, start: tuple[float, float], end: tuple[float, float], color: str, bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "connectionstyle": f"arc3,rad={bend}"}
    axis.add_patch(FancyArrowPatch(start, end, color=color, lw=1.3, **style))


@torch.no_grad()
def router() -> Figure:
    """Gates of three kinds over two levels, of a memory that was drawn at random; what they leave, it holds."""
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    kinds = {"dense": RouterConfig("dense"), "topk, k 1": RouterConfig("topk", k=1), "binary": RouterConfig("binary")}
    levels = [TokenLevel("fast", {mse: 1.0}, lr=0.1), TokenLevel("slow", {mse: 1.0}, lr=0.1, period=8)]
    for axis, (name, config) in zip(figure.subplots(1, 3), kinds.items(), strict=True):
        torch.manual_seed(3)
        memory = FastWeights(8, levels, heads=1, chunk=8, router=config)
        assert memory.router is not None
        for parameter in memory.router.parameters():
            parameter.copy_(1.5 * torch.randn_like(parameter))
        torch.manual_seed(5)
        gates = memory(torch.randn(1, TOKENS, 8)).aux["router.gates"][0, :, 0]
        axis.imshow(gates.T, cmap="Greens", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_yticks(range(len(levels)), [level.name for level in levels])
        axis.set_xticks([])
        axis.set_xlabel("token")
        axis.set_title(name, fontsize=10)
    return figure


def main() -> None:
    """Writes them all."""
    for draw in (idea, kernels, signals, router):
        with rc_context(STYLE):
            draw().savefig(HERE / f"{draw.__name__}.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
