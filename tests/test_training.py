"""Meta-training: it learns, repeats bit for bit, keeps what it made, and says in one line what went wrong."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from small_models import (
    CONFIGS,
    GROUPS,
    SMALL,
    TINY,
    config_of,
    inner_level,
    recurrent,
    shaken,
    small_quickstart,
    tiny,
    write_text,
)

from metamem import ConfigError, UserError, build, build_task, load_config, load_run, load_state, save_state, train
from metamem.tasks import TaskError
from metamem.training import CheckpointError, Diverged, load_checkpoint, run_config, save_checkpoint
from metamem.training.checkpoint import FOLDER as CHECKPOINTS
from metamem.training.loop import LAST_RATE, rate_share
from metamem.training.run_folder import CHECKPOINT, CONFIG, METRICS

ROOT = CONFIGS.parent


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def small(text):
    """The quickstart at a small size on the text, with more overrides."""
    return lambda *overrides: small_quickstart(f"task.path={text}", "training.steps=4", *overrides)


def rows(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class Windows:
    """A task of random tokens."""

    def __init__(self, vocabulary=7):
        self.vocabulary, self.asked, self.given = vocabulary, [], []

    def sample(self, generator, batch, length):
        self.asked.append((batch, length))
        windows = torch.randint(self.vocabulary, (batch, length + 1), generator=generator)
        self.given.append(windows)
        return windows[:, :-1], windows[:, 1:]


SHORT = ("training.steps=6", "training.batch=2", "training.length=8", "training.warmup=0", "training.log_every=1")


# It learns, and leaves what it says


def test_the_loss_falls_and_the_run_folder_holds_all_of_the_run(small, tmp_path):
    seen = []
    config = small("training.steps=60", "training.log_every=20", "training.length=32", "vars.dim=16", "name=one")
    trained = train(config, tmp_path / "runs", progress=seen.append)
    assert trained.folder == tmp_path / "runs" / "one" and trained.step == 60 and not trained.interrupted
    assert {path.name for path in trained.folder.iterdir()} == {CHECKPOINT, CHECKPOINTS, CONFIG, METRICS}
    logged = rows(trained.folder)
    assert [row["step"] for row in logged] == [20, 40, 60]
    assert seen[0].losses["task"] > 0.9 * math.log(256) and logged[-1]["loss/task"] < 0.7 * math.log(256)
    assert all(row["kind"] == "train" and row["gradient_norm/task"] > 0 for row in logged)
    assert logged[-1]["blocks.0.memory.surprise"] > 0
    assert [(step.step, step.steps) for step in seen] == [(i, 60) for i in range(1, 61)]
    assert run_config(trained.folder) == config


def test_a_checkpoint_gives_the_model_back_bit_for_bit(small, tmp_path):
    trained = train(small(), tmp_path)
    model, config = load_run(trained.folder)
    same(weights(model), weights(trained.model))
    assert config == small()
    assert load_state(trained.folder / CHECKPOINT)[1]["step"] == "4"
    tokens = torch.randint(256, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens).y, trained.model(tokens).y)


def test_the_same_seed_trains_the_same_weights(small, tmp_path):
    first, same_seed, other = (train(small(f"seed={seed}"), tmp_path).model for seed in (1, 1, 2))
    same(weights(first), weights(same_seed))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_the_seed_chooses_the_batches_too(tmp_path):
    first, again, other = Windows(), Windows(), Windows()
    for task, seed in ((first, 1), (again, 1), (other, 2)):
        train(tiny("", *SHORT, f"seed={seed}"), tmp_path, task=task)
    assert all(torch.equal(one, same) for one, same in zip(first.given, again.given, strict=True))
    assert not any(torch.equal(one, another) for one, another in zip(first.given, other.given, strict=True))


def test_inner_levels_are_unrolled_in_training_and_their_rates_learn(tmp_path):
    config = tiny(inner_level(optimizer="{name: sgd, lr: learned}"), *SHORT)
    before = build(config).get_parameter("inner_rates.stream").clone()
    trained = train(config, tmp_path, task=Windows())
    assert not torch.allclose(trained.model.get_parameter("inner_rates.stream"), before)


def test_an_inner_level_with_unroll_zero_is_not_in_training(tmp_path):
    with_level, without = tiny(inner_level(unroll=0), *SHORT), tiny("", *SHORT)
    models = [train(config, tmp_path, task=Windows()).model for config in (with_level, without)]
    same(*map(weights, models))


def test_the_task_is_asked_for_one_batch_a_step(tmp_path):
    task = Windows()
    train(tiny("", *SHORT), tmp_path, task=task)
    assert task.asked == [(2, 8)] * 6


def test_a_slow_step_level_moves_at_its_period_and_at_the_end(tmp_path):
    levels = """
    - {name: quick, clock: step, objective: {losses.outer.next_token: 1.0}, optimizer: {name: sgd, lr: 0.1},
       groups: [all]}
    - {name: slow, clock: step, period: 4, objective: {small_models.brier: 1.0}, optimizer: {name: sgd, lr: 0.1},
       groups: [ends]}
