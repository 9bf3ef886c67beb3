"""The timing of a hierarchy, as text and as a diagram: ticks where levels fire, counted here unit by unit."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from small_models import CONFIGS, SMALL, inner_level, recurrent, write_text
from test_outer_clocks import Tasks, hierarchy
from typer.testing import CliRunner

from metamem import build, load_config
from metamem.analysis.diagram import timing_diagram
from metamem.cli import app
from metamem.config import ownership
from metamem.hierarchy import calendar_of
from metamem.hierarchy.timing import Stretch, timing, timing_text


def test_ticks_inside_a_sequence():
    inner = inner_level(period=4, unroll=2) + inner_level("later", period=8, unroll=0, groups="[ends]")
    config = recurrent(inner, "training.length=32", "training.unroll=16")
    tokens, steps = timing(config, calendar_of(config))
    assert (tokens.title, tokens.unit, tokens.length) == ("one sequence", "token", 32)
    assert list(tokens.fires["surprise"]) == [t + 1 for t in range(32)]
    assert list(tokens.fires["stream"]) == [t for t in range(1, 32) if t % 4 == 0], "none ends the sequence"
    assert list(tokens.fires["later"]) == [8, 16, 24]
    assert {name: list(cuts) for name, cuts in tokens.cuts.items()} == {
        "surprise": [16],
        "stream": [8, 16, 24],
        "later": [16],
    }
    assert list(steps.fires["task"]) == [*range(1, 9)] and steps.title == "the first 8 outer steps"


def test_a_long_sequence_is_shown_as_far_as_its_rhythm_needs():
    config = recurrent(inner_level(period=20), "training.length=1000")
    tokens = timing(config, calendar_of(config))[0]
    assert tokens.length == 40 and tokens.title == "the first 40 tokens of a sequence"
    assert list(tokens.fires["stream"]) == [20, 40]


def test_ticks_of_the_whole_training_are_those_of_its_calendar():
    config = hierarchy([("step", 3), ("epoch", 2), ("task", 1)], "training.steps=40", "training.steps_per_epoch=8")
    calendar = calendar_of(config, Tasks(15, 25))
    steps, training = timing(config, calendar)
    assert list(steps.fires["quick"]) == [3, 6] and steps.length == 8
    assert training.fires == {"middle": [16, 32, 40], "slow": [15, 40]} and training.length == 40


def test_the_text_has_a_column_a_unit_or_says_how_many():
    short = Stretch("one sequence", "token", 8, {"a": [2, 4, 6, 8], "long name": [4]}, {"a": [4]})
    lines = timing_text([short]).splitlines()
    assert lines == [
        "one sequence (| fires, x and the outer gradient is cut)",
        "  a          ·|·x·|·|",
        "  long name  ···|····",
    ]
    (head, row) = timing_text([Stretch("all", "outer step", 640, {"a": [10, 11, 640]}, {})]).splitlines()
    assert head == "all (| fires, 10 outer steps a column)"
    assert row == "  a  ||" + "·" * 61 + "|"


@pytest.fixture
def overrides(tmp_path):
    texts = [str(write_text(tmp_path / f"{i}.txt", 3000 + i)) for i in range(2)]
    small = [item for item in SMALL if not item.startswith(("vars.window", "vars.memory", "training"))]
    return [*small, f"task.sources={texts}", "task.steps_per_task=20", "training.steps=50"]


def test_check_draws_every_level_of_a_config(overrides, tmp_path):
    """The SVG holds each label once, and nothing lies outside the picture."""
    result = CliRunner().invoke(
        app, ["check", str(CONFIGS / "timescales.yaml"), *overrides, "--diagram", str(tmp_path / "t.svg")]
    )
    assert result.exit_code == 0, result.output
    assert "the whole training (| fires" in result.stdout
    assert ElementTree.fromstring((tmp_path / "t.svg").read_text()).tag.endswith("svg")
    comments = re.findall(r"<!-- (.*?) -->", (tmp_path / "t.svg").read_text())  # matplotlib's: what each glyph run says
    config = load_config(CONFIGS / "timescales.yaml")
    for level in config.hierarchy.levels:
        assert comments.count(level.name) == 1
        assert all(any(path in comment for comment in comments) for path in level.objective)
    assert {"every token", "every step", "every epoch", "every task", "outer gradient is cut"} <= set(comments)
    assert comments.count("every 16 tokens") == 2 and comments.count("inside each step") == 6


@pytest.mark.parametrize("levels", [[("step", 1)], [("step", 1), ("task", 1)]], ids=["one", "two"])
def test_a_diagram_of_few_levels_has_the_panels_that_they_need(levels, tmp_path):
    config = hierarchy(levels)
    owned = ownership(dict(build(config).named_parameters()), config.hierarchy)
    timing_diagram(config, calendar_of(config, Tasks(40, 24)), owned, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_diagram_that_cannot_be_written_is_told_before_anything_is_built(tmp_path):
    for name, told in (("t.gif", "a diagram is .svg, .png or .pdf"), ("", "is a folder; name a file in it")):
        result = CliRunner().invoke(app, ["check", "missing.yaml", "--diagram", str(tmp_path / name)])
        assert result.exit_code == 2 and told in result.stderr and len(result.stderr.splitlines()) == 1
