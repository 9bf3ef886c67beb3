"""Copy: which memories learn an algorithm, and not a length.

Every row is trained to copy 1 to 8 vectors of 8 bits, and tested on those and on 16, 32 and 64. Short copies are no
test: an LSTM learns them too. What tells is whether a length that was never trained is copied without an error.

Each cell (row, seed) is a training of `--steps` updates in a process of its own. Printed, a seed beside the other: the
sequences that it took to come to 0.01 bits at every length from 1 to 8 (> what it had, where it never did), the bits
that are left at the worst of these lengths, the share of sequences copied without an error at 16, 32 and 64, and
minutes. Figure: bits per sequence along training, a line a seed.

A memory has no weights for its slots: it is trained with a slot for every token of its longest sequence, and tested
with more, one for every token of that. With fewer it would overwrite: a DNC goes on writing while it recalls, since
nothing in its training told it not to. The DNC is there twice: as released, with an LSTM; and as it copies lengths that
it was never trained on, with a controller that cannot count steps, gates that are nearly decisions, sharpened links
(Csordás and Schmidhuber 2019), slots that stay in use, and content addressing among the two most similar slots, which
is not diluted by more of them. Budget: 2,000 updates of 32 sequences a cell, which are one to four minutes on one
thread of a desktop CPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot

from experiments.memory_rows import ROWS, Row, cell_of, run_cells, run_folder
from metamem import build, build_task, load_run
from metamem.analysis import Claim, Study, open_study
from metamem.analysis.plan import Cell
from metamem.analysis.results import Result

NAME = "copy_task"
EXAMPLES = 64  # sequences of each length that is tested
SOLVED = 0.01  # bits per sequence
BATCH, RATE = 32, 3e-3
OBJECTIVE = "hierarchy.levels.task.objective={losses.outer.bits: 1.0}"
SLOTS = ("dnc", "ntm", "sam", "sdnc")
RELEASED = replace(ROWS["DNC"], name="DNC, LSTM")
LONG = (
    'vars.controller={kind: feed_forward, dim: "${vars.dim}"}',
    "vars.memory.gate=steep_sigmoid",
    "vars.memory.sharp_links=true",
    "vars.memory.freeing=false",
    "vars.memory.top_k=2",
)
COPIERS = {"DNC": replace(ROWS["DNC"], overrides=(*ROWS["DNC"].overrides, *LONG)), RELEASED.name: RELEASED}
COPIERS |= {name: row for name, row in ROWS.items() if name != "DNC"}


@dataclass(frozen=True)
class Lengths:
    """What is trained, and what is tested beyond it."""

    longest: int
    beyond: tuple[int, ...]

    @property
    def trained(self) -> range:
        """The lengths that are trained."""
        return range(1, self.longest + 1)


def room(length: int) -> int:
    """Slots for every token of a copy, and a few: in eights."""
    return 8 * (tokens(length) // 8 + 1)


def tokens(length: int) -> int:
    """Of a copy: it is shown and told, each with a mark before it."""
    return 2 * length + 2


WHOLE, SMALL = Lengths(8, (16, 32, 64)), Lengths(2, (3, 4))


def cell(row: Row, seed: int, steps: int, every: int, lengths: Lengths) -> Cell:
    """A row's training, in which the lengths that are trained are measured."""
    return _cell(row, seed, steps, every, lengths, lengths.trained[:-1], room(lengths.longest))


def exam(of: Cell, row: Row, lengths: Lengths) -> dict[str, float]:
    """What a trained cell makes of the lengths beyond, where it has a slot for every token of the longest."""
    steps = of.config.training.steps
    larger = _cell(row, of.seed, steps, steps, lengths, lengths.beyond, room(max(lengths.beyond)))
    model, task = build(larger.config).eval(), build_task(larger.config)
    model.load_state_dict(load_run(run_folder(NAME, of))[0].state_dict())
    with torch.no_grad():
        return task.evaluate(lambda inputs, targets: model(inputs).y)


def _cell(row: Row, seed: int, steps: int, every: int, lengths: Lengths, tested: Sequence[int], slots: int) -> Cell:
    overrides = [
        OBJECTIVE,
        f"task.lengths=[1, {lengths.longest}]",
        f"task.tested={list(tested)}",
        f"task.examples={EXAMPLES}",
        f"training.length={tokens(lengths.longest)}",
        f"training.batch={BATCH}",
        f"hierarchy.levels.task.optimizer.lr={RATE}",
        "training.schedule=cosine",
        f"training.steps={steps}",
        f"training.evaluate_every={every}",
    ]
    if row.preset in SLOTS:
        overrides.append(f"vars.memory.slots={slots}")
    return cell_of(row, "numbers", "copy", overrides, seed)


@dataclass(frozen=True)
class Summary:
    """What a cell came to: sequences seen at its first evaluation with at most 0.01 bits at every length that is
    trained (None: at none), the bits left at the worst of them, exact copies of each length beyond, minutes."""

    sequences: int | None
    bits: float
    exact: dict[int, float]
    minutes: float


