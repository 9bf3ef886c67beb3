"""The study of timescales, run small: a cell of each learner is measured, and what they come to is told and drawn."""

import argparse
from pathlib import Path

import matplotlib.image
import pytest
import torch

from experiments import timescale_ablation as study_of
from losses.recall import mse
from metamem import FastWeights, TokenLevel
from metamem.analysis import Study, plan_ablation
from metamem.analysis.cell import run_cell


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The first cell of each family."""
    plan = plan_ablation(study_of.CONFIG, [*study_of.SMOKE, "task.stream=400", "training.steps=1"])
    first = {cell.family: cell for cell in reversed(plan.cells)}
    folder = tmp_path_factory.mktemp("cells")
    return [run_cell(cell, plan.function, folder) for cell in first.values()]


def test_every_learner_is_measured(rows):
    families = {row.family: row for row in rows}
    assert set(families) == {*study_of.LEARNERS, "one rate"}
    for row in rows:
        assert row.status == "done", (row.family, row.message)
        excess = sum(row.metrics[f"excess/row-{number}"] for number in range(8))
        assert row.metrics["ratio"] == pytest.approx(1 + excess) and row.metrics["ratio"] > 1
        assert all(len(rates) == (8 if row.family.endswith("each row") else 1) for rates in row.more["rates"].values())
        assert ("gates" in row.more) == row.family.endswith("router")
    fixed = families["fixed router"]
    assert fixed.metrics["rank_correlation"] == pytest.approx(0.9487, abs=1e-4)  # two speeds share a level
    assert torch.tensor(fixed.more["gates"]).sum(0).tolist() == [2, 4, 2]
    assert "rank_correlation" not in families["three levels"].metrics


def test_timescales_are_mean_periods_by_the_gates():
    levels = [TokenLevel(f"every{period}", {mse: 1.0}, period=period) for period in (1, 4, 16)]
    memory = FastWeights(8, levels, chunk=4)
    gates = [[1.0, 0, 0], [0, 0.2, 0.2], [0.1, 0.1, 0.1], [0, 0, 0.5]]
    assert study_of.timescales(memory, {"gates": gates}) == pytest.approx([0, 3, 2, 4])
    rows = {"level_half_lives": {"only": [2.0, 9.0]}}
    assert study_of.timescales(memory, rows) == [2.0, 9.0]
    assert study_of.timescales(memory, {"level_half_lives": {"only": [2.0]}}) == []


def test_half_lives_are_in_tokens_whatever_the_period():
    levels = [TokenLevel(f"every{period}", {mse: 1.0}, period=period, lr=0.1, forget=0.5) for period in (1, 4)]
    learned = study_of.levels_of(FastWeights(8, levels, heads=2, chunk=4), torch.randn(1, 5, 8))
    assert learned["level_half_lives"] == {"every1": pytest.approx([1, 1]), "every4": pytest.approx([4, 4])}
    assert learned["rates"]["every1"] == pytest.approx([0.1, 0.1])


def test_what_is_found_is_told_and_drawn(rows, tmp_path, capsys):
    study = Study("timescale_ablation", tmp_path, argparse.Namespace(smoke=False, json=None))
    study_of.tables(study, rows)
    study_of.figure(rows, tmp_path / "timescales.png")
    assert matplotlib.image.imread(tmp_path / "timescales.png").shape[1] > 1500
    told = (tmp_path / "table.md").read_text()
    for family in study_of.LEARNERS:
        assert f"| {family} |" in told
    claims = study_of.claims(rows)
    assert claims[0].value == next(row.metrics["ratio"] for row in rows if row.family == study_of.ROUTED)
    study.verdict(claims)
    assert capsys.readouterr().out.splitlines()[-1].startswith(("SHORT: ", "PASS: "))
    assert {row.what for row in study.rows} >= set(study_of.LEARNERS)


def test_the_config_names_the_studys_own_function():
    module, _, name = plan_ablation(study_of.CONFIG, study_of.SMOKE).function.partition(":")
    assert Path(f"{module.replace('.', '/')}.py") == Path("experiments/timescale_ablation.py")
    assert getattr(study_of, name) is study_of.measure
