"""Speed of slot memories: a training step of the DNC beside its peer's, and of SAM at 1,024 and 65,536 slots.

DNC: input 8, an LSTM of width 128, 32 slots of 16 numbers, 2 and 4 read heads, batch 16 and 32, 20 tokens, one thread;
forward, a mean square of the output, backward.

    dnc 1.1.0     the peer (an extra: `make bench` installs it)
    LSTM alone    the controller without a memory: what no memory goes below
    eager         `memory_cell` around `dnc`
    compiled      the same, `compile_step`: five tokens are one graph

SAM: input and width 128, slots of 16 numbers, 4 read heads of 4 slots, batch 16, 20 tokens, from a fresh state, as each
training step has it. Memory is what the process grew by at its peak; beyond the slots, less the state. Beside it, not
claimed, the same on a state of which all slots are in use: there an exact search goes through all of them at every
token, and the gradient of the memory takes a buffer of its size.

Every configuration has a process of its own, in which contenders take turns, `--rounds` times around, in seconds of the
process itself; the best of each counts, as a shared machine only ever slows things down.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metamem.analysis import Claim, Study, open_study
from metamem.controllers import LSTM
from metamem.memory.cell import MemoryCell
from metamem.memory.slots import DNC, SAM, DNCOptions, SparseOptions
from metamem.state import State, state_bytes

INPUT, HIDDEN, SLOTS, WORD, TOKENS = 8, 128, 32, 16, 20
DNCS = [(heads, batch) for heads in (2, 4) for batch in (16, 32)]
SAMS = (1024, 65_536)
SAM_BATCH, SAM_HEADS = 16, 4
PEER = "dnc 1.1.0"
FASTER, SLOWER, LARGER = 3.0, 4.0, 1.2
Step = Callable[[], None]


class LSTMAlone(nn.Module):
    """An LSTM cell in a loop, its input as wide as with reads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(INPUT + heads * WORD, HIDDEN)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(len(x), HIDDEN)
        read, outputs = x.new_zeros(len(x), self.heads * WORD), []
        for now in x.unbind(1):
            hidden, cell = self.cell(torch.cat([now, read], 1), (hidden, cell))
            outputs.append(hidden)
        return torch.stack(outputs, 1)


def ours(heads: int, compiled: bool) -> MemoryCell:
    """The DNC as a controller and its memory."""
    memory = DNC(HIDDEN, DNCOptions(slots=SLOTS, word=WORD, read_heads=heads, clip=20.0))
    controller = LSTM(INPUT + heads * WORD, HIDDEN, project=False)
    return MemoryCell(INPUT, controller, {"memory": memory}, compile_step=compiled)


def peer(heads: int) -> nn.Module:
    """The peer's, of the same sizes."""
    import dnc  # pyright: ignore[reportMissingImports]

    return dnc.DNC(
        input_size=INPUT,
        hidden_size=HIDDEN,
        num_layers=1,
        num_hidden_layers=1,
        nr_cells=SLOTS,
        cell_size=WORD,
        read_heads=heads,
    )


def training_step(module: nn.Module, x: Tensor) -> Step:
    """Forward and backward, from the state that a module starts with."""

    def step() -> None:
        module.zero_grad()
        y = module(x)
        (y if isinstance(y, Tensor) else y[0]).square().mean().backward()

    return step


def measure_dnc(heads: int, batch: int, rounds: int) -> dict[str, float]:
    """The best seconds of each contender, after steps that warm up and compile."""
    x = torch.randn(batch, TOKENS, INPUT)
    modules = {PEER: peer(heads), "LSTM alone": LSTMAlone(heads)}
    modules |= {name: ours(heads, name == "compiled") for name in ("eager", "compiled")}
    steps = {name: training_step(module, x) for name, module in modules.items()}
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(-2, rounds):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if turn >= 0:
                best[name] = min(best[name], time.process_time() - started)
    return best


def filled(memory: SAM) -> State:
    """A state of which all slots are in use."""
    state, slots = memory.init_state(SAM_BATCH), memory.options.slots
    accessed = torch.stack([1 + torch.randperm(slots) for _ in range(SAM_BATCH)]).int()
    time_now, touched = torch.full_like(state["time"], slots), torch.full_like(state["touched"], slots)
    memory_now = torch.randn(SAM_BATCH, slots, WORD)
    return {**state, "memory": memory_now, "accessed": accessed, "time": time_now, "touched": touched}


