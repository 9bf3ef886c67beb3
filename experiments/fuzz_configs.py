"""Fuzzes every shipped config: damaged at random, it loads, builds and runs, or one line says what is wrong with it.

    python experiments/fuzz_configs.py --cases 2000 --seed 0

A case is a file of configs/, small, in a copy of the folder, with one mutation; a fragment is loaded through a config
that extends it. What loads is built as `metamem check` builds it; some of what is small is trained for two steps.
Survived is a case that ran, was built, or was refused in one line that names a file; a traceback, a line that names
none, and a case that takes more than its time are not.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a function that an ablation names is in experiments/

from experiments.config_mutations import MUTATIONS, mutate
from metamem import UserError, build, build_task, train
from metamem.adaptation.hugging_face import load_adapt
from metamem.analysis import Claim, open_study, plan_ablation
from metamem.cli import load_checked
from metamem.config import nodes
from metamem.config.ablation import is_ablation
from metamem.episodes.schema import is_episodes, load_episodes
from metamem.episodes.training import build_episodes, build_learner, outer_levels, train_episodes
from metamem.hierarchy import OuterLevels, calendar_of, inner_loop
from metamem.out_of_memory import told_in_a_line

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SECONDS = 20  # of CPU that a case may take
ADDRESS_SPACE = 4 << 30  # bytes that a case may ask for
CHEAP = 200_000  # parameters of what is run
RUN = 0.25  # share of what is cheap that is run
LINE = 2000  # characters that a line has at most
WHOLE = ("", "algorithmic", "wiring", "episodes", "ablation", "adapt")  # folders of files that are loaded by themselves
HOSTS = ("experiment/associative_recall.yaml", "network/memory_lm.yaml")  # what a memory is loaded with
TEXT, TEXTS = "In the beginning was the word, and the word was with memory. ", ("one.txt", "other.txt")
SMALL = {"dim": 16}  # variables, as far as a file has them
SMALL_TASKS: dict[str, dict[str, Any]] = {
    "english": {"path": TEXTS[0]},
    "two_clock": {"sources": list(TEXTS), "fast": 8, "slow": 32, "stream": 40},
    "continual": {"sources": list(TEXTS), "steps_per_task": 1},
}

Outcome = Literal["refused", "built", "ran"]


class Hang(BaseException):
    """A case that took more than its time."""


@dataclass(frozen=True)
class Case:
    """A file of the folder, and what is loaded for it; `number`: which of its mutations."""

    file: str
    host: str
    number: int


@dataclass(frozen=True)
class Found:
    """What came of a case; `trouble`: why it did not survive."""

    case: Case
    mutation: str
    outcome: Outcome | None
    trouble: str = ""


def prepare(folder: Path) -> dict[str, str]:
    """Copies configs/ to the current folder, small; gives each file, and what is loaded for it."""
    shutil.copytree(CONFIGS, folder, dirs_exist_ok=True)
    for name in TEXTS:
        Path(name).write_text(TEXT * 60)
    trees = {str(path.relative_to(folder)): read(path) for path in sorted(folder.rglob("*.yaml"))}
    for name, tree in trees.items():
        sizes = tree.get("vars", {})
        sizes |= {key: value for key, value in SMALL.items() if key in sizes}
        if "task" in tree:
            tree["task"] |= SMALL_TASKS.get(tree["task"].get("name"), {})
        (folder / name).write_text(nodes.dump(tree))
    hosts = {name: _host(name, trees) for name in trees}
    for name in trees:
        if hosts[name] not in trees:
            (folder / hosts[name]).write_text(nodes.dump({"extends": [name, *HOSTS]}))
    return hosts


def read(path: Path) -> Any:
    """The plain values of a YAML file."""
    return nodes.strip(nodes.parse(path.read_text(), path.name))[0]


def _host(name: str, trees: dict[str, Any]) -> str:
    """What is loaded for a file: itself, the first config that extends it, or one that is made for it."""
    if _is_whole(name) or "base" in trees[name]:
        return name
    return next(
        (other for other in trees if _is_whole(other) and name in _extended(other, trees)), f"with_{Path(name).name}"
    )


def _is_whole(name: str) -> bool:
    """Whether a file of the folder is a config by itself, and no fragment."""
    return str(Path(name).parent).replace(".", "") in WHOLE


def _extended(name: str, trees: dict[str, Any]) -> set[str]:
    """The files that a config extends, and those that these extend."""
    named = trees[name].get("extends") or []
    bases = {os.path.normpath(Path(name).parent / one) for one in ([named] if isinstance(named, str) else named)}
    return {*bases, *(further for base in bases for further in _extended(base, trees))}


def cases(hosts: dict[str, str], count: int, seed: int) -> list[tuple[Case, Random]]:
    """`count` cases, the same of each file, each with a generator of its own."""
    numbered = [Case(file, hosts[file], number) for number in range(-(-count // len(hosts))) for file in hosts]
    return [(case, Random(f"{seed} {case.file} {case.number}")) for case in numbered[:count]]


def run_case(case: Case, folder: Path, random: Random) -> Found:
    """Damages a file, loads it, and puts it right again."""
    path = folder / case.file
    right = path.read_text()
    mutation, text = mutate(read(path), random)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    outcome, trouble = None, ""
    try:
        with limited(), warnings.catch_warnings(), told_in_a_line():
            warnings.simplefilter("ignore")
            outcome = survive(folder / case.host, random)
    except UserError as error:
        outcome, trouble = "refused", not_a_line(str(error))
    except Hang as hang:
        trouble = f"takes more than {SECONDS} s: {where_raised(hang)}"
    except BaseException as error:
        trouble = f"{type(error).__name__}: {error}: {where_raised(error)}"
    finally:
        path.write_text(right)
    return Found(case, mutation, outcome, trouble and f"{trouble}\n--- {case.file} ({mutation})\n{text}")


def survive(path: Path, random: Random) -> Outcome:
    """Loads and builds what is in a file; runs some of what is small."""
    if is_ablation(path):
        plan_ablation(path)
        return "built"
    if path.parent.name == "adapt":
        load_adapt(path)
        return "built"
    running = random.random() < RUN
    with tempfile.TemporaryDirectory() as runs:
        if is_episodes(path):
            episodes = load_episodes(path)
            learner, task = build_learner(episodes), build_episodes(episodes)
            outer_levels(episodes, learner)
            if not running or _size(learner) > CHEAP:
                return "built"
            few = {"steps": 2, "batch": 2, "evaluated_tasks": 2, "evaluated_steps": [1], "threads": None}
            train_episodes(replace(episodes, training=replace(episodes.training, **few)), Path(runs), task)
            return "ran"
        config = load_checked(path, None)
        model, task = build(config), build_task(config)
        OuterLevels(config, model, calendar_of(config, task))
        inner_loop(config, model)
        if not running or _size(model) > CHEAP:
            return "built"
        small = {"batch": 2, "length": min(config.training.length, 64), "compile": False, "threads": None}
        few = small | {"steps": 2, "warmup": 0, "evaluate_every": None}
        train(replace(config, training=replace(config.training, **few)), Path(runs), task)
        return "ran"


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def not_a_line(message: str) -> str:
    """What is wrong with a message of one line that names a file, or the step where a training diverged."""
    if len(message.splitlines()) != 1 or len(message) > LINE:
        return f"not a line: {message[:LINE]!r}"
    return "" if re.search(r"\.yaml|step \d|out of memory|the objective", message) else f"names no file: {message!r}"


def where_raised(error: BaseException) -> str:
    """Where in the project an error was raised, the innermost places last."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    return " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in own[-4:])


