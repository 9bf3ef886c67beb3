"""How many faults metamem was put to, and how many it survived.

    make reliability                # or: python experiments/reliability.py [--smoke] [--only "kill -9"]

Each row of `FAULTS` is a function of (count, folder, seed) that tries a fault so many times and gives how often it was
tried and how often survived: what was gone on with comes to the bits of what nothing interrupted, or one line says what
is wrong and nothing good is lost.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from metamem.analysis import Claim, open_study


@dataclass(frozen=True)
class Fault:
    """A fault, `module:function` of experiments/, how often it is tried, and how often in a smoke run."""

    name: str
    function: str
    count: int
    smoke: int

    def run(self, smoke: bool, seed: int) -> tuple[int, int]:
        """How often it was tried, and how often survived."""
        module, _, function = self.function.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            attempt = getattr(importlib.import_module(f"experiments.{module}"), function)
            return attempt(self.smoke if smoke else self.count, Path(folder), seed)


FAULTS = (
    Fault("kill -9 in a training", "kills:training", 20, 2),
    Fault("kill -9 in a meta-training over tasks", "kills:episodes", 20, 1),
    Fault("kill -9 in a session", "kills:adapting", 20, 1),
    Fault("kill -9 in a sweep", "kills:sweeping", 5, 1),
    Fault("kill -9 of workers of a Ray cluster", "cluster_kills:workers", 10, 1),
    Fault("a full disk", "faults:full_disk", 20, 2),
    Fault("a damaged checkpoint", "faults:damaged_checkpoints", 300, 20),
    Fault("a rate that diverges", "faults:diverging", 20, 2),
    Fault("damaged data", "faults:damaged_data", 20, 5),
    Fault("a damaged config", "fuzz_configs:damaged", 2000, 20),
    Fault("a damaged file", "fuzz_files:damaged", 1000, 20),
    Fault("a pickle in the place of a file", "fuzz_files:pickled", 1, 1),
)


def options(parser: argparse.ArgumentParser) -> None:
    """What this study has beside what all have."""
    parser.add_argument("--only", default="", metavar="WORDS", help="only the faults with these words in their name")


def main() -> int:
    """Tries all faults, prints the counts and the verdict."""
    study = open_study("reliability", "How many faults metamem was put to, and how many it survived.", options=options)
    torch.set_num_threads(1)
    rows, totals = [], [0, 0]
    for fault in FAULTS:
        if study.options.only not in fault.name:
            continue
        tried, survived = map(sum, zip(*(fault.run(study.smoke, seed) for seed in study.seeds), strict=True))
        print(f"{fault.name}: {survived} of {tried} survived", flush=True)
        study.add(fault.name, survived, "survived", "tried", survived / tried)
        rows.append([fault.name, str(tried), str(survived)])
        totals = [totals[0] + tried, totals[1] + survived]
    study.table("faults", ["fault", "tried", "survived"], [*rows, ["all", *map(str, totals)]])
    claims = [Claim("faults tried", totals[0], 1), Claim("not survived", totals[0] - totals[1], 0, at_most=True)]
    code = study.verdict(claims)
    return code or int(totals[0] != totals[1])  # a fault is a fault, in a smoke run too


if __name__ == "__main__":
    sys.exit(main())
