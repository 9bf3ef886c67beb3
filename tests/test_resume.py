"""A run that is ended at any step and gone on with comes to the same weights, bit for bit, and to the same rows."""

import json
import os
import random
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import CONFIGS, GROUPS, SMALL, TINY, config_of, inner_level, tiny, write_text
from typer.testing import CliRunner

import metamem
from metamem import ConfigError, load_config, load_run, load_state, save_state
from metamem.cli import app
from metamem.config import to_dict
from metamem.episodes.schema import OPTIMIZERS, load_episodes
from metamem.episodes.training import load_episodes_run, resume_episodes, train_episodes
from metamem.state import flatten
from metamem.training import CheckpointError, RunHeld, resume, run_config, train
from metamem.training.checkpoint import load_resumable, resumable
from metamem.training.lock import LOCK, hold
from metamem.training.random_states import seed_all
from metamem.training.run_folder import CHECKPOINT, METRICS

SHORT = ("training.steps=10", "training.batch=2", "training.length=8", "training.log_every=1")
EVERY = ("training.checkpoint_every=3", "training.keep_last=1")
# Two levels of other optimizers, the slow one between two steps of its own at every checkpoint.
LEVELS = """
    - {name: quick, clock: step, objective: {losses.outer.next_token: 1.0}, optimizer: {name: adamw, lr: 0.05},
       groups: [all]}
    - {name: slow, clock: step, period: 4, objective: {small_models.brier: 1.0},
       optimizer: {name: sgd, lr: 0.1, momentum: 0.9}, groups: [ends]}
"""
TIMES = ("seconds", "tokens_per_second")
MAML = CONFIGS / "episodes/maml.yaml"
EPISODES = (
    "training.steps=5",
    "training.batch=2",
    "training.evaluated_tasks=3",
    "training.evaluated_steps=[0, 1]",
    *EVERY,
)
GRAPH = (
    "training.steps=4",
    "training.batch=2",
    "training.checkpoint_every=2",
    "task.nodes=[3, 4]",
    "task.tested=[5]",
    "task.stations=[3]",
    "task.extra=1",
    "task.examples=2",
)


class Died(BaseException):
    """What ends a process in the middle of a step."""


def dying(at):
    """A progress that ends the training at a step, before its checkpoint."""

    def progress(seen):
        if seen.step == at:
            raise Died

    return progress


class Windows:
    """Random tokens; it draws from every generator that there is."""

    def sample(self, generator, batch, length):
        windows = torch.randint(7, (batch, length + 1), generator=generator)
        noise = random.randrange(7) + int(random.gauss(0, 3)) + np.random.randint(7) + int(3 * np.random.randn())
        windows = (windows + noise + torch.randint(7, ())) % 7
        return windows[:, :-1], windows[:, 1:]

    def evaluate(self, predict, length):
        inputs = torch.zeros(2, length, dtype=torch.long)
        return {"logit": float(predict(inputs, inputs + 1).mean())}

    def summarise(self, evaluations):
        return {"evaluations": float(sum(step * found["logit"] for step, found in evaluations.items()))}


def rows(folder):
    """What was logged, less how long it took, and less where it was resumed."""
    logged = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in logged if row["kind"] != "resume"]


def same(one, other):
    """Equal, bit for bit, tensor by tensor."""
    one, other = flatten(dict(one)), flatten(dict(other))
    assert one.keys() == other.keys()
    assert [key for key, value in one.items() if value is not None and not torch.equal(value, other[key])] == []


def kept(folder):
    """The last checkpoint, less its times."""
    found = load_resumable(folder)
    return found.step, found.state, {k: v for k, v in found.about["reached"].items() if k not in TIMES}


def alike(one, other):
    """Two runs' weights, rows and whole last checkpoints."""
    same(load_state(one / CHECKPOINT)[0], load_state(other / CHECKPOINT)[0])
    assert rows(one) == rows(other)
    (step, state, reached), (other_step, other_state, other_reached) = kept(one), kept(other)
    assert step == other_step and reached == other_reached
    same(state, other_state)


def scramble():
    """Other random states than any training leaves."""
    seed_all(99)


def levels(*overrides):
    return config_of(TINY + GROUPS % "" + LEVELS, *SHORT, *EVERY, *overrides)


# Exactly


@pytest.mark.parametrize("died", [1, 3, 4, 8, 10])
def test_a_run_that_died_at_any_step_goes_on_to_the_same_bits(died, tmp_path):
    config = levels("training.warmup=4", "training.evaluate_every=3")
    whole = train(config, tmp_path / "whole", task=Windows())
    with pytest.raises(Died):
        train(config, tmp_path / "died", task=Windows(), progress=dying(died))
    scramble()
    resumed = resume(tmp_path / "died" / "tiny", task=Windows())
    assert resumed.step == 10 and resumed.seconds > 0
    alike(resumed.folder, whole.folder)
    same(resumed.model.state_dict(), whole.model.state_dict())


