"""The report: numbers against plain ones, and a page that a browser opens without asking for anything else."""

import csv
import json
import math
import re
import shutil
import statistics
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from small_models import small_quickstart, write_text
from typer.testing import CliRunner

import metamem.cli as cli
from metamem import UserError, train
from metamem.analysis.ablation import PLAN
from metamem.analysis.figures import numeric_factors, quality
from metamem.analysis.groups import Group, read_source
from metamem.analysis.report import FIGURES, REPORT, write_report
from metamem.analysis.results import RESULTS, Result
from metamem.analysis.statistics import interval, t_quantile

SEEDS, PERIODS = (0, 1, 2), (1, 4, 16)
MEMORY = "blocks.0.memory"


def error(family, period, seed):
    return 1.5 + (0.1 if family == "mean" else 0.0) + 0.05 * period + 0.02 * seed * (-1) ** period


def curves(period, seed):
    tokens, lags = list(range(1, 33)), [1, 2, 4, 8, 16]
    found = {"loss/task": {"x": [10, 20, 30], "y": [3.0, 2.0, 1.5 + 0.1 * seed]}}
    for level, life in (("quick", 3.0), ("slow", 40.0)):
        found[f"delta/{MEMORY}/{level}"] = {"x": tokens, "y": [t**0.5 for t in tokens]}
        found[f"update/{MEMORY}/{level}"] = {"x": tokens, "y": [0.1 + 0.01 * seed] * 32}
        found[f"gates/{MEMORY}/{level}"] = {"x": tokens, "y": [[0.2, t / 32] for t in tokens]}
        decay = [0.7 * 2 ** (-lag / life) for lag in lags]
        found[f"spectrum/{MEMORY}/{level}"] = {"x": lags, "y": decay, "period": 1}
    return found


def rows():
    made = []

    def add(family, factors, seed, **given):
        name = " ".join([family, *(f"{key.split('.')[-1]}={value}" for key, value in factors.items())])
        given = {"status": "done", **given}
        made.append(Result(name, family, factors, factors, seed, f"{name}-{seed}", **given))

    for seed in SEEDS:
        for family in ("sum", "mean"):
            for period in PERIODS:
                cost = {"seconds": 2.0 + seed, "training_flops": 1e6 * period, "state_bytes": 512.0}
                metrics = {
                    "error": error(family, period, seed),
                    "optimum/error": 1.2,
                    "error/row-0": 1.0,
                    "loss/task": 2.0,
                }
                given = {"metrics": metrics, "cost": cost, "curves": curves(period, seed)}
                add(family, {"vars.period": period}, seed, **given)
        for index, levels in enumerate(("all", "without slow", "only slow")):
            add("levels", {"levels": levels}, seed, metrics={"error": 1.5 + 0.2 * index + 0.3 * seed})
    add("broken", {}, 0, status="diverged", step=17, message="step 17: the loss of level <'task'> is nan")
    return made