"""
    text = TINY + GROUPS % "" + levels
    trained = train(config_of(text, *SHORT), tmp_path, task=Windows())
    logged = rows(trained.folder)
    assert [step for step, row in enumerate(logged, start=1) if "gradient_norm/slow" in row] == [4, 6]  # 6: the end
    assert all("gradient_norm/quick" in row and "loss/slow" in row for row in logged)


def test_the_schedules():
    assert [rate_share(step, 100, 10, "constant") for step in (1, 5, 10, 50, 100)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    shares = [rate_share(step, 100, 10, "cosine") for step in range(1, 101)]
    assert shares[-1] == pytest.approx(LAST_RATE) and max(shares) == shares[9] and shares[9] > 0.95
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert shares[49] == pytest.approx(LAST_RATE + (1 - LAST_RATE) / 2)
    assert rate_share(4, 4, 0, "cosine") == pytest.approx(LAST_RATE)


# Nothing is overwritten, nothing is half made


def test_a_second_run_of_one_name_has_a_folder_of_its_own(small, tmp_path):
    root = tmp_path / "runs"
    folders = [train(small("name=again", f"seed={seed}"), root).folder for seed in range(3)]
    assert [folder.name for folder in folders] == ["again", "again-2", "again-3"]
    assert [load_run(folder)[1].seed for folder in folders] == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda text: small_quickstart(f"task.path={text}", "training.length=5000"), TaskError),
        (lambda text: small_quickstart(f"task.path={text}.missing"), ConfigError),
        (lambda text: small_quickstart(f"task.path={text}", "task.train=[]", "task.stream=3"), ConfigError),
        (lambda text: small_quickstart(f"task.path={text}", "network.modules.head.dim_in=9"), ConfigError),
        (lambda text: small_quickstart(f"task.path={text}", "hierarchy.groups.all.match=head.**"), ConfigError),
        (lambda text: small_quickstart(f"task.path={text}", "hierarchy.groups.all.match=tail.**"), ConfigError),
    ],
    ids=["text too short", "no text", "option", "dims", "orphan", "no match"],
)
def test_what_cannot_be_trained_leaves_no_folder(make, error, text, tmp_path):
    with pytest.raises(error) as raised:
        train(make(text), tmp_path / "runs")
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_root_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made: Not a directory"):
        train(tiny("", *SHORT), tmp_path / "file", task=Windows())


def test_a_rate_that_diverges_is_told_with_level_and_step_and_keeps_the_last_checkpoint(tmp_path):
    config = tiny(
        "",
        *SHORT,
        "training.checkpoint_every=1",
        "hierarchy.levels.task.optimizer.lr=1e37",
        "training.gradient_clip=null",
        "training.schedule=constant",
        "training.steps=50",
    )
    with pytest.raises(Diverged, match=r"step \d+: the (loss|gradient) of level 'task' is (nan|inf)") as error:
        train(config, tmp_path, task=Windows())
    step = int(str(error.value).split()[1].rstrip(":"))
    saved = load_state(tmp_path / "tiny" / CHECKPOINT)[1]["step"]
    assert f"the checkpoint of step {saved} stays in" in str(error.value) and int(saved) == step - 1
    assert load_run(tmp_path / "tiny")[0].head.weight.isfinite().all()
    assert [row["step"] for row in rows(tmp_path / "tiny")] == list(range(1, step))


def test_a_gradient_that_is_not_finite_is_told_before_anything_is_saved(tmp_path):
    objective = "hierarchy.levels.task.objective={losses.outer.next_token: 1.0, small_models.kinked: 1.0}"
    config = tiny("", *SHORT, objective, "training.checkpoint_every=1")
    with pytest.raises(Diverged, match=r"step 1: the gradient of level 'task' is nan, not finite in 'embed") as error:
        train(config, tmp_path, task=Windows())
    assert "(group 'all' of level 'task'); no checkpoint was made yet; lower the level's lr" in str(error.value)
    with pytest.raises(CheckpointError, match=r"no such checkpoint") as error:
        load_run(tmp_path / "tiny")
    assert "--save-state" not in str(error.value)


# Checkpoints that cannot be used


@pytest.fixture
def checkpoint(tmp_path):
    config = recurrent()
    save_checkpoint(shaken(config), config, 3, tmp_path / CHECKPOINT)
    return tmp_path / CHECKPOINT


def refused(config, path):
    model = build(config)
    before = weights(model)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, config, path)
    same(weights(model), before)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and str(path) in text
    return text


def test_a_checkpoint_says_its_step(checkpoint):
    model = build(recurrent())
    assert load_checkpoint(model, recurrent(), checkpoint) == 3
    same(weights(model), weights(shaken(recurrent())))


def test_a_checkpoint_of_another_config_is_refused(checkpoint):
    assert "it is of another model" in refused(tiny(), checkpoint)
    assert "it is of another model" in refused(recurrent("", "network.modules.mlp.expansion=2"), checkpoint)
    # of the same shapes, but another network all the same
    assert "was made under another config" in refused(recurrent("", "network.modules.attention.window=4"), checkpoint)


def test_a_hierarchy_may_change_under_a_checkpoint(checkpoint):
    config = recurrent(inner_level())
    assert load_checkpoint(build(config), config, checkpoint) == 3


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_checkpoint_is_refused(keep, checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    assert "not a readable checkpoint" in refused(recurrent(), checkpoint)


def test_a_file_that_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    model = build(recurrent())
    save_state(dict(model.state_dict()), tmp_path / "state")  # no config's fingerprint
    assert "was made under another config" in refused(recurrent(), tmp_path / "state")
    assert "no such checkpoint" in refused(recurrent(), tmp_path / "missing")


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no run folder \(it has no config.yaml\)"):
        load_run(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / CONFIG).touch()
    with pytest.raises(UserError, match=re.escape(f"; in it are {tmp_path / 'one'}")):
        load_run(tmp_path)
    (tmp_path / CONFIG).write_text("task: [")
    with pytest.raises(ConfigError):
        load_run(tmp_path)


def test_a_task_is_built_from_its_part_of_the_config(small):
    assert len(build_task(small()).train_bytes()) == 3600


# Compiled


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs one")
def test_compiled_training_gives_the_same_loss(text, tmp_path):
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from metamem import load_config, train\n"
        "config = load_config(sys.argv[1], sys.argv[2:])\n"
        "train(config, Path(config.name))\n"
    )
    logged = {}
    for flag in ("false", "true"):
        overrides = [*SMALL, f"task.path={text}", "training.steps=3", "training.log_every=1", "training.length=8"]
        arguments = [*overrides, f"training.compile={flag}", f"name=compile-{flag}"]
        environment = {**os.environ, "JAXTYPING_DISABLE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-c", code, str(CONFIGS / "quickstart.yaml"), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        logged[flag] = [row["loss/task"] for row in rows(tmp_path / f"compile-{flag}" / f"compile-{flag}")]
    assert len(logged["true"]) == 3
    assert logged["true"] == pytest.approx(logged["false"], rel=1e-4)
    assert load_config(tmp_path / "compile-true" / "compile-true" / CONFIG).training.compile


# Evaluation


class Counting(Windows):
    """A task that asks a model for its answers."""

    def evaluate(self, predict, length):
        inputs, targets = torch.zeros(2, length, dtype=torch.long), torch.ones(2, length, dtype=torch.long)
        self.seen = predict(inputs, targets)
        return {"mean/logit": float(self.seen.mean())}


def test_a_task_is_evaluated_every_so_many_steps_and_at_the_end(tmp_path):
    task = Counting()
    trained = train(tiny("", *SHORT, "training.evaluate_every=4"), tmp_path, task=task)
    found = [row for row in rows(trained.folder) if row["kind"] == "evaluation"]
    assert [row["step"] for row in found] == [4, 6]
    expected = trained.model(torch.zeros(2, 8, dtype=torch.long)).y.mean().item()
    assert found[-1]["mean/logit"] == pytest.approx(expected) and found[0]["mean/logit"] != found[1]["mean/logit"]
    assert trained.model.training and not task.seen.requires_grad
    without = train(tiny("", *SHORT), tmp_path, task=Counting())
    assert {row["kind"] for row in rows(without.folder)} == {"train"}
    same(weights(without.model), weights(trained.model))


def test_an_evaluation_goes_through_the_inner_levels(tmp_path):
    task = Counting()
    trained = train(tiny(inner_level(), *SHORT, "training.evaluate_every=6"), tmp_path, task=task)
    still = trained.model(torch.zeros(2, 8, dtype=torch.long)).y
    assert torch.allclose(task.seen[:, :2], still[:, :2]) and not torch.allclose(task.seen[:, 2:], still[:, 2:])


def test_a_task_without_an_evaluation_is_told_before_a_folder_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"training.evaluate_every: the task 'none' has no evaluation; set null"):
        train(tiny("", *SHORT, "training.evaluate_every=4"), tmp_path / "runs", task=Windows())
    assert not (tmp_path / "runs").exists()
