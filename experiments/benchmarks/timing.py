"""Timing of contenders: each in a process of its own, one after the other, some rounds.

In a process the best of some calls counts, as a shared machine only ever slows things down. What is claimed is the
median over rounds of the ratio in a round, since a process may be lucky in how its memory is laid out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from metamem.analysis import Study

PASSES = ("forward", "forward+backward")
Key = tuple[str, int, bool]  # maker, tokens, compiled


def measure_module(
    module: nn.Module, batch: int, tokens: int, width: int, compiled: bool, repeats: int, device: str = "cpu"
) -> dict[str, float]:
    """Best seconds of a forward and of a forward+backward, those of the first forward+backward, which compiles, and the
    peak memory that they took, in MiB."""
    warnings.filterwarnings("ignore")
    module = module.to(device)
    run = torch.compile(module, fullgraph=True) if compiled else module
    x = torch.randn(batch, tokens, width, device=device)
    before = peak_memory(device)

    def output() -> Tensor:
        y = run(x)
        return y if isinstance(y, Tensor) else y[0]

    def forward() -> None:
        with torch.no_grad():
            output()

    def both() -> None:
        output().square().mean().backward()

    first = seconds(both, device)
    both_best, forward_best = best(both, repeats, device), best(forward, repeats, device)
    peak = (peak_memory(device) - before) / 2**20
    return {"first": first, "forward+backward": both_best, "forward": forward_best, "peak": peak}


def best(function: Callable[[], None], repeats: int, device: str = "cpu") -> float:
    """The best of some timed calls, after one that warms up. Where a compiled function compiles again at its second
    call, the best is one after it."""
    function()
    return min(seconds(function, device) for _ in range(repeats))


def seconds(function: Callable[[], None], device: str) -> float:
    """What a call takes, to the end of what it has a GPU do."""
    settle(device)
    started = time.perf_counter()
    function()
    settle(device)
    return time.perf_counter() - started


def settle(device: str) -> None:
    """Waits until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """The most bytes so far: of tensors on a GPU, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Results:
    """Seconds and MiB of every contender in every round."""

    def __init__(self, rounds: list[dict[Key, dict[str, float]]]) -> None:
        self.rounds = rounds

    def seconds(self, key: Key, what: str) -> float:
        """The median over rounds."""
        return statistics.median(one[key][what] for one in self.rounds)

    def ratio(self, key: Key, against: Key, what: str) -> float:
        """How many times faster than another: the median over rounds of the ratio in a round."""
        return statistics.median(one[against][what] / one[key][what] for one in self.rounds)

    def ratio_of_bests(self, key: Key, against: Key, what: str) -> float:
        """How many times faster the best round was than the best of another."""
        return min(one[against][what] for one in self.rounds) / min(one[key][what] for one in self.rounds)

    def peak(self, key: Key) -> float | None:
        """The largest of all rounds."""
        return max((one[key]["peak"] for one in self.rounds if "peak" in one[key]), default=None)


def run_all(study: Study, script: str, keys: Sequence[Key], environment: Mapping[str, str] | None = None) -> Results:
    """Every contender in a process of its own (`script --one SPEC` prints its figures), some rounds; `environment`:
    what is added to its variables."""
    rounds, repeats = (1, 1) if study.smoke else (study.options.rounds, study.options.repeats)
    found: list[dict[Key, dict[str, float]]] = []
    for turn in range(rounds):
        found.append({})
        for key in keys:
            name, tokens, compiled = key
            print(f"\rround {turn + 1}/{rounds}: {name} {tokens} {'compiled' if compiled else 'eager':40}", end="\r")
            spec = {"name": name, "tokens": tokens, "compiled": compiled, "repeats": repeats}
            command = [sys.executable, script, "--one", json.dumps({**spec, "device": study.options.device})]
            variables = {**os.environ, **(environment or {})}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            found[-1][key] = json.loads(done.stdout.splitlines()[-1])
    print(" " * 100, end="\r")
    return Results(found)


def table(study: Study, title: str, results: Results, keys: Sequence[Key], against: Key, batch: int) -> None:
    """Prints one table, and keeps its figures. Every contender is compared with `against`."""
    other = against[0].split(", ")[-1]
    columns = [column for what in PASSES for column in (f"{what}, tokens/s", f"× {other}", "of bests")]
    cells = []
    for key in keys:
        name = f"{key[0]}{', compiled' if key[2] else ''} ({batch} × {key[1]})"
        row = [name]
        for what in PASSES:
            speed, ratio = batch * key[1] / results.seconds(key, what), results.ratio(key, against, what)
            bests = results.ratio_of_bests(key, against, what)
            row += [f"{speed:,.0f}", f"{ratio:.2f}", f"{bests:.2f}"]
            study.add(f"{name}, {what}", speed, "tokens/s", against[0], ratio)
            study.add(f"{name}, {what}, of bests", bests, "ratio", against[0])
        if (peak := results.peak(key)) is not None:
            study.add(f"{name}, peak memory", peak, "MiB")
        cells.append([*row, "" if peak is None else f"{peak:,.0f}"])
    study.table(title, ["", *columns, "peak, MiB"], cells)


def options(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender is measured, in turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="the claims are the CPU's")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of a measurement; the best counts")
