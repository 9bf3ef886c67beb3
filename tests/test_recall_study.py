"""The study of associative recall, run small: its cells are lines that a later run takes over; its figure is drawn."""

import json
import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from small_models import CONFIGS

from experiments.associative_recall import Cell, Result, best_rates, config_file, read_cells, run_cell
from metamem import load_config
from metamem.analysis import accuracy_figure

ROOT = CONFIGS.parent
QUICK = ("training.steps=2", "training.batch=2", "task.examples=4")


def study(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.associative_recall", "--smoke", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_cell_is_a_memory_swapped_in_by_one_line_trained_and_evaluated(tmp_path):
    cell = Cell("gated_delta_net", 16, 3, 2e-3, QUICK)
    config = load_config(config_file(cell, tmp_path), QUICK)
    assert (config.seed, config.vars["dim"], config.training.steps) == (3, 16, 2)
    assert next(level.optimizer.lr for level in config.hierarchy.levels if level.name == "task") == 2e-3
    assert config.network.modules["blocks"]["modules"]["memory"]["kind"] == "fast_weights"
    result = run_cell(cell, tmp_path)
    assert result.cell == cell and not result.failed
    assert list(result.accuracy) == [4, 8, 16, 32] and all(0 <= share <= 1 for share in result.accuracy.values())
    assert result.parameters > 0 and result.state_bytes > 16 * 16 * 4 and result.tokens_per_second > 0


def test_a_cell_that_diverges_says_so_and_the_others_go_on(tmp_path):
    diverging = ("training.gradient_clip=null", "training.steps=9")
    result = run_cell(Cell("delta_net", 16, 0, 1.0e30, (*QUICK, *diverging)), tmp_path)
    assert result.accuracy == {} and "is nan" in result.failed


def test_a_memory_has_the_rate_of_its_best_validation():
    tried = [
        Result(Cell("lstm", 16, 0, 0.1), {4: 1.0}, validation=0.2),
        Result(Cell("lstm", 16, 0, 0.2), {4: 0.0}, validation=0.3),
        Result(Cell("titans", 16, 0, 0.1), {}, failed="diverged"),
        Result(Cell("titans", 16, 0, 0.2), {}, failed="diverged"),
    ]
    assert best_rates(tried) == {"lstm": 0.2, "titans": 0.1}


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    line = json.dumps(
        {"cell": {"memory": "lstm", "width": 16, "seed": 0, "rate": 0.1, "overrides": ["a=1"]}, "accuracy": {"4": 0.5}}
    )
    (tmp_path / "cells.jsonl").write_text(f"{line}\n{line[:40]}")
    assert read_cells(tmp_path / "cells.jsonl") == [Result(Cell("lstm", 16, 0, 0.1, ("a=1",)), {4: 0.5})]
    assert read_cells(tmp_path / "none.jsonl") == []


@pytest.mark.slow
def test_the_study_runs_and_a_second_run_takes_over_its_cells(tmp_path):
    first = study(tmp_path, "--memories", "lstm")
    assert first.returncode == 0, first.stderr[-2000:]
    assert "SMOKE" in first.stdout.splitlines()[-1]
    folder = tmp_path / "runs" / "associative_recall-smoke"
    cells = read_cells(folder / "cells.jsonl")
    assert {cell.cell.memory for cell in cells} >= {"lstm", "delta_net"}
    assert matplotlib.image.imread(folder / "recall.png").std() > 0
    again = study(tmp_path, "--memories", "lstm", "--resume", str(folder))
    second = tmp_path / "runs" / "associative_recall-smoke-2"
    assert again.returncode == 0 and not list(second.glob("*seed*")), "no cell is trained again"
    assert (second / "rows.jsonl").read_text() == (folder / "rows.jsonl").read_text()


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_figure_has_a_panel_a_setting_and_a_line_a_method(seeds, tmp_path, monkeypatch):
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    curves = {name: np.random.default_rng(0).random((seeds, 3)) for name in ("one", "other", "attention")}
    panels = {"width 16": curves, "width 32": curves}
    accuracy_figure(panels, [4, 8, 16], tmp_path / "figure.png", "title", "pairs", apart=("attention",))
    axes = drawn[0].axes
    assert [axis.get_title() for axis in axes] == list(panels)
    for axis in axes:
        assert [line.get_label() for line in axis.lines] == list(curves)
        assert [line.get_color() == "black" for line in axis.lines] == [False, False, True]
        assert len(axis.collections) == (3 if seeds > 1 else 0)
        np.testing.assert_allclose(axis.lines[1].get_ydata(), curves["other"].mean(0))
    assert matplotlib.image.imread(tmp_path / "figure.png").std() > 0
