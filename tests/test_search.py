"""Searches: what is chosen, that rows are all of their memory, and what is refused before anything runs."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
from small_models import CONFIGS
from test_ablation import BASE, ablation
from typer.testing import CliRunner

import metamem.cli as cli
from metamem import ConfigError, UserError
from metamem.analysis import plan_ablation, run_ablation, write_report
from metamem.analysis.ablation import PLAN
from metamem.analysis.cell import run_cell
from metamem.analysis.results import RESULTS, read_results
from metamem.analysis.search import Told, best, suggest
from metamem.config.ablation import SearchConfig

SEARCHED = """
base: base.yaml
seeds: {seeds}
function: ablation_cells:bowl
search:
  trials: {trials}
  sampler: {sampler}
  space: {{vars.rate: {{low: 0.001, high: 100, log: true}},
          vars.period: {{low: 1, high: 64, log: true, integer: true}}}}
  {goal}
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("base.yaml").write_text(BASE)


class Here:
    """A launcher that runs cells in this process: `width` at once, of which the last that began ends first."""

    def __init__(self, width=1, most=10**9):
        self.width, self.most, self.ran = width, most, []

    def run(self, cells, sweep):
        running = []
        while True:
            while len(running) < self.width and (cell := next(cells, None)):
                running.append(cell)
            if not running:
                return
            if len(self.ran) == self.most:
                raise KeyboardInterrupt
            cell = running.pop()
            self.ran.append(cell.name)
            yield [(cell, run_cell(cell, sweep.function, sweep.folder))]


def plan(trials=30, sampler="tpe", seeds="[0]", goal="minimise: error", more=""):
    return plan_ablation(ablation(SEARCHED.format(trials=trials, sampler=sampler, seeds=seeds, goal=goal) + more))


def points(rows):
    return [tuple(row.factors.values()) for row in rows]


def test_a_search_comes_near_the_best_and_nearer_than_chance():
    """The same bowl as the cells', in closed form."""
    late = {}
    for sampler in ("tpe", "random"):
        settings, told = plan(1, sampler).search.settings, []
        for number in range(60):
            values = suggest(settings, told, number)
            error = math.log10(values["vars.rate"] / 0.1) ** 2 + math.log2(values["vars.period"] / 8) ** 2
            told.append(Told(values, math.nan if values["vars.rate"] > 10 else error))
        scores = [one.score for one in told[30:] if not math.isnan(one.score)]
        late[sampler] = sum(scores) / len(scores)
    assert late["tpe"] < 0.6 * late["random"], late


def test_points_are_in_the_space_and_told_by_few_digits(tmp_path):
    for row in run_ablation(plan(12, "random"), tmp_path / "f", launcher=Here()):
        rate, period = row.factors["vars.rate"], row.factors["vars.period"]
        assert 0.001 <= rate <= 100 and float(f"{rate:.4g}") == rate
        assert type(period) is int and 1 <= period <= 64
        assert row.overrides == row.factors and row.family == "search"
        assert re.fullmatch(rf"search \d+ rate={rate!r} period={period}", row.cell)
        assert (row.status == "diverged") == (rate > 10)


def test_a_metric_is_maximised_too(tmp_path):
    searched = plan(12, goal="maximise: score")
    rows = run_ablation(searched, tmp_path / "f", launcher=Here())
    name, score = best(searched.search, rows)
    assert name.startswith("search ")
    assert score == max(row.metrics["score"] for row in rows if row.status == "done")


@pytest.mark.slow
def test_a_search_that_was_stopped_comes_to_the_same_points(tmp_path):
    whole = run_ablation(plan(14), tmp_path / "whole", launcher=Here())
    for stopped in (1, 11, 14):
        folder, first = tmp_path / str(stopped), Here(most=stopped)
        if stopped < 14:
            with pytest.raises(KeyboardInterrupt):
                run_ablation(plan(14), folder, launcher=first)
        else:
            run_ablation(plan(14), folder, launcher=first)
        again = Here()
        assert points(run_ablation(plan(14), folder, launcher=again)) == points(whole)
        assert len(first.ran) == stopped and len(again.ran) == 14 - stopped, "nothing is run twice"


