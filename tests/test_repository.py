"""Habits that a reader relies on: what the files say of each other, and what no file may say."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Written in pieces, so that this file does not name what it looks for.
REGISTRIES = re.compile("|".join(["pypi" + r"\.org", "pythonhosted" + r"\.", "npmjs" + r"\.", "index" + r"-url\s*="]))
MACHINE_PATHS = re.compile(r"(?<![\w.~$})/-])/(?:home|root|work|tmp|opt|Users|mnt)/\w")


def project_files():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def texts():
    for file in project_files():
        try:
            yield file.relative_to(ROOT), file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


@pytest.mark.parametrize("pattern", [REGISTRIES, MACHINE_PATHS], ids=["registry host", "machine path"])
def test_no_file_names_a(pattern):
    found = [f"{name}: {match[0]}" for name, text in texts() for match in pattern.finditer(text)]
    assert not found


def test_nothing_that_a_run_leaves_behind_is_tracked():
    names = [file.relative_to(ROOT) for file in project_files()]
    assert not [str(name) for name in names if name.parts[0] in ("runs", ".venv") or "__pycache__" in name.parts]
    assert not [str(name) for name in names if (ROOT / name).stat().st_size > 1_000_000]


def test_the_version_is_one():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == PROJECT["version"]
    changes = re.search(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[1] == PROJECT["version"]


def test_the_licence_is_one():
    assert PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert re.search(r"^license: MIT$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_continuous_integration_is_make_test():
    script = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in script if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"]


def test_every_requirement_is_pinned():
    pins = re.findall(r"^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    required = {re.match(r"[\w-]+", requirement)[0].lower() for group in groups for requirement in group}
    assert required <= pinned


def test_losses_import_only_what_an_objective_needs():
    allowed = {"__future__", "collections", "math", "typing", "torch", "einops", "jaxtyping", "losses"}
    for file in (ROOT / "losses").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "losses"] if not node.level else []
            assert {name.split(".")[0] for name in names} <= allowed, file.name