def test_a_run_goes_on_from_every_death_of_many(tmp_path):
    config = levels("training.warmup=0")
    whole = train(config, tmp_path / "whole", task=Windows())
    with pytest.raises(Died):
        train(config, tmp_path / "died", task=Windows(), progress=dying(2))
    for step in (1, 5, 5, 7):
        scramble()
        with pytest.raises(Died):
            resume(tmp_path / "died" / "tiny", task=Windows(), progress=dying(step))
    alike(resume(tmp_path / "died" / "tiny", task=Windows()).folder, whole.folder)


def test_learned_rates_and_inner_levels_go_on_exactly(tmp_path):
    config = tiny(inner_level(optimizer="{name: sgd, lr: learned}"), *SHORT, *EVERY, "training.steps=7")
    whole = train(config, tmp_path / "whole", task=Windows())
    with pytest.raises(Died):
        train(config, tmp_path / "died", task=Windows(), progress=dying(5))
    scramble()
    alike(resume(tmp_path / "died" / "tiny", task=Windows()).folder, whole.folder)


def test_dropout_goes_on_exactly(tmp_path):
    memory = "memory: {kind: ntm, dim: 6, slots: 4, word: 3, dropout: 0.5}\n    norm:"
    text = TINY.replace("norm:", memory, 1).replace(
        "from: sum, to: norm", "from: sum, to: memory}\n    - {from: memory, to: norm"
    )
    config = config_of(text + GROUPS % "" + LEVELS, *SHORT, *EVERY, "training.steps=6")
    whole = train(config, tmp_path / "whole", task=Windows())
    with pytest.raises(Died):
        train(config, tmp_path / "died", task=Windows(), progress=dying(5))
    scramble()
    alike(resume(tmp_path / "died" / config.name, task=Windows()).folder, whole.folder)


def test_a_task_of_pythons_own_random_numbers_goes_on_exactly(tmp_path):
    config = load_config(CONFIGS / "algorithmic/graph.yaml", GRAPH)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Died):
        train(config, tmp_path / "died", progress=dying(3))
    scramble()
    alike(resume(tmp_path / "died" / config.name).folder, whole.folder)


class InOrder(Windows):
    """A task that reads its data in order, and says where it stands."""

    def __init__(self):
        self.data, self.position = torch.randint(7, (400,), generator=torch.Generator().manual_seed(0)), 0

    def sample(self, generator, batch, length):
        read = self.data[self.position : self.position + batch * length + 1]
        self.position += batch * length
        return read[:-1].reshape(batch, length), read[1:].reshape(batch, length)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_task_that_reads_in_order_goes_on_where_it_stood(tmp_path):
    whole = train(levels(), tmp_path / "whole", task=InOrder())
    with pytest.raises(Died):
        train(levels(), tmp_path / "died", task=InOrder(), progress=dying(8))
    alike(resume(tmp_path / "died" / "tiny", task=(task := InOrder())).folder, whole.folder)
    assert task.position == 160


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("sparseadam", "muon")])
def test_any_torch_optimizer_of_episodes_goes_on_exactly(name, tmp_path):
    optimizer = f"hierarchy.levels.meta.optimizer={{name: {name}, lr: 0.01}}"
    config = load_episodes(MAML, [*EPISODES, optimizer])
    whole = train_episodes(config, tmp_path / "whole")
    with pytest.raises(Died):
        train_episodes(config, tmp_path / "died", progress=dying(4))
    scramble()
    alike(resume_episodes(tmp_path / "died" / "maml").folder, whole.folder)


def test_episodes_keep_their_best_and_their_patience(tmp_path):
    rates = ("hierarchy.levels.meta.optimizer.lr=0.3", "hierarchy.levels.adapt.optimizer.lr=0.0")
    overrides = ("training.steps=20", "training.evaluate_every=1", "training.patience=3", "training.checkpoint_every=2")
    config = load_episodes(MAML, [*EPISODES, *rates, *overrides])
    whole = train_episodes(config, tmp_path / "whole")
    with pytest.raises(Died):
        train_episodes(config, tmp_path / "died", progress=dying(whole.best + 2))
    scramble()
    resumed = resume_episodes(tmp_path / "died" / "maml")
    assert (resumed.step, resumed.best, resumed.evaluation) == (whole.step, whole.best, whole.evaluation)
    alike(resumed.folder, whole.folder)
    same(load_episodes_run(resumed.folder)[0].state_dict(), whole.learner.state_dict())
    again = resume_episodes(resumed.folder)
    assert (again.step, again.best, again.evaluation) == (whole.step, whole.best, whole.evaluation)


