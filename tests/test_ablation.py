"""Ablations: what a grid comes to, what is refused before it runs, and that nothing which finished is ever lost.

Longer than most files: grids, refusals, kills and resuming are all tried on the same few small ablations.
"""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from small_models import CONFIGS
from typer.testing import CliRunner

import metamem.cli as cli
from metamem import UserError
from metamem.analysis import plan_ablation, run_ablation
from metamem.analysis.ablation import CELLS, PLAN
from metamem.analysis.plan import short_names
from metamem.analysis.results import RESERVE, RESULTS, DiskFull, Result, ResultsFile, read_results

SMALL = """{vars.dim: 8, vars.blocks: 1, vars.chunk: 8, task.pairs: [1, 2], task.examples: 8, training.steps: 3,
      training.batch: 2, training.length: 16, training.log_every: 1, training.warmup: 0}"""
TRAINED = f"""
base: {CONFIGS}/associative_recall.yaml
seeds: [0, 1]
set: {SMALL}
cells:
  periods: {{grid: {{hierarchy.levels.surprise.period: [1, 4]}}}}
"""
# A config of which the cells' functions read the variables only.
BASE = f"""
extends: {CONFIGS}/associative_recall.yaml
vars: {{period: 1, rate: 0.1, marks: marks}}
"""
MEASURED = """
base: base.yaml
seeds: {seeds}
function: ablation_cells:{function}
cells:
  periods: {{grid: {{vars.period: {periods}}}}}
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("base.yaml").write_text(BASE)


def ablation(text):
    Path("a.yaml").write_text(text)
    return Path("a.yaml")


def measured(function, periods="[1, 2, 4, 8]", seeds="[0]"):
    return plan_ablation(ablation(MEASURED.format(function=function, periods=periods, seeds=seeds)))


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["ablate", *map(str, arguments)])


def marks():
    return sorted(path.name for path in Path("marks").glob("*"))


def without_time(row):
    """A row without what another run of it may change."""
    cost = {key: value for key, value in row.cost.items() if not key.endswith(("seconds", "resident_bytes"))}
    return asdict(replace(row, cost=cost, attempts=1))


# What it comes to


def test_a_grid_is_a_product_and_columns_vary_together():
    plan = plan_ablation(
        ablation("""
base: base.yaml
seeds: [3, 5]
function: ablation_cells:parabola
set: {vars.rate: 0.5}
cells:
  product: {grid: {vars.period: [1, 4], vars.rate: [0.1, 0.3]}}
  scaled: {together: {vars.period: [1, 4], vars.rate: [0.3, 0.075]}, set: {training.batch: 3}}
  base: {}
""")
    )
    first = [cell for cell in plan.cells if cell.seed == 3]
    assert [cell.name for cell in first] == [
        "product period=1 rate=0.1",
        "product period=1 rate=0.3",
        "product period=4 rate=0.1",
        "product period=4 rate=0.3",
        "scaled period=1 rate=0.3",
        "scaled period=4 rate=0.075",
        "base",
    ]
    assert first[3].factors == {"vars.period": 4, "vars.rate": 0.3}
    assert first[3].overrides == {"vars.rate": 0.3, "vars.period": 4}
    assert first[5].config.training.batch == 3 and first[5].config.vars["rate"] == 0.075
    assert first[6].config.vars["rate"] == 0.5
    assert plan.seeds == [3, 5] and [cell.seed for cell in plan.cells] == [3] * 7 + [5] * 7
    assert [cell.config.seed for cell in plan.cells] == [cell.seed for cell in plan.cells]
    assert len({cell.fingerprint for cell in plan.cells}) == len({cell.slug for cell in plan.cells}) == 14


def test_levels_are_taken_out_one_by_one_and_added_one_by_one():
    plan = plan_ablation(
        ablation(f"""
base: {CONFIGS}/associative_recall.yaml
function: ablation_cells:parabola
cells:
  both:
    set:
      hierarchy.levels.slow: {{clock: token, period: 4, objective: {{losses.recall.mse: 1.0}}, groups: [memory],
                              rule: {{lr: 0.1}}}}
    levels: [leave_one_out, add_one_in]
