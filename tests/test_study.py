"""Studies: one command line, rows, a verdict on the last line; and the quickstart, run small."""

import argparse
import json
import math
import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from small_models import CONFIGS

from metamem import load_run
from metamem.analysis import Claim, Study, open_study, stream_figure
from metamem.tasks.english import TRANSLATIONS
from metamem.training.run_folder import new_folder

ROOT = CONFIGS.parent
SMOKE = "SMOKE (figures of a small run decide nothing)"


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens a study as its command line would."""

    def of(*arguments, **settings):
        monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
        return open_study("mine", "A study.", root=tmp_path / "runs", **settings)

    return of


def test_the_command_line_of_a_study(opened, tmp_path):
    study = opened()
    assert not study.smoke and study.seeds == range(1) and study.options.json is None
    assert study.folder == tmp_path / "runs" / "mine" and study.folder.is_dir()
    assert opened(seeds=3).folder.name == "mine-2"
    assert opened("--seeds", "2", seeds=3).seeds == range(2)
    small = opened("--smoke", "--width", "5", options=lambda parser: parser.add_argument("--width", type=int))
    assert small.smoke and small.folder.name == "mine-smoke" and small.options.width == 5


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--seeds", "few"], ["--smok", "--seed"], ["more"]])
def test_a_wrong_command_line_makes_no_folder(arguments, opened, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        opened(*arguments)
    assert ended.value.code == 2 and not (tmp_path / "runs").exists()
    assert "error: " in capsys.readouterr().err


def test_help_names_the_options(opened, capsys):
    with pytest.raises(SystemExit) as ended:
        opened("--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(option in text for option in ("--smoke", "--seeds N", "--json FILE"))


def test_rows_are_json_lines_in_the_folder_and_where_asked(opened, tmp_path):
    study = opened("--json", str(tmp_path / "results" / "rows.jsonl"))
    study.add("bits per byte, tyn", 1.91, "bits/byte", against="reset", ratio=0.86)
    study.add("seconds", 3, "s")
    assert study.verdict([]) == 0
    text = (study.folder / "rows.jsonl").read_text()
    assert (tmp_path / "results" / "rows.jsonl").read_text() == text
    assert [json.loads(line) for line in text.splitlines()] == [
        {"what": "bits per byte, tyn", "value": 1.91, "unit": "bits/byte", "against": "reset", "ratio": 0.86},
        {"what": "seconds", "value": 3, "unit": "s", "against": None, "ratio": None},
    ]


@pytest.mark.parametrize(
    ("arguments", "claims", "code", "line"),
    [
        ([], [Claim("gain", 0.14, 0.1)], 0, "PASS: gain 0.14 (≥ 0.1)"),
        ([], [Claim("gain", 0, 0), Claim("cost", 1, 1, at_most=True)], 0, "PASS: gain 0 (≥ 0); cost 1 (≤ 1)"),
        ([], [Claim("gain", 0.04, 0.1)], 1, "SHORT: gain 0.04 (≥ 0.1) short"),
        ([], [Claim("gain", 1, 0), Claim("cost", 2, 1, at_most=True)], 1, "SHORT: gain 1 (≥ 0); cost 2 (≤ 1) short"),
        ([], [Claim("gain", math.nan, 0.1)], 1, "SHORT: gain nan (≥ 0.1) short"),
        ([], [Claim("cost", math.nan, 0.1, at_most=True)], 1, "SHORT: cost nan (≤ 0.1) short"),
        (["--smoke"], [Claim("gain", 0.04, 0.1)], 0, f"{SMOKE}: gain 0.04 (≥ 0.1) short"),
    ],
)
def test_the_verdict_is_the_last_line_and_the_exit_code(arguments, claims, code, line, opened, capsys):
    study = opened(*arguments)
    assert study.verdict(claims) == code
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"results in {study.folder}", line]


def test_tables_are_printed_and_kept_one_after_the_other(opened, capsys):
    study = opened()
    study.table("First", ["", "tyn", "wyc"], [["carried", "1.91", "2.20"], ["reset", "2.01", "2.31"]])
    study.table("Second", ["what"], [["more"]])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("First", "carried", "2.31", "Second", "more"))
    kept = (study.folder / "table.md").read_text().split("\n\n")
    assert kept[0] == "**First**"
    assert kept[1].splitlines() == [
        "|  | tyn | wyc |",
        "|---|---|---|",
        "| carried | 1.91 | 2.20 |",
        "| reset | 2.01 | 2.31 |",
    ]
    assert kept[2] == "**Second**"


def test_a_new_folder_is_never_one_that_is_there(tmp_path):
    folders = [new_folder(tmp_path / "deep" / "runs", "one") for _ in range(3)]
    assert [folder.name for folder in folders] == ["one", "one-2", "one-3"]
    (tmp_path / "deep" / "runs" / "file").write_text("")
    assert new_folder(tmp_path / "deep" / "runs", "file").name == "file-2"


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_figure_of_streams_is_a_png(seeds, tmp_path):
    curves = {name: {method: np.random.rand(seeds, 500) for method in ("reset", "carried")} for name in ("tyn", "wyc")}
    stream_figure(curves, tmp_path / "stream.png", "Title", window=64)
    height, width, channels = matplotlib.image.imread(tmp_path / "stream.png").shape
    assert (height > 400, width > 1000, channels) == (True, True, 4)
    assert 10_000 < (tmp_path / "stream.png").stat().st_size < 1_000_000


def test_a_figure_of_a_stream_shorter_than_its_window(tmp_path):
    stream_figure({"tyn": {"reset": np.random.rand(1, 20)}}, tmp_path / "stream.png", "Title")
    assert (tmp_path / "stream.png").stat().st_size > 10_000


def test_a_study_can_be_made_without_a_command_line(tmp_path):
    study = Study("mine", tmp_path, argparse.Namespace(smoke=True, seeds=2, json=None))
    assert study.verdict([]) == 0 and study.seeds == range(2)


def test_the_quickstart_runs_small(tmp_path):
    for name in TRANSLATIONS:
        pytest.importorskip(f"pythonbible_{name}", reason='needs pip install "metamem-torch[data]"')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    command = [sys.executable, str(ROOT / "experiments" / "quickstart.py"), "--smoke", "--json", "rows.jsonl"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "runs"]
    methods = ["writes off", "reset", "carried", "adapting", "no memory", "no memory + SGD", "no memory + Adam"]
    assert all(method in result.stdout for method in methods) and "Bits per byte" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"{SMOKE}: tyn: adapting below")

    folder = tmp_path / "runs" / "quickstart-smoke"
    assert (folder / "stream.png").stat().st_size > 20_000 and (folder / "table.md").exists()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert (folder / "rows.jsonl").read_text() == (tmp_path / "rows.jsonl").read_text()
    bits = {row["what"]: row["value"] for row in rows if row["unit"] == "bits/byte"}
    assert set(bits) == {f"{method}, {stream}" for method in methods for stream in ("tyn", "wyc", "web")}
    assert all(4 < value < 9 for value in bits.values())  # of four steps: not far from the 8 of knowing nothing
    for name in ("quickstart", "quickstart_memoryless"):
        model, config = load_run(folder / f"{name}-seed0")
        assert config.training.steps == 4 and model.dim_out == 256
        assert (folder / f"{name}-seed0" / "metrics.jsonl").read_text().count("\n") == 1
