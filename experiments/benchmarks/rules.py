"""Speed of every preset of configs/memory on the CPU: tokens/s forward and forward+backward, peak memory, state.

Batch 4, width 256, 4 heads of 64, beside causal attention (`scaled_dot_product_attention`) of the same width and the
floor, the four projections alone; lengths 1k, 2k, 4k, 8k; eager, and at 1k compiled where small graphs serve all
chunks (`COMPILED`, by `compile_chunk`). Eager only: token signals that are solved for all chunks at once, which only a
graph of the whole call takes, unrolled over its chunks; Atlas, whose graph has a window and Newton-Schulz in it; and
CMS, a chain of three memories. They compile for a minute and more. Presets are those that are shipped, with the papers'
mini-batches where the shipped ones are for short sequences (`OVERRIDES`). The best of `REPEATS` calls counts, some
seconds of them, as what disturbs a shared machine lasts as long; of 2k and more fewer are timed (`CALLS`): each takes
as long as several of the shortest. `--lengths` takes some of the lengths alone, with what is claimed of them.

A memory's cost a token must not grow with the length, and its state must not grow at all: both lengths are timed in
turn in one process. What is claimed at 1k is the better of eager and compiled.

Contenders keep the memory that they free (`KEPT`), as with the allocators of GPUs, jemalloc and tcmalloc. Left alone,
glibc gives every tensor of more than 32 MiB back to the system, which clears its pages when it is asked for the next:
four projections alone then cost 1.3 to 1.5 times as much a token at 4 × 8192 as at 4 × 1024; kept, 1.0 to 1.2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import timing
import torch
from reference_layers import Projections, SelfAttention
from timing import PASSES, Key, Results, measure_module, run_all, seconds, table
from torch import Tensor, nn

from metamem import build, load_config
from metamem.analysis import Claim, Study, open_study
from metamem.state import leaves, state_bytes

BATCH, WIDTH, HEADS = 4, 256, 4
LENGTHS = (1024, 2048, 4096, 8192)
CLAIMED = (1024, 4096, 8192)  # lengths of which something is claimed
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# No fast weights, or token by token, as in a controller's loop (mnm.py, slots.py).
NOT_MEASURED = ("attention", "lstm", "lstm_attention", "mnm_g", "mnm_p")
NOT_MEASURED += ("dnc", "ntm", "sam", "sdnc", "episodic", "key_value", "window")
OVERRIDES = {
    "ttt_mlp": ("vars.chunk=64",),
    "titans": ("vars.chunk=64", "hierarchy.levels.surprise.rule.lr_max=0.005"),
    "atlas": ("vars.chunk=64", "vars.window=128"),
    "lact": ("vars.chunk=256",),
    "cms": ("vars.periods.fast=64", "vars.periods.middle=256", "vars.periods.slow=1024"),
}
LINEAR = ("hebbian", "delta_net", "gated_delta_net", "momentum_delta", "delta_product", "ttt_linear")
COMPILED = ("lact", "titans", "ttt_linear", "ttt_mlp")
REPEATS = 20
CALLS = {2048: 3, 4096: 3, 8192: 2}  # timed calls, at most
# preset -> what its forward+backward may take at 1k, in that of attention
BOUNDS = {"ttt_linear": 1.0, "delta_net": 1.0, "ttt_mlp": 2.0, "lact": 2.0}
TURNS = 5  # of the shortest and the longest call, beside each other
KEPT = ":".join(f"glibc.malloc.{name}={size}" for name, size in (("mmap_threshold", 2**32), ("trim_threshold", 2**34)))
GROWTH = 1.1  # of the cost a token, from the shortest length to the longest


ATTENTION_AND_FLOOR = {"projections": Projections, "attention": SelfAttention}


def presets() -> list[str]:
    """The presets that are measured."""
    names = sorted(path.stem for path in (CONFIGS / "memory").glob("*.yaml"))
    return [name for name in names if name not in NOT_MEASURED]


def memory(preset: str, compiled: bool) -> nn.Module:
    """The memory of a preset, as a network around it has it."""
    files = [CONFIGS / "memory" / f"{preset}.yaml", CONFIGS / "experiment" / "associative_recall.yaml"]
    sizes = [f"vars.dim={WIDTH}", f"vars.heads={HEADS}", "vars.blocks=1", "vars.vocabulary=64", "task.vocabulary=64"]
    sizes += ["task.pairs=[4]", "training.length=1024", *OVERRIDES.get(preset, ())]
    if compiled:
        sizes.append("vars.memory.compile_chunk=true")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{preset}.yaml"
        file.write_text(f"extends: {[str(path) for path in files]}\n")
        return build(load_config(file, sizes)).get_submodule("blocks.0.memory")


def measure(name: str, tokens: int, compiled: bool, repeats: int, device: str = "cpu") -> dict[str, float]:
    """Seconds, MiB, and the state's bytes a sequence."""
    torch.manual_seed(0)
    module = ATTENTION_AND_FLOOR[name](WIDTH) if name in ATTENTION_AND_FLOOR else memory(name, compiled)
    found = measure_module(module, BATCH, tokens, WIDTH, False, min(repeats, CALLS.get(tokens, repeats)), device)
    if name in ATTENTION_AND_FLOOR:
        return found
    with torch.no_grad():
        read = module(torch.randn(1, tokens, WIDTH, device=device))
    if not read.y.isfinite().all():
        raise ValueError(f"{name} is not finite after {tokens} tokens")
    found["state"] = state_bytes(read.state)
    if tokens == LENGTHS[-1]:
        found["growth"] = growth(module, device)
    return found


