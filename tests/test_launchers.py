"""Launchers: what each refuses; and that a Ray cluster comes to the rows that this machine comes to, workers killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_ablation import BASE, MEASURED, TRAINED, ablation, marks, without_time
from typer.testing import CliRunner

import metamem.cli as cli
from metamem import ConfigError, UserError, load_state
from metamem.analysis import plan_ablation, run_ablation
from metamem.analysis.ablation import CELLS
from metamem.analysis.launchers import launcher
from metamem.analysis.results import read_results
from metamem.state import flatten


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("base.yaml").write_text(BASE)


# What is refused


def test_a_launcher_that_is_not_there_is_told():
    with pytest.raises(UserError, match=re.escape("there is no launcher 'rya'; did you mean 'ray'? (local, ray)")):
        launcher("rya")
    with pytest.raises(UserError, match="the launcher 'local' joins no cluster: --address is of --launcher ray"):
        launcher("local", "auto")


def test_without_ray_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    path = ablation(MEASURED.format(function="parabola", periods="[1]", seeds="[0]"))
    result = CliRunner().invoke(cli.app, ["ablate", str(path), "--launcher", "ray"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "the launcher 'ray' needs Ray: pip install 'metamem-torch[ray]'"


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ("{gpus: 1}", "a.yaml:1: resources.gpus: local cells share the machine; set it with --launcher ray"),
        ("{memory: 1000}", "a.yaml:1: resources.memory: local cells share the machine"),
        ("{cpu: 1}", "a.yaml:1: resources.cpu: unknown key; did you mean 'cpus'? (cpus, gpus, memory)"),
        ("{cpus: 0}", "a.yaml:1: resources.cpus: must be above 0, not 0"),
        ("{memory: 0.5}", "a.yaml:1: resources.memory: expected an integer (at least 1) or null, not 0.5"),
    ],
)
def test_resources_that_cannot_be_had_are_told(resources, message, tmp_path):
    path = ablation(f"resources: {resources}" + MEASURED.format(function="parabola", periods="[1]", seeds="[0]"))
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_ablation(plan_ablation(path), tmp_path / "f")


def test_resources_and_retries_are_set_from_the_command_line():
    path = ablation(MEASURED.format(function="parabola", periods="[1]", seeds="[0]"))
    plan = plan_ablation(path, ["resources.cpus=2", "retries=4"])
    assert (plan.resources.cpus, plan.resources.threads, plan.retries) == (2.0, 2, 4)
    assert plan_ablation(path, ["resources.cpus=0.25"]).resources.threads == 1


def test_a_cell_has_a_thread_for_each_of_its_cpus(tmp_path):
    path = ablation(MEASURED.format(function="threads", periods="[1]", seeds="[0]"))
    (row,) = run_ablation(plan_ablation(path, ["resources.cpus=3"]), tmp_path / "f", workers=1)
    assert row.metrics == {"threads": 3}


def test_a_cell_is_begun_again_as_often_as_retries_say(tmp_path):
    path = ablation(MEASURED.format(function="dying", periods="[4]", seeds="[0]"))
    (row,) = run_ablation(plan_ablation(path, ["retries=2"]), tmp_path / "f", workers=1)
    assert (row.status, row.attempts) == ("failed", 3) and "in 3 of 3 tries" in row.message


# A Ray cluster

CLUSTER = """
import json, os, sys
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def cluster():
    """The address of a cluster of two nodes, each with room for one cell."""
    command = [sys.executable, "-c", CLUSTER]
    quiet = {"stderr": subprocess.DEVNULL, "env": environment()}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **quiet) as process:
        address = ""
        while not re.fullmatch(r"[\d.]+:\d+\n", address):
            address = process.stdout.readline()
            assert address, "no cluster"
        yield address.strip()
        process.stdin.close()
        process.wait(60)