@pytest.mark.slow
def test_points_that_run_at_once_differ_and_go_on_where_they_stopped(tmp_path):
    folder, first = tmp_path / "f", Here(width=4, most=9)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(plan(20), folder, launcher=first)
    kept = read_results(folder)
    again = Here(width=4)
    rows = run_ablation(plan(20), folder, launcher=again)
    assert len(kept) == 9 and len(again.ran) == 11
    assert {row.cell for row in kept} <= {row.cell for row in rows}
    assert len(set(points(rows))) == 20
    more = run_ablation(plan(25), folder, launcher=Here())
    assert points(more)[:20] == points(rows) and len(more) == 25, "more trials go on from the rows"


def test_a_point_is_the_mean_over_seeds(tmp_path):
    searched = plan(5, seeds="[0, 4]")
    rows = run_ablation(searched, tmp_path / "f", launcher=Here())
    assert [row.seed for row in rows] == [0, 4] * 5
    name, score = best(searched.search, rows)
    of = [row.metrics["error"] for row in rows if row.cell == name]
    assert score == sum(of) / 2 and of[1] == of[0] + 4


def test_the_same_point_twice_is_computed_once(tmp_path):
    text = SEARCHED.format(trials=12, sampler="tpe", seeds="[0]", goal="minimise: error")
    text = re.sub(r"space: .*\n.*", "space: {vars.period: [1, 8], vars.rate: [0.1]}", text)
    here = Here()
    rows = run_ablation(plan_ablation(ablation(text)), tmp_path / "f", launcher=here)
    assert len(rows) == 12 and len(here.ran) == 2


def test_values_of_any_kind_can_be_chosen_from(tmp_path):
    extras = [[1, 2], {"a": 3}, None, True, 1]
    text = SEARCHED.format(trials=12, sampler="random", seeds="[0]", goal="minimise: error")
    text = re.sub(r"space: .*\n.*", f"space: {{vars.rate: [0.1, 1], vars.extra: {json.dumps(extras)}}}", text)
    Path("base.yaml").write_text(BASE.replace("period: 1", "extra: null, period: 8"))
    rows = run_ablation(plan_ablation(ablation(text)), tmp_path / "f", launcher=Here())
    chosen = [json.dumps(row.factors["vars.extra"]) for row in rows]
    assert set(chosen) <= set(map(json.dumps, extras)) and {"true", "1"} & set(chosen) and len(set(chosen)) > 2


def test_a_point_that_no_config_can_have_is_told_and_not_run(tmp_path):
    Path("b.yaml").write_text(f"extends: {CONFIGS}/associative_recall.yaml\nvars: {{period: 1}}\n")
    text = """
base: b.yaml
function: ablation_cells:parabola
search:
  trials: 8
  space: {hierarchy.levels.surprise.period: [4, 12], vars.chunk: [4, 8]}
  minimise: error
"""
    here = Here()
    rows = run_ablation(plan_ablation(ablation(text)), tmp_path / "f", launcher=here)
    refused = [row for row in rows if row.status == "failed"]
    assert refused and all(row.factors == {"hierarchy.levels.surprise.period": 12, "vars.chunk": 8} for row in refused)
    assert all("[cell 'search " in row.message for row in refused)
    assert len(rows) == 8 and not set(here.ran) & {row.cell for row in refused}
    again = run_ablation(plan_ablation(ablation(text)), tmp_path / "f", launcher=Here())
    assert again == rows and len(read_results(tmp_path / "f")) == len(set(map(str, rows)))


def test_a_grid_may_stand_beside_a_search(tmp_path):
    searched = plan(3, more="cells: {known: {grid: {vars.rate: [0.1, 1.0]}}}\n")
    rows = run_ablation(searched, tmp_path / "f", launcher=Here())
    assert [row.family for row in rows] == ["known"] * 2 + ["search"] * 3


