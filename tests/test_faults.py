"""Faults: kills at random moments, a full disk, damage, divergence; `make reliability` tries more of each."""

import importlib.util
import json
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from small_models import tiny
from test_resume import Windows as EveryGenerator
from test_training import SHORT, Windows

from experiments import faults, kills
from experiments.reliability import FAULTS
from metamem import ConfigError
from metamem.registry import TRACKERS
from metamem.training import Diverged, resume, train
from metamem.training.run_folder import METRICS
from metamem.training.tracking import check_trackers


@pytest.mark.parametrize(
    ("attempt", "count"),
    [
        (kills.training, 3),
        (kills.episodes, 1),
        (kills.adapting, 1),
        (faults.full_disk, 2),
        (faults.damaged_checkpoints, 12),
        (faults.diverging, 2),
        (faults.damaged_data, 4),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_is_survived(attempt, count, tmp_path):
    assert attempt(count, tmp_path, seed=1) == (count, count)


def test_every_fault_of_the_table_is_there():
    for fault in FAULTS:
        module, _, function = fault.function.partition(":")
        assert callable(getattr(importlib.import_module(f"experiments.{module}"), function))
    assert sum(fault.count for fault in FAULTS if "kill" in fault.name) >= 20


def test_a_step_that_makes_weights_that_are_not_finite_is_told_and_not_saved(tmp_path):
    wild = ("hierarchy.levels.task.optimizer.lr=1.0e38", "training.gradient_clip=null", "training.checkpoint_every=1")
    scale = ("hierarchy.levels.task.objective={losses.outer.next_token: 1.0e5}", "training.schedule=constant")
    with pytest.raises(Diverged, match=r"step 1: a step of level 'task' made weights that are not finite, of 'embed"):
        train(tiny("", *SHORT, *wild, *scale), tmp_path, task=Windows())
    assert not list((tmp_path / "tiny").glob("checkpoint*"))


# Trackers


class Listed:
    """A tracker that keeps what it is told."""

    told: ClassVar[list] = []

    def __init__(self, folder, settings, step, colour: str = "red"):
        self.told.append(("open", step, colour))

    def log(self, step, numbers):
        self.told.append((step, dict(numbers)))

    def close(self):
        self.told.append("close")


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.setattr(Listed, "told", [])
    monkeypatch.setitem(TRACKERS._constructors, "listed", Listed)
    return Listed.told


def test_a_tracker_takes_the_numbers_of_the_rows(listed, tmp_path):
    config = tiny("", *SHORT, "training.steps=2", "training.trackers={listed: {colour: blue}}")
    folder = train(config, tmp_path, task=Windows()).folder
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    expected = [(row["step"], {k: v for k, v in row.items() if k not in ("kind", "step")}) for row in rows]
    assert listed == [("open", 0, "blue"), *expected, "close"]
    resume(folder, ["training.steps=3"], task=Windows())
    assert ("open", 2, "blue") in listed and listed[-1] == "close" and listed[-2][0] == 3


def test_a_tracker_that_draws_random_numbers_changes_none_of_the_training(listed, monkeypatch, tmp_path):
    monkeypatch.setattr(Listed, "log", lambda self, step, numbers: torch.rand(()) + random.random() + np.random.rand())
    options = ("training.checkpoint_every=2", "training.steps=4")
    runs = [
        train(tiny("", *SHORT, *options, f"training.trackers={trackers}"), tmp_path, task=EveryGenerator()).folder
        for trackers in ("[]", "[listed]")
    ]
    assert kills.same_run(*runs)


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        ("[tensorbord]", "there is no tracker 'tensorbord'; did you mean 'tensorboard'?"),
        (
            "{wandb: {projekt: a}}",
            "trackers.wandb.projekt: tracker 'wandb' has no such option; did you mean 'project'?",
        ),
        ("{wandb: {mode: sometimes}}", "trackers.wandb.mode: "),
    ],
)
def test_a_tracker_that_is_wrong_is_told_before_training_begins(trackers, message, tmp_path):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        train(tiny("", *SHORT, f"training.trackers={trackers}"), tmp_path / "runs", task=Windows())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_says_which_extra_is_missing(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed: pip install 'metamem-torch\[{name}\]'"):
        check_trackers(tiny("", *SHORT, f"training.trackers=[{name}]"))


@pytest.mark.filterwarnings("default")
def test_tensorboard_shows_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(tiny("", *SHORT, "training.trackers=[tensorboard]"), tmp_path, task=Windows()).folder
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss/task")]
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert [step for step, _ in shown] == [row["step"] for row in rows]
    assert torch.allclose(torch.tensor([value for _, value in shown]), torch.tensor([row["loss/task"] for row in rows]))


@pytest.mark.filterwarnings("default")
def test_weights_and_biases_keeps_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = train(tiny("", *SHORT, "training.trackers=[wandb]"), tmp_path, task=Windows()).folder
    named = (folder / "wandb" / "run-id").read_text()
    assert list((folder / "wandb").glob(f"offline-run-*-{named}/run-{named}.wandb"))