def summary(result: Result, examined: Mapping[str, float], lengths: Lengths) -> Summary:
    """Of what was measured in a cell's training, and of its exam; one that did not finish solved nothing."""
    if result.status != "done":
        return Summary(None, float("inf"), dict.fromkeys(lengths.beyond, 0.0), result.cost.get("seconds", 0.0) / 60)
    steps, worst = worst_bits(result, lengths)
    first = next((step for step, bits in zip(steps, worst, strict=True) if bits <= SOLVED), None)
    exact = {length: examined[f"exact/length-{length}"] for length in lengths.beyond}
    return Summary(None if first is None else BATCH * first, worst[-1], exact, result.cost["seconds"] / 60)


def worst_bits(result: Result, lengths: Lengths) -> tuple[list[int], list[float]]:
    """Updates at which was evaluated, and the bits at the worst of the trained lengths."""
    curves = [result.curves[f"bits/length-{length}"] for length in lengths.trained]
    return curves[0]["x"], [max(values) for values in zip(*(curve["y"] for curve in curves), strict=True)]


def tables(study: Study, found: dict[str, list[Summary]], lengths: Lengths, steps: int) -> None:
    """A line a row, its seeds side by side."""
    lines = []
    for name, cells in found.items():
        seen = [f"> {BATCH * steps:,}" if one.sequences is None else f"{one.sequences:,}" for one in cells]
        exact = [" · ".join(f"{100 * one.exact[length]:.0f}" for one in cells) for length in lengths.beyond]
        bits = " · ".join(f"{one.bits:.2g}" for one in cells)
        lines.append([name, " · ".join(seen), bits, *exact, f"{statistics.fmean(one.minutes for one in cells):.1f}"])
        for one in cells:
            study.add(f"{name}, bits per sequence", one.bits, "bits")
            study.add(f"{name}, sequences to {SOLVED} bits", one.sequences or float("inf"), "sequences")
            for length, share in one.exact.items():
                study.add(f"{name}, exact at {length}", share, "share")
    headings = [
        "",
        f"sequences to {SOLVED} bits",
        "bits left",
        *(f"exact at {n}, %" for n in lengths.beyond),
        "minutes",
    ]
    solved = sum(one.sequences is not None for cells in found.values() for one in cells)
    every = sum(map(len, found.values()))
    title = f"Copy of 1 to {lengths.longest} vectors, a seed beside the other; solved: {solved} of {every} cells"
    study.table(title, headings, lines)


def figure(path: Path, runs: dict[str, list[Result]], lengths: Lengths) -> None:
    """Bits at the worst of the trained lengths, a line a seed, a colour a row; unsolved seeds are dashed."""
    matplotlib.use("Agg")
    panel, axis = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    for index, (name, cells) in enumerate(runs.items()):
        for number, result in enumerate(one for one in cells if one.status == "done"):
            steps, worst = worst_bits(result, lengths)
            style = "-" if min(worst) <= SOLVED else "--"
            label = name if number == 0 else None
            seen = [BATCH * step for step in steps]
            axis.plot(seen, [max(bits, 1e-5) for bits in worst], style, color=f"C{index}", linewidth=1.4, label=label)
    axis.axhline(SOLVED, color="grey", linestyle=":", linewidth=1)
    axis.set_yscale("log")
    axis.set_xlabel("sequences seen")
    axis.set_ylabel(f"bits per sequence, worst of lengths 1 to {lengths.longest}")
    axis.set_title("Copy: a line a seed; dashed where it never came to 0.01 bits")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    panel.savefig(path, dpi=130)
    pyplot.close(panel)


def claims(found: dict[str, list[Summary]], lengths: Lengths) -> list[Claim]:
    """What must hold of the DNC: short copies by every seed, and by the median seed copies of lengths never trained."""
    if "DNC" not in found:
        return []
    cells = found["DNC"]
    short = Claim("DNC, bits at the worst length, worst seed", max(one.bits for one in cells), SOLVED, at_most=True)
    return [
        short,
        *(
            Claim(f"DNC, exact at {length}, median seed", statistics.median(one.exact[length] for one in cells), 0.99)
            for length in lengths.beyond
        ),
    ]


def options(parser: argparse.ArgumentParser) -> None:
    """The study's own options."""
    parser.add_argument("--steps", type=int, default=2000, help="updates of a cell")
    parser.add_argument("--every", type=int, default=250, help="updates from one evaluation to the next")
    parser.add_argument("--processes", type=int, default=2, help="cells trained at once, a thread each")
    parser.add_argument("--rows", nargs="+", choices=COPIERS, default=list(COPIERS), metavar="ROW", help="which rows")


def main() -> int:
    """Trains the cells that are not there yet, then reports on all."""
    study = open_study(NAME, "Memories on copy.", seeds=5, options=options)
    chosen, lengths = study.options, SMALL if study.smoke else WHOLE
    steps, every = (6, 3) if study.smoke else (chosen.steps, chosen.every)
    cells = {name: [cell(COPIERS[name], seed, steps, every, lengths) for seed in study.seeds] for name in chosen.rows}
    runs = run_cells(NAME, cells, chosen.processes)
    found: dict[str, list[Summary]] = {name: [] for name in runs}
    for name, row in runs.items():
        for of, result in zip(cells[name], row, strict=True):
            examined = exam(of, COPIERS[name], lengths) if result.status == "done" else {}
            found[name].append(summary(result, examined, lengths))
    tables(study, found, lengths, steps)
    figure(study.folder / "learning.png", runs, lengths)
    return study.verdict(claims(found, lengths))


if __name__ == "__main__":
    sys.exit(main())
