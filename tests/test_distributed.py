"""Several processes: they train what one process trains, each with its part, and end together."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from config_example import error_of
from distributed_cases import CASES, RESUMED, Ragged, outcome, resumed
from hypothesis import given
from small_models import CONFIGS, tiny, write_text
from typer.testing import CliRunner

from metamem import train
from metamem.cli import app
from metamem.collectives import World
from metamem.hierarchy.replicas import _by_process
from metamem.training.distributed import replicas

TESTS = Path(__file__).parent
EXACT = 1e-10


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{CONFIGS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}


def torchrun(processes, *arguments, timeout=900):
    command = [*TORCHRUN, str(processes), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of one process, for several to go on with."""
    torch.set_default_dtype(torch.float64)
    try:
        run, config, task = CASES["routed"](None)
        return run(config, tmp_path_factory.mktemp("begun"), task).folder
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def two(tmp_path_factory, begun):
    """What two processes make of every case."""
    folder = tmp_path_factory.mktemp("two")
    write_text(folder / "text.txt")
    for case in RESUMED:
        shutil.copytree(begun, folder / case / "begun")
    done = torchrun(2, TESTS / "distributed_cases.py", folder, *CASES, *RESUMED)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, lambda case, rank=0: torch.load(folder / f"{case}-{rank}.pt")


def alike(one, other):
    """The same metrics and weights, up to the order of sums."""
    (rows, weights), (there, theirs) = one, other
    assert len(rows) == len(there) and weights.keys() == theirs.keys()
    for row, found in zip(rows, there, strict=True):
        assert row.keys() == found.keys()
        assert row.pop("kind") == found.pop("kind")
        for name, value in row.items():
            assert found[name] == pytest.approx(value, rel=EXACT, abs=EXACT), f"step {row['step']}: {name}"
    for name, value in weights.items():
        torch.testing.assert_close(theirs[name], value, rtol=EXACT, atol=EXACT, msg=lambda text, n=name: f"{n}: {text}")


# They are one


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(case, two, tmp_path, float64):
    write_text(tmp_path / "text.txt")
    alike(outcome(case, tmp_path), two[1](case))
    for name, value in two[1](case)[1].items():
        assert torch.equal(value, two[1](case, 1)[1][name]), f"the processes' {name} are not the same"


@pytest.mark.parametrize("case", RESUMED)
def test_two_go_on_with_the_run_of_one(case, two):
    _, whole = two[1]("routed")
    rows, weights = two[1](case)
    alike(two[1]("routed"), (rows, weights))
    assert [row["step"] for row in rows] == list(range(1, 10)) and whole.keys() == weights.keys()


@pytest.mark.parametrize("case", ["routed", "routed_fsdp"])
def test_one_goes_on_with_the_run_of_two(case, two, tmp_path, float64):
    folder, of = two
    shutil.copytree(folder / "runs" / case, tmp_path / "begun")
    alike(of(case), resumed(tmp_path))


# What a process has, and what is refused before anything starts


@pytest.fixture
def launched(monkeypatch):
    """As torchrun starts the second of some processes."""

    def start(processes):
        for name, value in {"WORLD_SIZE": processes, "RANK": 1, "LOCAL_RANK": 1}.items():
            monkeypatch.setenv(name, str(value))

    return start


@given(size=st.integers(1, 5), share=st.integers(0, 3))
def test_every_row_is_one_process_s(size, share):
    batch = list(range(size * share))
    assert [row for rank in range(size) for row in batch[World(rank, size).rows(len(batch))]] == batch


@given(size=st.integers(1, 4), rows=st.integers(1, 9))
def test_parts_are_those_of_torch_s_own_sharding(size, rows):
    tensor = torch.randn(rows, 3)
    chunks = [chunk.flatten() for chunk in tensor.chunk(size)]
    for rank, part in enumerate(_by_process(tensor, size)):
        mine = chunks[rank] if rank < len(chunks) else tensor.new_zeros(0)
        assert part[: len(mine)].equal(mine) and not part[len(mine) :].any()


def test_a_batch_that_cannot_be_shared_is_refused(launched, tmp_path):
    launched(3)
    text = error_of(lambda: train(tiny("", "training.batch=4"), tmp_path, task=Ragged()))
    assert "training.batch: 4 cannot be shared evenly by 3 processes; make it a multiple of 3, as 3 is" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    text = error_of(lambda: train(tiny("", "training.device=cuda"), tmp_path, task=Ragged()))
    assert "training.device: process 0 of this machine needs GPU 0, and torch finds 0" in text


def test_a_number_is_not_sharded():
    model, settings = torch.nn.Module(), tiny("", "training.distributed=fsdp").training
    model.rate = torch.nn.Parameter(torch.tensor(0.1))
    text = error_of(lambda: replicas(model, settings, World(0, 2)))
    assert "training.distributed: fsdp shares parameters by rows, and 'rate' is a single number" in text


@pytest.mark.parametrize("command", ["check", "report"])
def test_other_commands_are_one_process_s(command, launched, monkeypatch):
    launched(2)
    monkeypatch.setattr("metamem.launch.GRACE", 0.0)
    result = CliRunner().invoke(app, [command, "configs/quickstart.yaml"])
    assert result.exit_code == 2 and f"torchrun started 2 processes, and `metamem {command}` is one" in result.stderr


# They end together


@pytest.mark.parametrize("broken", ["error", pytest.param("killed", marks=pytest.mark.slow)])
def test_what_ends_one_process_ends_all_and_is_told_once(broken, tmp_path):
    done = torchrun(2, TESTS / "distributed_cases.py", tmp_path, broken)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "another process of this training" in line]
    assert done.stderr.count("ValueError: broken on purpose") == (broken == "error") and not told
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.slow
def test_ctrl_c_ends_all_after_the_same_step_with_one_checkpoint(tmp_path):
    config = ["configs/mnm_dictionary.yaml", "training.steps=100000", "training.log_every=1", "vars.dim=8"]
    command = [*TORCHRUN, "2", "-m", "metamem", "train", *config, "--runs", str(tmp_path)]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=CONFIGS.parent, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "mnm_dictionary/metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=120)[1]
    assert stderr.count("interrupted: ") == 1 and "another process" not in stderr
    (checkpoint,) = (tmp_path / "mnm_dictionary/checkpoints").iterdir()
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert checkpoint.name == f"step-{last}.safetensors"