# What is kept


def test_the_last_checkpoints_are_kept_and_the_best_whose_weights_are_the_runs(tmp_path):
    best = ("training.evaluate_every=2", "training.best_metric=logit", "training.checkpoint_every=1")
    folder = train(levels(*best, "training.keep_last=2"), tmp_path, task=Windows()).folder
    found = {row["step"]: row["logit"] for row in rows(folder) if row["kind"] == "evaluation"}
    lowest = min(found, key=found.__getitem__)
    assert list(resumable(folder)) == sorted({lowest, 9, 10})
    assert load_state(folder / CHECKPOINT)[1]["step"] == str(lowest)
    same(load_run(folder)[0].state_dict(), load_resumable(folder, lowest).state["model"])
    highest = train(levels(*best, "training.best_mode=max"), tmp_path, task=Windows()).folder
    assert load_state(highest / CHECKPOINT)[1]["step"] == str(max(found, key=found.__getitem__))


def test_a_best_of_what_is_not_measured_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"training.best_metric: nothing is evaluated: set training.evaluate_every"):
        levels("training.best_metric=logit")
    config = levels("training.evaluate_every=5", "training.best_metric=logi")
    with pytest.raises(ConfigError, match=r"best_metric: the evaluation measures no such thing; did you mean 'logit'?"):
        train(config, tmp_path, task=Windows())


def test_a_checkpoint_tells_the_config_and_the_versions(tmp_path):
    config = levels()
    about = load_resumable(train(config, tmp_path, task=Windows()).folder).about
    assert about["config"] == json.loads(json.dumps(to_dict(config)))
    assert about["made_with"]["metamem"].startswith(metamem.__version__)
    assert about["made_with"]["torch"] == torch.__version__ and about["made_with"]["threads"] == "1"


# Going on with something changed


@pytest.fixture
def stopped(tmp_path):
    """A run that died after step 7, its checkpoints those of steps 3 and 6."""
    with pytest.raises(Died):
        train(levels("training.keep_last=2"), tmp_path, task=Windows(), progress=dying(7))
    return tmp_path / "tiny"


def resumed(folder, *overrides, **options):
    """A run gone on with, and what was said about it."""
    said = []
    return resume(folder, overrides, task=Windows(), say=said.append, **options), said


def test_nothing_is_said_where_nothing_has_changed(stopped):
    assert resumed(stopped)[1] == []
    trained, said = resumed(stopped)  # it is at its end
    assert trained.step == 10 and said == []
    assert [row["step"] for row in rows(stopped)] == list(range(1, 11))


def test_more_steps_of_a_constant_rate_are_those_of_a_longer_run(tmp_path):
    constant = ("training.schedule=constant", "training.steps=8")
    whole = train(levels(*constant, "training.steps=12"), tmp_path / "whole", task=Windows())
    short = train(levels(*constant), tmp_path / "short", task=Windows())
    longer, said = resumed(short.folder, "training.steps=12")
    assert said == [f"{short.folder}: training.steps was 8, and is 12"]
    alike(longer.folder, whole.folder)
    assert run_config(longer.folder).training.steps == 12, "the folder has the config that it was gone on with"


@pytest.mark.parametrize(
    "overrides",
    [["training.schedule=cosine", "training.steps=8"], ["training.schedule=constant", "training.steps=6"]],
    ids=["another schedule", "a period that the end cut short"],
)
def test_more_steps_that_are_not_exact_are_said_to_be_none(overrides, tmp_path):
    short = train(levels(*overrides), tmp_path, task=Windows())
    _, said = resumed(short.folder, "training.steps=12")
    assert said == [f"{short.folder}: training.steps was {short.step}, and is 12: it does not go on exactly"]


def test_what_changes_is_said_by_name_and_logged(stopped, monkeypatch):
    monkeypatch.setattr("metamem.training.snapshot.made_with", lambda processes: {"metamem": "9.9", "torch": "1.0"})
    rate = "hierarchy.levels.quick.optimizer.lr"
    _, said = resumed(stopped, f"{rate}=0.01", "training.log_every=2", "training.checkpoint_every=4")
    assert f"{stopped}: {rate} was 0.05, and is 0.01: it does not go on exactly" in said
    assert f"{stopped}: training.log_every was 1, and is 2" in said
    assert f"{stopped}: the checkpoint was made with torch {torch.__version__}; this is 1.0" in said
    row = json.loads((stopped / METRICS).read_text().splitlines()[6])
    assert (row["kind"], row["step"], row["changed"][rate]) == ("resume", 6, [0.05, 0.01])


