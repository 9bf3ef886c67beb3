"""Scripts of experiments/ as modules, for the tests of what they measure."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of a script, such as `benchmarks/rules`, with its folder on the path, as where Python runs it."""
    folder, _, name = path.rpartition("/")
    monkeypatch.syspath_prepend(str(EXPERIMENTS / folder))
    sys.modules.pop(name, None)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)
