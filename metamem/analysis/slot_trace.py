"""What slot memories did with one sequence, token by token, as heat maps: where they wrote and read, what was used."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from metamem.config import UserError
from metamem.memory.slots.slot_memory import SlotMemory

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

Trace = Mapping[str, Tensor]  # name -> [time, …]
MARK = "trace."
PANEL = 3.2  # inches
BY_SLOT = ("write_weights", "read_weights", "usage", "accessed", "precedence")


@contextmanager
def tracing(model: nn.Module) -> Iterator[None]:
    """Within it, all slot memories of a model trace what they do."""
    memories = [module for module in model.modules() if isinstance(module, SlotMemory)]
    before = [memory.options for memory in memories]
    for memory in memories:
        memory.options = dataclasses.replace(memory.options, trace=True)
    try:
        yield
    finally:
        for memory, options in zip(memories, before, strict=True):
            memory.options = options


@torch.no_grad()
def traces(model: nn.Module, inputs: Shaped[Tensor, "batch time *dims"]) -> dict[str, dict[str, Tensor]]:
    """Of each slot memory, by its path, what it traced on the first sequence of a batch. Raises UserError for none."""
    with tracing(model):
        aux = model(inputs[:1]).aux
    found: dict[str, dict[str, Tensor]] = {}
    for name, values in aux.items():
        memory, mark, what = name.rpartition(MARK)
        if mark:
            found.setdefault(memory.rstrip(".") or "memory", {})[what] = values[0]
    if not found:
        raise UserError("the model has no memory of slots (dnc, ntm, sam, …) to trace")
    return found


def trace_figure(trace: Trace, path: Path, title: str) -> None:
    """A PNG: the weights and usage of slots over time, a panel a head; memory and links after the last token. Slots
    after the last one that was ever read or written are left out."""
    used = _used(trace)
    panels = [*_over_time(trace, used), *_at_the_end(trace, used)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1.5 * PANEL * columns, PANEL * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, values, across, down) in zip(axes.flat, panels, strict=False):
        _heat_map(axis, name, values, across, down)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


Panel = tuple[str, Tensor, str, str]  # its title, [down, across], and what these are


def _used(trace: Trace) -> int:
    weights = torch.cat([trace[name].flatten(0, -2) for name in ("write_weights", "read_weights") if name in trace])
    touched = weights.ne(0).any(0).nonzero()
    return 1 + int(touched.max()) if touched.numel() else weights.shape[-1]


def _over_time(trace: Trace, used: int) -> Iterator[Panel]:
    for name in (name for name in BY_SLOT if name in trace):
        values, label = trace[name].float(), name.replace("_", " ")
        heads = values.unsqueeze(1) if values.ndim == 2 else values
        for head in range(heads.shape[1]):
            number = f", head {head + 1}" if heads.shape[1] > 1 else ""
            yield f"{label}{number}", heads[:, head, :used].mT, "token", "slot"


def _at_the_end(trace: Trace, used: int) -> Iterator[Panel]:
    if "memory" in trace:
        yield "memory after the last token", trace["memory"][-1, :used].float(), "feature", "slot"
    for head, links in enumerate(trace["links"][-1].float() if "links" in trace else []):
        number = f", head {head + 1}" if trace["links"].shape[1] > 1 else ""
        yield f"links after the last token{number}", links[:used, :used], "after slot", "slot"


def _heat_map(axis: Axes, name: str, values: Tensor, across: str, down: str) -> None:
    signed = bool((values < 0).any())
    most = float(values.abs().max()) or 1.0
    image = axis.imshow(
        values.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r" if signed else "viridis",
        vmin=-most if signed else 0.0,
        vmax=most,
    )
    axis.set_title(name)
    axis.set_xlabel(across)
    axis.set_ylabel(down)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    axis.figure.colorbar(image, ax=axis)