""")
    )
    levels = {cell.factors["levels"]: [level.name for level in cell.config.hierarchy.levels] for cell in plan.cells}
    assert levels == {
        "all": ["surprise", "slow", "task"],
        "without surprise": ["slow", "task"],
        "without slow": ["surprise", "task"],
        "only surprise": ["surprise", "task"],
        "only slow": ["slow", "task"],
    }
    prints = {cell.factors["levels"]: cell.fingerprint for cell in plan.cells}
    assert prints["without slow"] == prints["only surprise"], "of two levels, the same computation"


def test_a_seed_that_a_config_refers_to_is_followed():
    Path("base.yaml").write_text(BASE + "task: {seed: '${seed}'}\n")
    plan = measured("parabola", seeds="[1, 7]")
    assert {(cell.seed, cell.config.task["seed"]) for cell in plan.cells} == {(1, 1), (7, 7)}


def test_overrides_of_the_command_line_are_those_of_every_cell_or_of_the_ablation():
    path = ablation(MEASURED.format(function="parabola", periods="[1, 2]", seeds="[0, 1]"))
    plan = plan_ablation(path, ["seeds=[4]", "training.batch=5", "name=mine"])
    assert plan.name == "mine" and plan.seeds == [4]
    assert [(cell.config.training.batch, cell.overrides["training.batch"]) for cell in plan.cells] == [(5, 5)] * 2


def test_names_are_as_short_as_tells_them_apart():
    assert short_names(["vars.period", "hierarchy.levels.gist.period", "seed"]) == {
        "vars.period": "vars.period",
        "hierarchy.levels.gist.period": "gist.period",
        "seed": "seed",
    }
    assert short_names(["period", "vars.period"])["period"] == "period"


# What is refused before anything runs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {vars.expension: [1, 2]}", "a.yaml:3: vars.expension: unknown key; did you mean 'expansion'?"),
        (
            "grid: {hierarchy.levels.suprise.period: [1]}",
            "a.yaml:3: hierarchy.levels.suprise: unknown key; did you mean 'surprise'?",
        ),
        ("grid: {hierarchy.levels.surprise.perid: [1]}", "surprise.perid: unknown key; did you mean 'period'?"),
        ("grid: {training.steps: [4, many]}", "a.yaml:3: training.steps: expected an integer (at least 1), not 'many'"),
        ("grid: {training.steps: [4, 0]}", "a.yaml:3: training.steps: must be at least 1, not 0 [cell 'x steps=0']"),
        ("grid: {training.steps: 4}", "a.yaml:3: cells.x.grid.training.steps: expected a list, not 4"),
        ("grid: {training.steps: []}", "a.yaml:3: cells.x.grid.training.steps: the list is empty"),
        ("grid: {training.steps: [4, 5, 4]}", "a.yaml:3: cells.x.grid.training.steps[2]: 4 is listed twice"),
        ("{set: {training.steps: 4}, grid: {training.steps: [5]}}", "cells.x.grid.training.steps: is in set too"),
        ("together: {training.steps: [4, 5], training.batch: [1]}", "cells.x.together: the lists vary together"),
        ("together: {training.steps: [4, 4], training.batch: [1, 1]}", "the columns 0 and 1 are the same"),
        ("gird: {training.steps: [4]}", "a.yaml:3: cells.x.gird: unknown key; did you mean 'grid'?"),
        ("levels: leave_one_uot", "a.yaml:3: cells.x.levels[0]: 'leave_one_uot' is not valid; did you mean 'leave_one"),
        ("levels: leave_one_out", "a.yaml:3: cells.x.levels: takes fast levels apart, and the config has surprise"),
        ("grid: {hierarchy.levels.surprise.period: [2, 3]}", "[cell 'x period=3']"),
        ("grid: {seed: [1, 2]}", "a.yaml:3: cells.x.grid.seed: every cell has the seeds that seeds lists"),
        ("grid: {task.pairs: [[4], [0]]}", "pairs must be numbers of at least 1, not [0] [cell 'x pairs=[0]']"),
        ("set: {task.nme: english}", "task.nme: task 'associative_recall' has no such option"),
        ("set: {vars.dim: 8}\nseeds: [0, 0]", "a.yaml:4: seeds[1]: 0 is listed twice"),
        ("set: {vars.dim: 8}\nseeds: [-1]", "a.yaml:4: seeds[0]: must be at least 0, not -1"),
        ("set: {vars.dim: 8}\nfunction: ablation_cells", "function: 'ablation_cells': write a function as module:func"),
        ("set: {vars.dim: 8}\nfunction: ablation_cels:slow", "function: importing ablation_cels failed"),
        (
            "set: {vars.dim: 8}\nfunction: ablation_cells:slo",
            "ablation_cells has no function 'slo'; did you mean 'slow'",
        ),
        ("set: {vars.dim: 8}\nname: a/b", "name: 'a/b' cannot name a folder"),
    ],
)
def test_what_is_wrong_with_any_cell_is_one_line_and_nothing_runs(text, message):
    family = text if text.startswith("{") else f"{{{text}}}" if "\n" not in text else text.replace("set:", "{set:", 1)
    family = family.replace("8}\n", "8}}\n", 1)
    ablation(f"base: {CONFIGS}/associative_recall.yaml\ncells:\n  x: {family}\n")
    result = invoke("a.yaml")
    assert result.exit_code == 2, result.output
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stdout == "" and not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cells: {x: {}}", "a.yaml: is no ablation; an ablation names the config that it varies, as base: ../c"),
        ("extends: base.yaml\nseed: 3", "a.yaml: is a config; an ablation names the config"),
        ("base: bas.yaml\ncells: {x: {}}", "a.yaml:1: base: bas.yaml: no such file; did you mean 'base.yaml'?"),
        ("base: base.yaml\ncells: {}", "a.yaml:2: cells: is empty"),
        ("base: base.yaml", "a.yaml: cells: is empty: name at least one family of cells"),
        ("base: base.yaml\ncells: {x/y: {}}", "'x/y' cannot name cells"),
    ],
)
def test_a_file_that_is_no_ablation_is_told(text, message):
    ablation(text)
    result = invoke("a.yaml")
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_an_override_that_no_cell_can_have_is_told():
    ablation(MEASURED.format(function="parabola", periods="[1]", seeds="[0]"))
    result = invoke("a.yaml", "training.stepz=3")
    assert result.exit_code == 2 and "command line: training.stepz: unknown key" in result.stderr


# What runs


def test_a_function_measures_the_cells(tmp_path):
    plan, seen = measured("parabola", seeds="[0, 1]"), []
    rows = run_ablation(plan, tmp_path / "f", workers=2, progress=seen.append)
    assert [(row.cell, row.seed, row.metrics["error"]) for row in rows] == [
        (f"periods period={period}", seed, (math.log2(period) - 2) ** 2 + seed)
        for seed in (0, 1)
        for period in (1, 2, 4, 8)
    ]
    assert all(row.status == "done" and row.cost["seconds"] > 0 for row in rows)
    assert all(row.cost["peak_resident_bytes"] > 1e7 for row in rows)
    assert [step.done for step in seen] == list(range(9)) and seen[-1].cells == 8 and seen[-1].last in rows
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == sorted([PLAN, CELLS, RESULTS])
    assert {json.dumps(asdict(row)) for row in rows} == set((tmp_path / "f" / RESULTS).read_text().splitlines())
    described = json.loads((tmp_path / "f" / PLAN).read_text())
    assert described["seeds"] == [0, 1] and len(described["cells"]) == 4 and described["command"]
    assert run_ablation(plan, tmp_path / "f") == rows, "nothing is missing: nothing runs"


def test_what_a_function_gives_beside_its_metrics_is_kept(tmp_path):
    (row,) = run_ablation(measured("measured", "[1]"), tmp_path / "f", workers=1)
    assert row.metrics == {"error": 1.0} and row.curves == {"loss": {"x": [1], "y": [2.0]}}
    assert row.cost["flops"] == 7 and row.more == {"gates": [[1, 0]]}


def test_cells_that_come_to_the_same_are_computed_once(tmp_path):
    text = MEASURED.format(function="slow", periods="[1, 2]", seeds="[0]") + "  again: {grid: {vars.period: [2, 4]}}\n"
    rows = run_ablation(plan_ablation(ablation(text)), tmp_path / "f", workers=2)
    assert [row.family for row in rows] == ["periods", "periods", "again", "again"]
    assert rows[1].metrics == rows[2].metrics and rows[1].factors == rows[2].factors
    assert [mark.split("-")[0] for mark in marks()] == ["1", "2", "4"]
    more = text + "  later: {grid: {vars.period: [4]}}\n"
    rows = run_ablation(plan_ablation(ablation(more)), tmp_path / "f", workers=2)
    assert rows[-1].family == "later" and len(marks()) == 3


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A small grid of trainings, run in one go."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "a.yaml").write_text(TRAINED)
    return run_ablation(plan_ablation(folder / "a.yaml"), folder / "runs", workers=1), folder / "runs"


def test_a_cell_is_a_training_measured(uninterrupted):
    rows, folder = uninterrupted
    assert [(row.seed, row.factors) for row in rows] == [
        (seed, {"hierarchy.levels.surprise.period": period}) for seed in (0, 1) for period in (1, 4)
    ]
    for row in rows:
        assert row.status == "done", row.message
        assert set(row.metrics) == {"accuracy/pairs-1", "accuracy/pairs-2", "loss/task"}
        assert (
            row.curves["loss/task"]["x"] == [1, 2, 3] and row.curves["loss/task"]["y"][-1] == row.metrics["loss/task"]
        )
        memory = "blocks.0.memory/surprise"
        assert row.curves[f"spectrum/{memory}"]["x"][-1] == 8 and row.curves[f"spectrum/{memory}"]["y"][0] > 0
        assert len(row.curves[f"delta/{memory}"]["y"]) == 16 and row.curves[f"update/{memory}"]["x"][-1] == 16
        moves = row.curves[f"update/{memory}"]["y"]
        period = row.factors["hierarchy.levels.surprise.period"]
        assert [move > 0 for move in moves] == [token % period == 0 for token in range(1, 17)]
        assert row.cost["training_flops"] > 3 * 32 * row.cost["flops_per_token"] > 0
        assert row.cost["state_bytes"] > 0 and row.cost["training_seconds"] < row.cost["seconds"]
    runs = sorted(path.name for path in (folder / CELLS).iterdir())
    assert len(runs) == 4 and runs[0].startswith("periods-period-1-seed0-")


def test_a_killed_ablation_goes_on_with_what_is_missing_and_comes_to_the_same(uninterrupted):
    ablation(TRAINED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "metamem.cli", "ablate", "a.yaml", "--workers", "1", "--resume"]
    rows = Path("runs/a") / RESULTS
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (rows.exists() and b"\n" in rows.read_bytes()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    kept = rows.read_bytes()
    with rows.open("ab") as file:
        file.write(b'{"cell": "cut of')
    finished = read_results(rows.parent)
    assert 1 <= len(finished) < 4
    before = {path: path.stat().st_mtime_ns for path in rows.parent.glob(f"{CELLS}/*/metrics.jsonl")}

    done = invoke("a.yaml", "--workers", "1", "--resume")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "runs/a: 4 of 4 cells done; see them with: metamem report runs/a\n"
    assert rows.read_bytes().startswith(kept), "what was finished was not touched"
    after = {path: path.stat().st_mtime_ns for path in rows.parent.glob(f"{CELLS}/*/metrics.jsonl")}
    slugs = [cell.slug for cell in plan_ablation("a.yaml").cells][: len(finished)]
    assert all(after[path] == before[path] for path in before if path.parent.name in slugs), "nor run again"
    whole = {(row.cell, row.seed): without_time(row) for row in uninterrupted[0]}
    assert {(row.cell, row.seed): without_time(row) for row in read_results(rows.parent)} == whole


def test_no_cell_outlives_an_ablation_that_is_killed():
    ablation(MEASURED.format(function="endless", periods="[1, 2]", seeds="[0]"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "metamem.cli", "ablate", "a.yaml", "--workers", "2"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(marks()) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    cells, deadline = {int(name) for name in marks()}, time.monotonic() + 30
    while cells := {pid for pid in cells if running(pid)}:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


# What goes wrong in a cell


def test_a_cell_that_diverges_is_recorded_with_its_step_and_the_sweep_goes_on(tmp_path):
    plan = measured("diverging")
    rows = run_ablation(plan, tmp_path / "f", workers=1)
    assert [row.status for row in rows] == ["done", "done", "diverged", "diverged"]
    assert rows[2].step == 17 and "the loss of level 'task' is nan" in rows[2].message
    assert rows[3].metrics == {"error": math.inf} and rows[3].message == "error: not finite"
    again = run_ablation(plan, tmp_path / "f", workers=1)
    assert again[3].metrics == {"error": None} and len(marks()) == 4, "a divergence is a result: it is not run again"


def test_a_training_that_diverges_says_at_which_step(tmp_path):
    lr = "hierarchy.levels.task.optimizer.lr: 1e37, training.gradient_clip: null, training.schedule: constant}}"
    text = TRAINED.replace("surprise.period: [1, 4]}}", "surprise.period: [1]}, set: {" + lr).replace("[0, 1]", "[0]")
    text = text.replace("steps: 3", "steps: 30")
    result = invoke(ablation(text), "--workers", "1")
    assert result.exit_code == 0, result.output
    (row,) = read_results(Path("runs/a"))
    assert row.status == "diverged" and 1 <= row.step <= 30
    assert f"diverged at step {row.step}: periods period=1, seed 0: step {row.step}: the " in result.stderr
    assert result.stdout.startswith("runs/a: 0 of 1 cells done")


def test_a_cell_that_raises_fails_alone_and_is_run_again_when_the_ablation_is():
    path = ablation(MEASURED.format(function="broken", periods="[1, 4, 8]", seeds="[0]"))
    result = invoke(path, "--workers", "1")
    assert result.exit_code == 1
    assert "failed: periods period=4, seed 0: KeyError: 'nothing here'" in result.stderr
    assert [row.status for row in read_results(Path("runs/a"))] == ["done", "failed", "done"]
    (log,) = (Path("runs/a") / CELLS).glob("*.log")
    assert "Traceback" in log.read_text()
    Path("marks").mkdir()
    Path("marks/mended").touch()
    assert invoke(path, "--workers", "1", "--resume").exit_code == 0
    assert not list((Path("runs/a") / CELLS).glob("*.log"))


def test_a_process_that_dies_is_tried_again_and_then_recorded(tmp_path):
    rows = run_ablation(measured("dying", "[1, 2, 4]"), tmp_path / "f", workers=1)
    assert [(row.status, row.attempts) for row in rows] == [("done", 1), ("done", 2), ("failed", 2)]
    assert rows[2].message.startswith("its process died (SIGKILL) in 2 of 2 tries")


def test_one_process_at_a_time(tmp_path):
    file = ResultsFile(tmp_path)
    with pytest.raises(UserError, match="another process is running this ablation"):
        run_ablation(measured("parabola", "[1]"), tmp_path)
    file.close()
    assert run_ablation(measured("parabola", "[1]"), tmp_path)[0].status == "done"


def test_a_line_that_is_no_row_is_told(tmp_path):
    (tmp_path / RESULTS).write_text('{"cell": "x"}\n')
    with pytest.raises(UserError, match=rf"{RESULTS}:1: not a row of an ablation"):
        read_results(tmp_path)


def test_without_resume_a_new_folder_is_made():
    path = ablation(MEASURED.format(function="parabola", periods="[1]", seeds="[0]"))
    for arguments in ([], [], ["--resume"]):
        assert invoke(path, "--workers", "1", *arguments).exit_code == 0
    assert sorted(folder.name for folder in Path("runs").iterdir()) == ["a", "a-2"]


# A full disk


def row(number=0):
    return Result(f"cell {number}", "x", {}, {}, number, f"print{number}", "done", {"error": 1.0})


@pytest.fixture
def write(monkeypatch):
    """Makes `os.write` to rows fail with ENOSPC, half of the line written, the given number of times."""
    real, failures = os.write, []

    def patched(descriptor, data):
        if failures and data[:1] == b"{":
            real(descriptor, data[: len(data) // 2])
            raise failures.pop()
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", patched)
    return lambda times: failures.extend([OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))] * times)


def test_a_row_that_has_no_space_takes_the_reserve(write, tmp_path):
    file = ResultsFile(tmp_path)
    assert (tmp_path / RESERVE).stat().st_size == 1 << 20
    file.append(row(0))
    write(1)
    file.append(row(1))
    assert file.full and read_results(tmp_path) == [row(0), row(1)]
    write(1)
    with pytest.raises(DiskFull, match="No space left on device"):
        file.append(row(2))
    assert read_results(tmp_path) == [row(0), row(1)], "no half line is left"
    file.close()


def test_a_full_disk_ends_an_ablation_in_one_line_and_loses_nothing(write):
    path = ablation(MEASURED.format(function="parabola", periods="[1, 2, 4, 8]", seeds="[0]"))
    write(1)
    result = invoke(path, "--workers", "1")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "runs/a: cannot be written: the disk is full; the rows of 1 of 4 cells are kept: make space, and go on with "
        "--resume"
    )
    assert len(read_results(Path("runs/a"))) == 1
    assert invoke(path, "--workers", "1", "--resume").exit_code == 0
    assert len(read_results(Path("runs/a"))) == 4


def test_a_cell_that_finds_the_disk_full_ends_the_ablation(tmp_path):
    with pytest.raises(DiskFull, match="the disk is full; the rows of 0 of 2 cells are kept"):
        run_ablation(measured("full", "[1, 2]"), tmp_path / "f", workers=1)


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=1800k", "tmpfs", disk], capture_output=True)
    if not made or made.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        plan = measured("large", seeds="[0, 1]")
        with pytest.raises(DiskFull, match="are kept: make space, and go on with --resume"):
            run_ablation(plan, disk / "f", workers=1)
        kept = read_results(disk / "f")
        assert 2 <= len(kept) < 8 and all(len(row.more["noise"]) == 340_000 for row in kept)
        shutil.copytree(disk / "f", tmp_path / "larger")
        rows = run_ablation(plan, tmp_path / "larger", workers=1)
        assert len(rows) == 8 and rows[: len(kept)] == kept
    finally:
        subprocess.run(["umount", disk], check=True)
