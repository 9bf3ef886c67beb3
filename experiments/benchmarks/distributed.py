"""Training in several processes: the numbers of one process, the speed of more.

Three trainings, each by one process and by two that torchrun starts, one thread each, at the same global batch:

    language model   the quickstart's network, a delta rule with learned gates
    mnm              Metalearned Neural Memory (MNM-g) on the dictionary task
    maml             sinusoid MAML with second-order gradients

- equality     losses and weights after 50 steps, in float64 and in float32
- throughput   steps a second, the two taking turns; the median over rounds of the ratio in a round, by the clock, and
               by the processor time of the first process, which does not see that it waits
- memory       bytes of weights and optimizer states that each process keeps, `ddp` against `fsdp`
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metamem import build, load_config, load_state, save_state, train
from metamem.analysis import Claim, Study, open_study
from metamem.episodes.schema import is_episodes, load_episodes
from metamem.episodes.training import train_episodes
from metamem.hierarchy import OuterLevels, calendar_of, inner_loop, loss_per_token
from metamem.launch import first
from metamem.training import build_task
from metamem.training.distributed import join, replicas
from metamem.training.run_folder import METRICS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PROCESSES = 2
WARM_UP = 5  # steps
LINES = "training.log_every={every}", "training.evaluate_every=null", "training.steps={steps}"
# Case -> config, and what both questions ask of it; then, for each, its size.
CASES = {
    "language model": ("quickstart", ()),
    "mnm": ("mnm_dictionary", ()),
    "maml": ("episodes/maml", ("training.evaluated_tasks=2", "training.evaluated_steps=[0]")),
}
SMALL = {
    "language model": ("vars.dim=16", "vars.heads=2", "vars.blocks=1", "training.batch=4", "training.length=64"),
    "mnm": ("vars.dim=16", "vars.width=8", "training.batch=4"),
    "maml": ("hierarchy.levels.adapt.steps=3",),
}
LARGE = {
    "language model": ("training.batch=8", "training.length=512"),
    "mnm": ("training.batch=512",),
    "maml": ("hierarchy.levels.adapt.steps=5", "training.batch=100", "module.widths=[1, 200, 200, 1]"),
}


def work(spec: dict[str, Any]) -> None:
    """What a process of a contender does: trains, and the first leaves what came out."""
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, spec["dtype"]))
    if spec["what"] == "memory":
        return keep(spec)
    path, clocks = CONFIGS / f"{CASES[spec['case']][0]}.yaml", [(time.perf_counter(), time.process_time())]

    def tick(progress: Any) -> None:
        clocks.append((time.perf_counter(), time.process_time()))

    if is_episodes(path):
        trained = train_episodes(load_episodes(path, spec["overrides"]), Path(spec["folder"]), progress=tick)
        model = trained.learner
    else:
        trained = train(load_config(path, spec["overrides"]), Path(spec["folder"]), progress=tick)
        model = trained.model
    if first():
        folder = Path(spec["folder"])
        save_state(dict(model.state_dict()), folder / "weights.safetensors")
        (folder / METRICS).write_text((trained.folder / METRICS).read_text())
        (folder / "clocks").write_text(json.dumps(clocks))


def keep(spec: dict[str, Any]) -> None:
    """Prints the bytes of weights and optimizer states that this process keeps after a step."""
    config = load_config(CONFIGS / "quickstart.yaml", spec["overrides"])
    world, task, model = join(config.training), build_task(config), build(config)
    slow = replicas(model, config.training, world)
    outer = OuterLevels(config, model, calendar_of(config, task), replicas=slow)
    inputs, targets = task.sample(torch.Generator().manual_seed(0), world.size, config.training.length)
    rows = world.rows(len(inputs))
    with slow.whole():
        out = inner_loop(config, model, world).run(inputs[rows], targets[rows])
        outer.backward(lambda objectives: loss_per_token(objectives, out.y, targets[rows]).mean() / world.size)
    outer.step(1, 1.0, None)
    states = [state for optimizer in outer.optimizers.values() for state in optimizer.state.values()]
    kept: list[Any] = [*model.parameters(), *(value for state in states for value in state.values())]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in kept]
    if first():
        (Path(spec["folder"]) / "bytes").write_text(str(sum(tensor.nbytes for tensor in local)))


def run(processes: int, folder: Path, **spec: Any) -> None:
    """A contender, in processes of its own."""
    folder.mkdir()
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    spec = {"dtype": "float32", **spec, "folder": str(folder)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, __file__, "--work", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{spec}: {done.stderr.strip()[-2000:]}")


def cases(study: Study) -> list[str]:
    """Those to run; one where it is small."""
    return list(CASES)[: 1 if study.smoke else None]


def overrides(case: str, sizes: dict[str, tuple[str, ...]], steps: int, every: int) -> list[str]:
    """The settings of a case at a size."""
    told = [line.format(steps=steps, every=every) for line in LINES]
    return [*CASES[case][1], *sizes[case], *told]


def rows(folder: Path) -> list[dict[str, Any]]:
    """The training's rows of metrics."""
    found = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [row for row in found if row["kind"] == "train"]