def test_that_the_data_have_changed_is_said(tmp_path):
    text = write_text(tmp_path / "text.txt", 2000)
    config = tiny(
        "",
        "training.steps=2",
        f"task={{name: english, path: {text}}}",
        "network.modules.embed.size=256",
        "network.modules.head.dim_out=256",
    )
    folder, said = train(config, tmp_path).folder, []
    resume(folder, ["training.steps=3"], say=said.append)
    assert not [line for line in said if "made with" in line]
    text.write_bytes(text.read_bytes().replace(b"e", b"u", 1))
    resume(folder, ["training.steps=4"], say=said.append)
    assert "was made with data" in said[-2] and len(said) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=4", "was made with seed 0, not 4: train anew to change it"),
        ("name=other", "was made with name tiny, not other"),
        ("network.modules.mlp.activation=relu", "was made with network.modules.mlp.activation tanh, not relu"),
        (
            "hierarchy.levels.quick.optimizer={name: adam, lr: 0.05}",
            "was made with hierarchy.levels.quick.optimizer.name adamw, not adam",
        ),
        ("hierarchy.groups.ends.match=embed.**", "level 'quick' owned other parameters than it does now"),
        ("training.steps=4", "is past the last of 4 steps; raise training.steps"),
    ],
)
def test_what_a_checkpoint_decides_cannot_be_changed(override, message, stopped):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        resumed(stopped, override)
    assert "\n" not in str(error.value) and "step-6.safetensors" in str(error.value)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_an_earlier_checkpoint_is_gone_on_from_and_what_came_after_is_gone(stopped, tmp_path):
    whole = train(levels("training.keep_last=2"), tmp_path / "whole", task=Windows())
    assert list(resumable(stopped)) == [3, 6]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; it has those of steps 3, 6"):
        resumed(stopped, step=5)
    with pytest.raises(Died):
        resume(stopped, task=Windows(), step=3, progress=dying(4))
    assert list(resumable(stopped)) == [3] and load_state(stopped / CHECKPOINT)[1]["step"] == "3"
    alike(resumed(stopped)[0].folder, whole.folder)


# One process at a time


def test_a_run_that_is_written_is_not_written_by_another(stopped):
    with hold(stopped), pytest.raises(RunHeld) as error:
        resumed(stopped)
    assert str(error.value) == (
        f"{stopped}: process {os.getpid()} on {socket.gethostname()} is writing this run; wait until it ends, or end it"
    )
    assert not (stopped / LOCK).exists()
    (stopped / LOCK).write_text("1 on a host that is no more")  # what a kill leaves: nobody holds it
    assert resumed(stopped)[0].step == 10 and not (stopped / LOCK).exists()


# A checkpoint that cannot be used


def flipped(data):
    return data[:-200] + bytes([data[-200] ^ 4]) + data[-199:]


@pytest.mark.parametrize(
    "damage", [flipped, lambda data: data[:-50], lambda data: b"", lambda data: b"PK\x03\x04" * 99]
)
def test_a_damaged_checkpoint_is_told_with_the_one_that_can_be_gone_on_from(damage, stopped, tmp_path):
    last = resumable(stopped)[6]
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(CheckpointError, match=r"go on from the one before with --step 3") as error:
        resumed(stopped)
    assert str(last) in str(error.value) and "\n" not in str(error.value)
    whole = train(levels("training.keep_last=2"), tmp_path / "whole", task=Windows())
    alike(resumed(stopped, step=3)[0].folder, whole.folder)


def test_a_foreign_checkpoint_is_told(stopped):
    for path in resumable(stopped).values():
        save_state({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"not a checkpoint that a training can go on from; no other can be"):
        resumed(stopped)


# On the command line


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_goes_on_with_a_run_of_either_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    text = [*SMALL, "task.path=text.txt", "training.steps=3", "training.checkpoint_every=1"]
    for name, config, overrides in (("quickstart", CONFIGS / "quickstart.yaml", text), ("maml", MAML, EPISODES)):
        assert invoke("train", config, *overrides).exit_code == 0
        result = invoke("train", "--resume", f"runs/{name}", "training.steps=7", "training.schedule=constant")
        assert result.exit_code == 0 and f"runs/{name}: 7 steps in" in result.stdout, result.output
        assert f"runs/{name}: training.steps was" in result.stderr
        assert [path.name for path in Path("runs").iterdir() if path.name.startswith(name)] == [name]


def test_what_cannot_be_gone_on_with_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["--resume", "nowhere"], "nowhere: no run folder (it has no config.yaml)"),
        (["--resume", str(MAML)], "no run folder"),
        ([str(MAML), "--step", "3"], "--step chooses the checkpoint that --resume goes on from; give both"),
    ):
        result = invoke("train", *arguments)
        assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