@contextmanager
def limited() -> Iterator[None]:
    """No more than `SECONDS` of CPU, and `ADDRESS_SPACE` beside what the process has."""

    def stop(number: int, frame: Any) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (has + ADDRESS_SPACE, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def campaign(count: int, seed: int, part: int = 0, parts: int = 1) -> list[Found]:
    """Every `parts`-th of `count` cases, from the `part`-th on, in a temporary folder; what does not survive is printed
    at once."""
    before, found = Path.cwd(), list[Found]()
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        try:
            hosts = prepare(Path("c"))
            for case, random in cases(hosts, count, seed)[part::parts]:
                found.append(run_case(case, Path("c"), random))
                if found[-1].trouble:
                    print(found[-1].trouble, flush=True)
        finally:
            os.chdir(before)
    return found


def damaged(count: int, folder: Path, seed: int) -> tuple[int, int]:
    """A fault of experiments/reliability.py: how many damaged configs were tried, and how many survived."""
    found = campaign(count, seed)
    return len(found), sum(not one.trouble for one in found)


def summary(found: Sequence[Found]) -> str:
    """The counts of a campaign, in a line."""
    outcomes = Counter(one.outcome for one in found if not one.trouble)
    told = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in ("refused", "built", "ran"))
    return f"{len(found)} damaged configs: {told}, {sum(bool(one.trouble) for one in found)} not survived"


def main() -> int:
    def options(parser: ArgumentParser) -> None:
        parser.add_argument("--cases", type=int, default=2000, metavar="N", help="damaged configs of a seed")
        parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="the first of the seeds")

    study = open_study("fuzz_configs", str(__doc__).partition("\n")[0], options=options)
    torch.set_num_threads(1)
    count, started = 200 if study.smoke else study.options.cases, time.process_time()
    found = [one for seed in study.seeds for one in campaign(count, study.options.first_seed + seed)]
    rows = []
    for mutation in MUTATIONS:
        of = [one for one in found if one.mutation == mutation]
        outcomes = Counter(one.outcome for one in of if not one.trouble)
        lost = sum(bool(one.trouble) for one in of)
        rows.append([mutation, str(len(of)), *(str(outcomes[key]) for key in ("refused", "built", "ran")), str(lost)])
        study.add(f"not survived: {mutation}", lost, "cases")
    study.table("damaged configs", ["mutation", "cases", "refused", "built", "ran", "not survived"], rows)
    study.add("damaged configs", len(found), "cases")
    print(f"{summary(found)}; {(time.process_time() - started) / max(1, len(found)) * 1e3:.0f} ms of CPU a case")
    lost = sum(bool(one.trouble) for one in found)
    return study.verdict([Claim("damaged configs", len(found), count), Claim("not survived", lost, 0, at_most=True)])


if __name__ == "__main__":
    sys.exit(main())