def measure_sam(slots: int, full: bool, rounds: int) -> dict[str, float]:
    """The best seconds of a training step; MiB that the process grew by, and of the state."""
    memory = SAM(HIDDEN, SparseOptions(slots=slots, word=WORD, read_heads=SAM_HEADS))
    x = torch.randn(SAM_BATCH, TOKENS, HIDDEN)
    state = filled(memory) if full else None
    before, best, size = _peak(), float("inf"), 0
    for turn in range(-2, rounds):
        started = time.process_time()
        memory.zero_grad()
        out = memory(x, state)
        out.y.square().mean().backward()
        if turn >= 0:
            best = min(best, time.process_time() - started)
        size = state_bytes(out.state)
        del out
    return {"seconds": best, "peak": _peak() - before, "state": size / 2**20}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(study: Study, **spec: Any) -> dict[str, float]:
    """What one configuration gives, measured in a process of its own."""
    print(f"\r{spec!s:100}", end="\r")
    given = json.dumps({**spec, "rounds": 1 if study.smoke else study.options.rounds})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--one", given], capture_output=True, text=True, check=False, env=environment
    )
    print(" " * 100, end="\r")
    if done.returncode:
        sys.exit(f"{spec}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def one(spec: dict[str, Any]) -> dict[str, float]:
    """One configuration, in this process."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measure = {"dnc": measure_dnc, "sam": measure_sam}[spec.pop("of")]
    return measure(**spec)


def report_dnc(study: Study) -> list[Claim]:
    """The table of the DNC, and what the issue asks for."""
    claims, rows = [], []
    for heads, batch in DNCS[:1] if study.smoke else DNCS:
        best = in_a_process(study, of="dnc", heads=heads, batch=batch)
        place = f"{heads} read heads, batch {batch}"
        for name, seconds in best.items():
            times = best[PEER] / seconds
            study.add(f"{name}, {place}", 1000 * seconds, "ms", PEER, seconds / best[PEER])
            rows.append([f"{name}, {place}", f"{1000 * seconds:.1f}", f"{times:.2f}"])
        ratio = best[PEER] / min(best["eager"], best["compiled"])
        claims.append(Claim(f"DNC, {place}: times as fast as {PEER}", ratio, FASTER))
    study.table(f"A training step of the DNC, {TOKENS} tokens", ["", "ms", f"times {PEER}"], rows)
    return claims


def report_sam(study: Study) -> list[Claim]:
    """The table of SAM, and what the issue asks for."""
    found = {
        (slots, full): in_a_process(study, of="sam", slots=slots, full=full) for full in (False, True) for slots in SAMS
    }
    rows = []
    for (slots, full), values in found.items():
        name = f"{slots:,} slots{', all in use' if full else ''}"
        beyond = values["peak"] - values["state"]
        study.add(f"SAM, {name}", 1000 * values["seconds"], "ms")
        study.add(f"SAM, {name}, memory beyond the state", beyond, "MiB")
        cells = [1000 * values["seconds"], values["peak"], values["state"], beyond]
        rows.append([name, *(f"{cell:.1f}" for cell in cells)])
    for full in (False, True):
        few, many = (found[slots, full] for slots in SAMS)
        times = many["seconds"] / few["seconds"]
        growth = (many["peak"] - many["state"]) / (few["peak"] - few["state"])
        rows.append([f"the many / the few{', all in use' if full else ''}", f"{times:.2f}", "", "", f"{growth:.2f}"])
        if full:
            study.add(f"SAM, {SAMS[1]:,} slots, all in use, seconds", times, "times", f"{SAMS[0]:,} slots", times)
            study.add(f"SAM, {SAMS[1]:,} slots, all in use, memory", growth, "times", f"{SAMS[0]:,} slots", growth)
    study.table("A training step of SAM", ["", "ms", "peak, MiB", "state, MiB", "beyond the state, MiB"], rows)
    few, many = (found[slots, False] for slots in SAMS)
    growth = (many["peak"] - many["state"]) / (few["peak"] - few["state"])
    what = f"SAM, {SAMS[1]:,} slots / {SAMS[0]:,} slots"
    return [
        Claim(f"{what}: seconds of a training step", many["seconds"] / few["seconds"], SLOWER, at_most=True),
        Claim(f"{what}: memory beyond the slots", growth, LARGER, at_most=True),
    ]


def options(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each contender; the best counts")


def main() -> int:
    """Measures in one run; the exit code is the verdict's."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(json.loads(sys.argv[2]))))
        return 0
    study = open_study("benchmark-slots", "Training steps of slot memories.", options=options)
    return study.verdict([*report_sam(study), *report_dnc(study)])


if __name__ == "__main__":
    sys.exit(main())