def differences(one: Path, other: Path) -> tuple[float, float]:
    """The largest difference between two runs' losses at any step, and between their weights."""
    losses = [
        abs(a[name] - b[name])
        for a, b in zip(rows(one), rows(other), strict=True)
        for name in a
        if name.startswith("loss/")
    ]
    mine, theirs = (load_state(folder / "weights.safetensors")[0] for folder in (one, other))
    apart: list[Tensor] = [(mine[name] - theirs[name]).abs().max() for name in mine if mine[name].numel()]
    return max(losses), max(map(float, apart))


def equality(study: Study, at: Path) -> list[Claim]:
    """Losses and weights of two processes against those of one."""
    steps, lines, claims = 4 if study.smoke else 50, [], []
    for case in cases(study):
        for dtype in ("float64",) if study.smoke else ("float64", "float32"):
            folders = {n: at / f"{case}-{dtype}-{n}" for n in (1, PROCESSES)}
            for n, folder in folders.items():
                run(n, folder, what="train", case=case, overrides=overrides(case, SMALL, steps, 1), dtype=dtype)
            losses, weights = differences(*folders.values())
            study.add(f"{case}, {dtype}, losses apart", losses, "nats")
            study.add(f"{case}, {dtype}, weights apart", weights, "1")
            lines.append([f"{case}, {dtype}", f"{losses:.1e}", f"{weights:.1e}"])
            if dtype == "float64":
                claims.append(Claim(f"{case}: losses and weights apart", max(losses, weights), 1e-6, at_most=True))
    study.table(f"{PROCESSES} processes against one after {steps} steps", ["", "losses", "weights"], lines)
    return claims


def seconds_a_step(folder: Path) -> tuple[float, float]:
    """Of the clock, and of the first process's own: the median over steps, the first of which warm up."""
    clocks = json.loads((folder / "clocks").read_text())[WARM_UP:]
    wall, own = zip(*((b[0] - a[0], b[1] - a[1]) for a, b in pairwise(clocks)), strict=True)
    return statistics.median(wall), statistics.median(own)


def throughput(study: Study, at: Path) -> list[Claim]:
    """Steps a second."""
    rounds, lines, claims = 1 if study.smoke else study.options.rounds, [], []
    sizes, steps = (SMALL, WARM_UP + 3) if study.smoke else (LARGE, WARM_UP + study.options.steps)
    for case in cases(study):
        took: dict[int, list[tuple[float, float]]] = {1: [], PROCESSES: []}
        for turn in range(rounds):
            for n, seconds in took.items():
                folder = at / f"{case}-speed-{n}-{turn}"
                run(n, folder, what="train", case=case, overrides=overrides(case, sizes, steps, steps))
                seconds.append(seconds_a_step(folder))
        one, more = took.values()
        wall, own = (statistics.median(a[clock] / b[clock] for a, b in zip(one, more, strict=True)) for clock in (0, 1))
        best = [min(wall for wall, _ in seconds) for seconds in took.values()]
        study.add(f"{case}, {PROCESSES} processes", 1 / best[1], "steps/s", "1 process", wall)
        study.add(f"{case}, {PROCESSES} processes, by the first one's own time", own, "ratio", "1 process")
        milliseconds = [f"{1000 * seconds:.1f}" for seconds in best]
        lines.append([case, *milliseconds, f"{wall:.2f}", f"{best[0] / best[1]:.2f}", f"{own:.2f}"])
        claims.append(Claim(f"{case}: times the throughput of one process", wall, 1.5))
    headings = ["", "1 process, ms a step", f"{PROCESSES} processes", "times as fast", "of bests", "of processor time"]
    study.table("Throughput at the same global batch, one thread a process", headings, lines)
    return claims


def memory(study: Study, at: Path) -> list[Claim]:
    """What each process keeps between steps."""
    kept = {}
    for way in ("ddp", "fsdp"):
        run(PROCESSES, at / way, what="memory", overrides=[f"training.distributed={way}", "training.length=64"])
        kept[way] = int((at / way / "bytes").read_text())
        study.add(f"weights and optimizer states, {way}", kept[way] / 2**20, "MiB", "ddp", kept[way] / kept["ddp"])
    shown = [[way, f"{count / 2**20:.2f}"] for way, count in kept.items()]
    study.table(f"Kept by each of {PROCESSES} processes between steps (language model)", ["", "MiB"], shown)
    return [Claim("fsdp: share of ddp's bytes", kept["fsdp"] / kept["ddp"], 0.55, at_most=True)]


def options(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender's speed is measured, in turn")
    parser.add_argument("--steps", type=int, default=40, help="timed outer steps of a measurement of speed")
    parser.add_argument("--work", help=argparse.SUPPRESS)


def main() -> int:
    """Measures in one run; the exit code is the verdict's."""
    if "--work" in sys.argv:
        work(json.loads(sys.argv[sys.argv.index("--work") + 1]))
        return 0
    study = open_study("benchmark-distributed", "Training in several processes.", options=options)
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        claims = [*equality(study, at), *memory(study, at), *throughput(study, at)]
    return study.verdict(claims)


if __name__ == "__main__":
    sys.exit(main())