def environment():
    patience = {"RAY_raylet_start_wait_time_s": "300"}  # of a cluster that begins on a busy machine
    return {**os.environ, **patience, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def command(path, address, *more):
    return [sys.executable, "-m", "metamem.cli", "ablate", str(path), "--launcher", "ray", "--address", address, *more]


def files(folder):
    """What cells left, the numbers that time changes put aside, and the order of what a checkpoint tells."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            state, told = load_state(path)
            numbers = {key: None if value is None else value.tolist() for key, value in flatten(state).items()}
            kept = {key: value for key, value in numbers.items() if not key.startswith("random/")}  # the process's own
            told.pop("about", None)  # the seconds so far
            found[str(path.relative_to(folder))] = kept | told
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[str(path.relative_to(folder))] = [
                {key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")}
                for row in rows
            ]
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.mark.slow
def test_a_ray_cluster_comes_to_the_rows_and_run_folders_of_this_machine(cluster):
    here = run_ablation(plan_ablation(ablation(TRAINED)), Path("local"), workers=1)
    done = subprocess.run(command("a.yaml", cluster), env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs/a: 4 of 4 cells done; see them with: metamem report runs/a\n"
    rows = {(row.cell, row.seed): without_time(row) for row in read_results(Path("runs/a"))}
    assert rows == {(row.cell, row.seed): without_time(row) for row in here}
    left = files(Path("runs/a") / CELLS)
    assert left == files(Path("local") / CELLS)
    assert any(name.endswith("checkpoint.safetensors") for name in left), "runs come back whole"


@pytest.mark.slow
def test_workers_killed_in_the_middle_of_cells_lose_nothing(cluster):
    """From without, at a random moment of a cell; by itself, once and always; and the ablation's own process."""
    path = ablation(MEASURED.format(function="waiting", periods="[1, 2, 4, 8]", seeds="[0]"))
    with subprocess.Popen(command(path, cluster), env=environment(), stderr=subprocess.DEVNULL) as process:
        killed = set()
        while len(killed) < 2:
            assert process.poll() is None
            for mark in marks():
                period, pid = map(int, mark.split("-"))
                if period in (1, 2) and period not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(period)
            time.sleep(0.05)
        Path("marks/go").touch()
        assert process.wait(600) == 0
    rows = read_results(Path("runs/a"))
    assert {(row.cell, row.status, row.metrics["error"]) for row in rows} == {
        (f"periods period={period}", "done", float(period)) for period in (1, 2, 4, 8)
    }
    attempts = {row.factors["vars.period"]: row.attempts for row in rows}
    assert attempts == {1: 2, 2: 2, 4: 1, 8: 1}, "those that were killed ran again, the others did not"

    path.write_text(MEASURED.format(function="dying", periods="[1, 2, 4]", seeds="[0]"))
    done = subprocess.run(
        command(path, cluster, "name=b"), env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    rows = {row.factors["vars.period"]: row for row in read_results(Path("runs/b"))}
    assert [(rows[p].status, rows[p].attempts) for p in (1, 2, 4)] == [("done", 1), ("done", 2), ("failed", 2)]
    assert "in 2 of 2 tries" in rows[4].message

    refused = subprocess.run(
        command(path, cluster, "name=c", "resources.gpus=64"), env=environment(), capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        "command line: resources: no machine of the cluster has CPU 1, GPU 64 (it has CPU 1, GPU 0; CPU 1, GPU 0)"
    )


@pytest.mark.slow
def test_a_cluster_of_this_machine_is_begun_and_ended():
    path = ablation(MEASURED.format(function="parabola", periods="[1, 4]", seeds="[0, 1]"))
    begun = [*command(path, "")[:-2], "--workers", "2"]
    done = subprocess.run(begun, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [row.status for row in read_results(Path("runs/a"))] == ["done"] * 4


def test_no_cluster_at_an_address_is_told():
    pytest.importorskip("ray")
    path = ablation(MEASURED.format(function="parabola", periods="[1]", seeds="[0]"))
    refused = subprocess.run(
        command(path, "no.such.machine.invalid:1"), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert refused.returncode == 2, refused.stderr
    assert "no.such.machine.invalid:1: no Ray cluster: " in refused.stderr.splitlines()[-1]