def growth(module: nn.Module, device: str) -> float:
    """The cost of a token of the longest call in that of the shortest, the best of each where they take turns. The loss
    is of the state too: what no token reads after its write is not differentiated, and a short call has more of that.
    """
    short, long = LENGTHS[0], LENGTHS[-1]
    inputs = {length: torch.randn(BATCH, length, WIDTH, device=device) for length in (short, long)}
    calls = {length: partial(learn, module, x) for length, x in inputs.items()}
    times = {length: [seconds(call, device) for _ in range(2)][1:] for length, call in calls.items()}
    for _ in range(TURNS):
        for length, call in calls.items():
            times[length] += [seconds(call, device) for _ in range(3 if length == short else 1)]
    return min(times[long]) / long / (min(times[short]) / short)


def learn(module: nn.Module, x: Tensor) -> None:
    """A forward and backward of a loss of the output and of all numbers of the state."""
    read = module(x)
    numbers = [leaf for leaf in leaves(read.state) if leaf.is_floating_point()]
    (read.y.square().mean() + sum(leaf.square().mean() for leaf in numbers)).backward()


def contenders(lengths: Sequence[int], smoke: bool) -> list[Key]:
    """In the order of the tables."""
    names = ["projections", "attention", *presets()]
    if smoke:
        return [(name, 256, False) for name in names if name in ("projections", "attention", *BOUNDS)]
    return [
        (name, length, compiled)
        for length in lengths
        for name in names
        for compiled in ([False, True] if length == LENGTHS[0] and name in COMPILED else [False])
    ]


def report(study: Study, results: Results) -> list[Claim]:
    """Prints the tables, and gives what the issue asks for."""
    found = list(results.rounds[0])
    lengths = sorted({key[1] for key in found})
    for length in lengths:
        keys = [key for key in found if key[1] == length]
        table(study, f"Presets, {length} tokens", results, keys, ("attention", length, False), BATCH)
    rows = [[name, f"{results.seconds((name, length, True), 'first'):.0f}"] for name, length, done in found if done]
    if rows:
        study.table("Seconds of the first call, which compiles", ["", "s"], rows)
    claims = time_claims(results, found, lengths[0]) if lengths[0] <= LENGTHS[0] else []
    claims += linear_claims(results, lengths)
    if LENGTHS[-1] in lengths:
        claims += growth_claims(study, results, lengths)
    return claims


def time_claims(results: Results, found: Sequence[Key], length: int) -> list[Claim]:
    """Forward+backward at the shortest length, in that of attention."""
    claims = []
    for name, bound in BOUNDS.items():
        ours = [key for key in found if key[0] == name and key[1] == length]
        time = min(results.ratio(("attention", length, False), key, PASSES[1]) for key in ours)
        claims.append(Claim(f"{name} forward+backward time / attention, {length}", time, bound, at_most=True))
    return claims


def linear_claims(results: Results, lengths: Sequence[int]) -> list[Claim]:
    """Linear memories beside attention from 4k on."""
    claims = []
    for length in (length for length in lengths if length >= 4096):
        behind = {
            name: results.ratio(("attention", length, False), (name, length, False), PASSES[1]) for name in LINEAR
        }
        slowest = max(behind, key=lambda name: behind[name])
        what = f"slowest linear memory, {slowest}: forward+backward time / attention, {length}"
        claims.append(Claim(what, behind[slowest], 1.0, at_most=True))
    return claims


def growth_claims(study: Study, results: Results, lengths: Sequence[int]) -> list[Claim]:
    """The cost a token and the state of all, from the shortest length to the longest."""
    claims, rows, growths = [], [], {}
    for name in presets():
        growth = statistics.median(one[name, lengths[-1], False]["growth"] for one in results.rounds)
        states = {int(results.rounds[0][name, length, False]["state"]) for length in lengths}
        growths[name] = growth
        what = f"{name}, cost a token at {lengths[-1]} / at {LENGTHS[0]}"
        study.add(what, growth, "ratio", f"{name} at {LENGTHS[0]}")
        study.add(f"{name}, state", max(states), "bytes a sequence")
        rows.append([name, f"{growth:.2f}", ", ".join(f"{size:,}" for size in sorted(states))])
        if len(states) > 1:
            claims.append(Claim(f"{name}: sizes of state over lengths", len(states), 1, at_most=True))
    study.table("From the shortest length to the longest", ["", "cost a token, ×", "state, bytes a sequence"], rows)
    worst = max(growths, key=lambda name: growths[name])
    what = f"largest growth of cost a token from {LENGTHS[0]} to {lengths[-1]}, {worst}"
    claims.append(Claim(what, growths[worst], GROWTH, at_most=True))
    return claims


def options(parser: argparse.ArgumentParser) -> None:
    """Two rounds: the benchmark has many contenders."""
    timing.options(parser)
    parser.add_argument("--lengths", type=int, nargs="+", choices=CLAIMED, default=LENGTHS, help="these alone")
    parser.set_defaults(rounds=2, repeats=REPEATS)


def main() -> int:
    """Measures everything in one run; the exit code is the verdict's."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return 0
    study = open_study("benchmark-rules", "Tokens per second of every preset.", options=options)
    results = run_all(study, __file__, contenders(study.options.lengths, study.smoke), {"GLIBC_TUNABLES": KEPT})
    return study.verdict(report(study, results))


if __name__ == "__main__":
    sys.exit(main())
