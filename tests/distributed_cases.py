"""Trainings that several processes and one must agree on; run by torchrun, it trains them all and keeps what came out.

torchrun --standalone --nproc-per-node 2 tests/distributed_cases.py FOLDER CASE...
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch
from small_models import CONFIGS, GROUPS, MEMORY_GROUP, RECURRENT, config_of, inner_level, recurrent, small_quickstart

from metamem import load_config, train
from metamem.cli import user_errors
from metamem.episodes.schema import load_episodes
from metamem.episodes.training import train_episodes
from metamem.launch import first
from metamem.targets import IGNORE
from metamem.training import resume
from metamem.training.run_folder import METRICS

STEPS = 50
FSDP = ("training.distributed=fsdp", "training.steps=9")
ALWAYS = ("training.log_every=1",)
SHORT = (
    "training.steps=9",
    "training.checkpoint_every=4",
    "training.keep_last=9",
    "training.batch=4",
    "training.length=8",
    "training.warmup=0",
    *ALWAYS,
)

# Three timescales in the memory, a router over them, and outer levels that fire every step and every third.
ROUTED = (
    RECURRENT
    + GROUPS % MEMORY_GROUP
    + """
    - {name: quick, clock: token, objective: {losses.recall.mse: 1.0}, rule: {lr_max: 0.5}, groups: [memory]}
    - {name: slow, clock: token, period: 4, objective: {losses.recall.mse: 1.0}, rule: {lr_max: 0.5}, groups: [memory]}
    - {name: task, clock: step, objective: {losses.outer.next_token: 1.0, losses.outer.router_balance: 3.0,
       losses.outer.router_z: 0.5, aux.memory.surprise: 0.3}, optimizer: {name: adamw, lr: 0.01}, groups: [all]}
    - {name: late, clock: step, period: 3, objective: {losses.outer.next_token: 0.5},
       optimizer: {name: sgd, lr: 0.1, momentum: 0.9}, groups: [ends]}
  router: {kind: dense, input: token, granularity: head}
"""
)


class Ragged:
    """Random tokens, of which each row is asked another number, and some rows none."""

    def sample(self, generator, batch, length):
        windows = torch.randint(7, (batch, length + 1), generator=generator)
        wanted = torch.rand(batch, length, generator=generator) < torch.rand(batch, 1, generator=generator) - 0.3
        return windows[:, :-1], torch.where(wanted, windows[:, 1:], IGNORE)


class Broken(Ragged):
    """A task that ends the second process in its third step, one way or another."""

    def __init__(self, end):
        self.end, self.left = end, 3

    def sample(self, generator, batch, length):
        self.left -= 1
        if not self.left and not first():
            self.end()
        return super().sample(generator, batch, length)


def fail():
    raise ValueError("broken on purpose")


def language_model(text, *more):
    settings = (f"task.path={text}", f"training.steps={STEPS}", "training.batch=4", *ALWAYS)
    return train, small_quickstart(*settings, *more), None


def mnm(text, *more):
    sizes = ("vars.dim=8", "vars.width=6", "training.batch=4", "training.warmup=0")
    settings = (*sizes, f"training.steps={STEPS}", "training.evaluate_every=25", *ALWAYS, *more)
    return train, load_config(CONFIGS / "mnm_dictionary.yaml", settings), None


def maml(text, *more):
    settings = (f"training.steps={STEPS}", "training.evaluated_tasks=6", "training.evaluate_every=25", *ALWAYS)
    inner = ("hierarchy.levels.adapt.steps=3", "hierarchy.levels.adapt.optimizer.lr=learned")
    return train_episodes, load_episodes(CONFIGS / "episodes/maml.yaml", [*settings, *inner, *more]), None


def inner_levels(text, *more):
    slow = inner_level("slow", period=4, groups="[ends]", optimizer="{name: adam, lr: learned}")
    return train, recurrent(inner_level("quick") + slow, *SHORT, *more), Ragged()


def routed(text, *more):
    return train, config_of(ROUTED, *SHORT, *more), Ragged()


CASES = {
    "language_model": language_model,
    "mnm": mnm,
    "maml": maml,
    "inner_levels": inner_levels,
    "inner_levels_recomputed": lambda text: inner_levels(text, "training.recompute=true"),
    "routed": routed,
    "language_model_fsdp": lambda text: language_model(text, *FSDP),
    "maml_fsdp": lambda text: maml(text, *FSDP),
    "routed_fsdp": lambda text: routed(text, "training.distributed=fsdp"),
}

BROKEN = {
    "error": lambda text: (train, config_of(ROUTED, *SHORT), Broken(fail)),
    "killed": lambda text: (train, config_of(ROUTED, *SHORT), Broken(lambda: os.kill(os.getpid(), signal.SIGKILL))),
}


def resumed(folder, *overrides):
    """A run of the case `routed`, gone on with in the midst of a level's period."""
    return told(resume(folder / "begun", overrides, Ragged(), step=4))


RESUMED = {"resumed": (), "resumed_fsdp": ("training.distributed=fsdp",)}


def outcome(case, folder):
    """Metrics, row by row without what time says, and weights of a training."""
    if case in RESUMED:
        return resumed(folder / case, *RESUMED[case])
    run, config, task = {**CASES, **BROKEN}[case](folder / "text.txt")
    return told(run(dataclasses.replace(config, name=case), folder / "runs", task))


def told(trained):
    model = trained.model if hasattr(trained, "model") else trained.learner
    rows = [json.loads(line) for line in (trained.folder / METRICS).read_text().splitlines()] if first() else []
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows if row["kind"] != "resume"], dict(
        model.state_dict()
    )


@user_errors  # as the command line tells what went wrong
def main():
    folder, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for case in cases:
        rows, weights = outcome(case, Path(folder))
        rank = torch.distributed.get_rank()
        torch.save((rows, weights), Path(folder) / f"{case}-{rank}.pt")


if __name__ == "__main__":
    main()
