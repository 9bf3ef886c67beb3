"""Studies and benchmarks: one command line, one form of result, one verdict.

study = open_study("quickstart", "What it shows.", seeds=1)     # --smoke --seeds N --json FILE
study.add("bits per byte, tyn", 1.91, "bits/byte", against="reset", ratio=0.86)
study.table(headings, rows)                                     # printed, and runs/<name>/table.md
sys.exit(study.verdict([Claim("adapting over reset", 0.14, 0.10)]))
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from metamem.training.run_folder import new_folder


@dataclass(frozen=True)
class Row:
    """One measured figure; `ratio` is value over that of `against`."""

    what: str
    value: float
    unit: str
    against: str | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Claim:
    """What must hold: `value` at least `bound` (at most, where `at_most`)."""

    what: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        """Whether the value keeps its bound; a value that is no number keeps none."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        return f"{self.what} {self.value:.3g} ({'≤' if self.at_most else '≥'} {self.bound:g})"


@dataclass
class Study:
    """A study that runs: its options, its folder under runs/, its rows."""

    name: str
    folder: Path
    options: argparse.Namespace
    rows: list[Row] = field(default_factory=list)

    @property
    def smoke(self) -> bool:
        """Whether to run small: under a minute, on the same code path."""
        return self.options.smoke

    @property
    def seeds(self) -> range:
        """The seeds to run."""
        return range(self.options.seeds)

    def add(self, what: str, value: float, unit: str, against: str | None = None, ratio: float | None = None) -> None:
        """One row more."""
        self.rows.append(Row(what, value, unit, against, ratio))

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table and keeps it as `table.md`, after those before it."""
        shown = Table(title=title)
        for index, heading in enumerate(headings):
            shown.add_column(heading, justify="right" if index else "left")
        for row in rows:
            shown.add_row(*row)
        (Console() if sys.stdout.isatty() else Console(width=140)).print(shown)
        lines = [f"**{title}**", "", "| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        with (self.folder / "table.md").open("a") as file:
            file.write("\n".join(lines) + "\n\n")

    def verdict(self, claims: Sequence[Claim]) -> int:
        """Writes the rows, prints the verdict as the last line, gives the exit code: 1 where a claim falls short.

        A smoke run shows that everything runs; its figures decide nothing.
        """
        rows = "".join(json.dumps(asdict(row)) + "\n" for row in self.rows)
        (self.folder / "rows.jsonl").write_text(rows)
        if self.options.json is not None:
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            self.options.json.write_text(rows)
        short = [claim for claim in claims if not claim.holds]
        word = "SMOKE (figures of a small run decide nothing)" if self.smoke else "SHORT" if short else "PASS"
        print(f"results in {self.folder}")
        print(f"{word}: " + "; ".join(f"{claim}{'' if claim.holds else ' short'}" for claim in claims), flush=True)
        return 1 if short and not self.smoke else 0


def open_study(
    name: str,
    description: str,
    seeds: int = 1,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
    root: Path = Path("runs"),
) -> Study:
    """Parses the command line that all studies share, and makes a new folder `runs/<name>` (or `<name>-2`, …)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="a small run of under a minute, on the same code path")
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help=f"how many seeds (default {seeds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there, one JSON object a line")
    if options is not None:
        options(parser)
    parsed = parser.parse_args()
    if parsed.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {parsed.seeds}")
    return Study(name, new_folder(root, f"{name}-smoke" if parsed.smoke else name), parsed)