def test_a_suggestion_is_a_function_of_the_rows_seed_and_number():
    settings = SearchConfig(trials=9, space={"a": [1, 2, 3, 4, 5, 6, 7, 8]}, minimise="x")
    told = [Told({"a": a}, float(a)) for a in range(1, 9)] + [Told({"a": 3}, None), Told({"a": 2}, math.nan)]
    chosen = [suggest(settings, told, number) for number in range(6)]
    assert chosen == [suggest(settings, told, number) for number in range(6)] and len({c["a"] for c in chosen}) > 1


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("minimise: error", ""), "a.yaml:5: search: minimise a metric, or maximise one: name it there"),
        (("minimise: error", "minimise: error\n  maximise: x"), "search: minimise a metric, or maximise one"),
        (("minimise", "minimize"), "a.yaml:10: search.minimize: unknown key; did you mean 'minimise'?"),
        (("tpe", "tpee"), "search.sampler: 'tpee' is not valid; did you mean 'tpe'? (tpe, random)"),
        (("trials: 3", "trials: 0"), "a.yaml:6: search.trials: must be at least 1, not 0"),
        (("low: 0.001, ", ""), "search.space.vars.rate.low: is missing: give a number"),
        (("low: 0.001", "low: 200"), "search.space.vars.rate.high: must be above low, 200, not 100"),
        (("low: 0.001", "low: 0"), "search.space.vars.rate.low: must be above 0 for a logarithm, not 0"),
        (("low: 1,", "low: 1.5,"), "search.space.vars.period.low: must be an integer, as integer is true, not 1.5"),
        (("low: 0.001", "lwo: 0.001"), "search.space.vars.rate.lwo: unknown key; did you mean 'low'?"),
        (("vars.rate", "vars.rat"), "a.yaml:8: vars.rat: unknown key; did you mean 'rate'?"),
        (("vars.rate", "seed"), "search.space.seed: every cell has the seeds that seeds lists"),
        (
            ("vars.rate", "training.steps"),
            "a.yaml:8: training.steps: expected an integer (at least 1), not 0.001",
        ),
        (
            ("vars.rate: {low: 0.001, high: 100, log: true}", "vars.rate: []"),
            "search.space.vars.rate: the list is empty",
        ),
        (("vars.rate: {low: 0.001, high: 100, log: true}", "vars.rate: [1, 1]"), "vars.rate[1]: 1 is listed twice"),
        (("vars.rate: {low: 0.001, high: 100, log: true}", "task.nme: [a]"), "task 'associative_recall' has no such"),
        (("search:", "cells: {search: {}}\nsearch:"), "cells.search: is what the cells of the search are called"),
        (("search:", "set: {vars.rate: 1}\nsearch:"), "search.space.vars.rate: is in set too"),
    ],
)
def test_what_is_wrong_with_a_search_is_one_line_and_nothing_runs(change, message):
    text = SEARCHED.format(trials=3, sampler="tpe", seeds="[0]", goal="minimise: error")
    assert change[0] in text
    ablation(text.replace(*change))
    result = CliRunner().invoke(cli.app, ["ablate", "a.yaml"])
    assert result.exit_code == 2, result.output
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not Path("runs").exists()


def test_a_metric_that_cells_do_not_have_is_told_after_the_first(tmp_path):
    here = Here()
    with pytest.raises(ConfigError, match=re.escape("search.minimise: no cell has a metric 'eror'; did you mean")):
        run_ablation(plan(9, goal="minimise: eror"), tmp_path / "f", launcher=here)
    rows = read_results(tmp_path / "f")
    assert [row.status for row in rows] == ["diverged", "done"] and len(here.ran) == 2, "what finished is kept"


def test_a_metric_that_is_no_number_scores_nothing(tmp_path):
    searched = plan(3, goal="minimise: none")
    assert best(searched.search, run_ablation(searched, tmp_path / "f", launcher=Here())) is None


def test_without_optuna_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=re.escape("a search needs Optuna: pip install 'metamem-torch[optuna]'")):
        plan()


# On the command line, and in the report


def test_the_command_line_runs_a_search_and_names_its_best_and_the_report_shows_it():
    ablation(SEARCHED.format(trials=9, sampler="tpe", seeds="[0, 1]", goal="minimise: error"))
    done = CliRunner().invoke(cli.app, ["ablate", "a.yaml", "search.trials=3", "--workers", "2"])
    assert done.exit_code == 0, done.output
    told, counted = done.stdout.splitlines()
    assert re.fullmatch(r"best error: [\d.]+, search \d rate=\S+ period=\d+", told)
    assert counted.startswith("runs/a: ") and " of 6 cells done" in counted
    described = json.loads((Path("runs/a") / PLAN).read_text())
    assert described["search"]["minimise"] == "error" and len(described["cells"]) == 3
    assert len((Path("runs/a") / RESULTS).read_text().splitlines()) == 6
    page = write_report([Path("runs/a")]).read_text()
    assert "The points of the search" in page and "tpe, 3 points, to minimise error" in page
    table = (Path("runs/a/report/figures") / "search.csv").read_text().splitlines()
    assert table[0] == "trial,rate,period,error" and len(table) > 1