def known(folder):
    """An ablation's folder with rows of known numbers."""
    folder.mkdir(parents=True)
    made = rows()
    (folder / RESULTS).write_text("".join(json.dumps(asdict(row)) + "\n" for row in made))
    cells = {row.cell: {"name": row.cell, "family": row.family, "factors": row.factors} for row in made}
    about = {
        "name": "known & <bold>",
        "source": "known.yaml",
        "base": "base.yaml",
        "function": None,
        "command": "metamem",
    }
    about |= {"cells": [cell | {"overrides": {"vars.rate": 0.1}} for cell in cells.values()], "seeds": list(SEEDS)}
    about |= {"fingerprints": [row.fingerprint for row in made], "config": "seed: 0\nname: '<x>'\n", "versions": {}}
    (folder / PLAN).write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of it: its path."""
    folder = known(tmp_path_factory.mktemp("runs") / "known")
    path = write_report([folder])
    assert path == folder / "report" / REPORT
    return path


@pytest.fixture
def folder(tmp_path):
    """One that a test may change."""
    return known(tmp_path / "known")


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """What a page holds: its text, and all that it could ask for."""

    def __init__(self, text):
        super().__init__()
        self.text, self.asked, self.tags = "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.asked += [
            value for key, value in attributes if key in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]

    def handle_data(self, data):
        self.text += data


# Numbers


def test_quantiles_of_students_t():
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 29: 2.0452, 30: 2.0423}
    assert {degrees: round(t_quantile(0.975, degrees), 4) for degrees in known} == known


@pytest.mark.parametrize("degrees", [1, 2, 5, 8])
def test_a_quantile_leaves_its_share_of_the_density(degrees):
    top = t_quantile(0.95, degrees)
    x = np.linspace(0, top, 20_001)
    norm = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    density = norm * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(0.45, abs=1e-6)


def test_an_interval_of_normal_values_holds_the_mean_as_often_as_it_says():
    drawn = np.random.default_rng(0).normal(3, 2, size=(4000, 4))
    held = [abs(interval(values.tolist()).mean - 3) <= interval(values.tolist()).reach for values in drawn]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)
    assert math.isnan(interval([1.0]).reach) and str(interval([1.0])) == "1"
    assert str(interval([1.0, 1.2, 1.1])) == "1.10 ± 0.25"


def test_quality_is_the_mean_over_seeds_with_its_interval(report):
    found = table(report.parent / FIGURES / "quality-period.csv")
    assert [(row["line"], float(row["period"])) for row in found] == [(f, p) for f in ("sum", "mean") for p in PERIODS]
    for row in found:
        values = [error(row["line"], int(row["period"]), seed) for seed in SEEDS]
        assert row["metric"] == "error" and int(row["seeds"]) == 3
        assert float(row["mean"]) == pytest.approx(statistics.fmean(values))
        reach = 4.302653 * statistics.stdev(values) / math.sqrt(3)
        assert float(row["95 % reach"]) == pytest.approx(reach, rel=1e-5)


def test_the_gain_of_a_level_is_taken_seed_by_seed(report):
    found = {row["cell"]: row for row in table(report.parent / FIGURES / "levels.csv")}
    without = found["levels levels=without slow"]
    assert float(without["difference to all mean"]) == pytest.approx(0.2)
    assert float(without["difference to all 95 % reach"]) == pytest.approx(0, abs=1e-9)
    assert float(without["95 % reach"]) > 0.5, "the seeds differ more than the levels do"


def test_half_lives_are_those_of_the_spectra(report):
    found = table(report.parent / FIGURES / "spectrum.csv")
    lives = {row["level"]: float(row["half-life"]) for row in found}
    assert lives == {f"{MEMORY}/quick": pytest.approx(3.0), f"{MEMORY}/slow": pytest.approx(40.0)}


# The page


def test_every_figure_is_in_the_page_and_beside_it_as_png_and_csv(report):
    names = ["cells", "cost", "gates", "learning", "levels", "levels-along-a-sequence", "quality-period", "spectrum"]
    files = sorted(file.name for file in (report.parent / FIGURES).iterdir())
    assert files == sorted(f"{name}.{kind}" for name in names for kind in ("csv", "png"))
    page = Page(report.read_text())
    assert page.tags.count("svg") == page.tags.count("figure") == len(names)
    for index, name in enumerate(names):
        assert table(report.parent / FIGURES / f"{name}.csv"), name
        image = matplotlib.image.imread(report.parent / FIGURES / f"{name}.png")
        assert min(image.shape[:2]) > 300 and image[..., :3].std() > 0.03
        assert f"Figure {index + 1}." in page.text and f"{FIGURES}/{name}.png" in page.text


def test_the_page_says_what_was_run_and_what_came_of_it(report):
    page = Page(report.read_text())
    flat = " ".join(page.text.split())
    assert "known & <bold>" in flat and "<x>" in flat, "text is escaped"
    assert "known.yaml, over base.yaml" in flat and "0, 1, 2" in flat
    assert "28 rows of 10 cells: 27 done, 1 diverged" in flat
    assert "17" in flat and "step 17: the loss of level <'task'> is nan" in flat
    assert "Bayes optimum: error 1.2" in flat
    values = [error("sum", 4, seed) for seed in SEEDS]
    assert f"{interval(values)}" in flat and "half-life, quick" in flat


def test_the_page_asks_for_nothing_else(report):
    text = report.read_text()
    page = Page(text)
    assert [asked for asked in page.asked if not asked.startswith(("#", "data:"))] == []
    assert not re.search(r"url\((?!#)|@import|@font-face", text) and "script" not in page.tags
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "no figure takes another's marks"
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert wanted <= set(ids)


def test_figures_follow_the_colours_of_the_page(report):
    text = report.read_text()
    assert "prefers-color-scheme: dark" in text and "currentColor" in text and "#2b2b2b" not in text


def test_a_metric_is_chosen_by_its_name(folder, tmp_path):
    path = write_report([folder], tmp_path / "elsewhere", ["error/row-0"])
    assert path == tmp_path / "elsewhere" / REPORT
    assert {row["metric"] for row in table(path.parent / FIGURES / "quality-period.csv")} == {"error/row-0"}
    with pytest.raises(UserError, match="no cell has a metric 'eror'; there is error, error/row-0, loss/task"):
        write_report([folder], tmp_path / "not", ["eror"])
    assert not (tmp_path / "not").exists()


def test_rows_of_another_plan_and_earlier_failures_are_left_out(folder):
    first = rows()[0]
    failed = Result(first.cell, first.family, first.factors, {}, 0, first.fingerprint, "failed", message="before")
    other = Result("gone", "gone", {}, {}, 0, "other", "done", {"error": 9.0})
    lines = [json.dumps(asdict(row)) + "\n" for row in (failed, other)]
    (folder / RESULTS).write_text(lines[0] + lines[1] + (folder / RESULTS).read_text())
    groups = read_source(folder).groups
    assert "gone" not in [group.name for group in groups]
    assert [row.status for row in groups[0].rows] == ["done"] * 3


def test_trainings_are_reported_too(tmp_path):
    text = write_text(tmp_path / "text.txt")
    folders = []
    for seed in (0, 1):
        config = small_quickstart(
            f"task.path={text}", "training.steps=4", "training.log_every=1", f"seed={seed}", "name=q"
        )
        folders.append(train(config, tmp_path / "runs").folder)
    result = CliRunner().invoke(cli.app, ["report", *map(str, folders), "--to", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'report' / REPORT}\n"
    found = table(tmp_path / "report" / FIGURES / "learning.csv")
    assert [int(row["step"]) for row in found] == [1, 2, 3, 4] and {row["seeds"] for row in found} == {"2"}
    assert "2 of 2" in Page((tmp_path / "report" / REPORT).read_text()).text


def test_what_is_no_run_is_one_line(tmp_path):
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert f"{tmp_path}: neither an ablation nor a run" in result.stderr
    (tmp_path / PLAN).write_text(
        json.dumps(
            {"name": "x", "source": "x.yaml", "base": None, "config": "", "seeds": [0], "cells": [], "fingerprints": []}
        )
    )
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "no cell is finished yet" in result.stderr


# A browser

BROWSER = shutil.which("chromium")


def console(path, shot):
    """What a headless Chromium logs to its console as it opens a page, and the page as it then stands."""
    settings = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    settings += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
    settings += [f"--user-data-dir={shot.parent / 'profile'}", "--enable-logging=stderr", "--log-level=0"]
    opened = {}
    for action in ("--dump-dom", f"--screenshot={shot}"):
        command = [BROWSER, *settings, "--window-size=1200,2000", action, path.absolute().as_uri()]
        opened[action] = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert opened[action].returncode == 0, opened[action].stderr[-2000:]
    logged = [line for done in opened.values() for line in done.stderr.splitlines() if "CONSOLE" in line]
    return logged, opened["--dump-dom"].stdout


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: Debian's package chromium")
def test_a_browser_opens_the_page_without_an_error_or_a_request(report, tmp_path):
    logged, shown = console(report, tmp_path / "shot.png")
    assert logged == [] and "Figure 8." in shown
    image = matplotlib.image.imread(tmp_path / "shot.png")
    assert image.shape[:2] == (2000, 1200) and image[..., :3].std() > 0.02
    # The page's own policy makes a request off it an error: seen where there is one.
    text = report.read_text().replace("</main>", '<img src="http://127.0.0.1:9/off.png"></main>')
    (tmp_path / "asking.html").write_text(text)
    logged, _ = console(tmp_path / "asking.html", tmp_path / "asking.png")
    assert any("Content Security Policy" in line for line in logged)


def test_a_factor_that_goes_with_another_parts_no_line():
    """As rates set for each period; those of a grid do."""

    def group(family, period, rate):
        row = Result(f"{family}-{period}-{rate}", family, {}, {}, 0, "", "done", {"error": period + rate, "none": None})
        return Group(row.cell, family, {"level.period": period, "level.lr": rate}, (row,))

    together = [group("tuned", period, 1 / period) for period in (1, 4, 16)]
    assert numeric_factors(together) == ["level.period"]
    figure = quality(together, ["error", "none"], "level.period")
    assert {row["line"] for row in figure.table} == {"tuned"} and len(figure.table) == 3
    assert [axis.get_ylabel() for axis in figure.drawing.axes] == ["error"]
    grid = [group("grid", period, rate) for period in (1, 4) for rate in (0.1, 0.2)]
    assert numeric_factors(grid) == ["level.period", "level.lr"]
    assert {row["line"] for row in quality(grid, ["error"], "level.period").table} == {"grid lr=0.1", "grid lr=0.2"}
    assert numeric_factors([*grid, *together]) == ["level.period", "level.lr"]
