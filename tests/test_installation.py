"""A wheel, built from the sdist, in an environment that has torch and nothing else, without the checkout.

torch is lent by the environment that runs this; all else is installed as a user would, in the versions of
constraints.txt. The package index is asked, so this is a test for `pytest -m slow`.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = """\
extends: [metamem:memory/titans.yaml, metamem:experiment/associative_recall.yaml]
training: {steps: 10, batch: 2, evaluate_every: null}
"""
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(*words: object, at: Path) -> str:
    """What a command prints, in a folder and without the checkout on any path."""
    environment = ENVIRONMENT | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        list(map(str, words)), cwd=at, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert found.returncode == 0, f"{words}: {found.stdout}"
    return found.stdout


def environment_with(folder: Path, *requirements: str) -> Path:
    """The Python of a fresh environment."""
    run(sys.executable, "-m", "venv", folder, at=folder.parent)
    python = folder / "bin/python"
    if requirements:
        run(python, "-m", "pip", "install", "--quiet", *requirements, at=folder.parent)
    return python


def lend(name: str, folder: Path, seen: set[str]) -> None:
    """Links a distribution of this environment, and all that it requires, into a folder."""
    if name in seen:
        return
    seen.add(name)
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return  # for another platform
    for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
        if not (folder / top).exists():
            (folder / top).symlink_to(Path(str(found.locate_file(top))))
    for requirement in found.requires or ():
        if "extra ==" not in requirement:
            lend(re.split(r"[^\w.-]", requirement, maxsplit=1)[0], folder, seen)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist of this checkout, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    python = environment_with(folder / "builder", "hatchling")
    run(python, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, at=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(python, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, at=unpacked)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_the_wheel_has_the_library_and_the_configs_and_nothing_else(built):
    tracked = run("git", "ls-files", "metamem", "losses", "configs", at=ROOT).splitlines()
    expected = {re.sub("^configs/", "metamem/shipped_configs/", name) for name in tracked}
    with zipfile.ZipFile(built[1]) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    with tarfile.open(built[0]) as sdist:
        there = {name.partition("/")[2] for name in sdist.getnames()}
    assert set(run("git", "ls-files", at=ROOT).splitlines()) - there <= {".ci/run", ".pre-commit-config.yaml"}


@pytest.mark.slow
def test_an_empty_environment_runs_the_wheel_without_the_checkout(built, tmp_path):
    python = environment_with(tmp_path / "empty")
    lent = tmp_path / "lent"
    lent.mkdir()
    lend("torch", lent, set())
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", at=tmp_path).strip())
    (site / "lent.pth").write_text(f"{lent}\n")
    run(python, "-m", "pip", "install", "--quiet", built[1], at=tmp_path)

    away, metamem = tmp_path / "away", python.parent / "metamem"
    away.mkdir()
    (away / "mine.yaml").write_text(OWN)
    assert Path(run(python, "-c", "import metamem; print(metamem.__file__)", at=away).strip()).is_relative_to(site)
    assert "surprise" in run(metamem, "check", "mine.yaml", at=away)
    assert "runs/mine: 10 steps" in run(metamem, "train", "mine.yaml", at=away)
    assert "titans" not in run(metamem, "check", "metamem:drift.yaml", at=away)
    assert sorted(path.name for path in away.iterdir()) == ["mine.yaml", "runs"]
