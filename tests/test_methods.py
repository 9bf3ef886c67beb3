"""docs/methods.md names every preset, and for each what proves it: a test, or a recurrence that a test compares it
with."""

import ast
import re
from pathlib import Path

import pytest
from small_models import CONFIGS
from test_presets import CASES

ROOT = Path(__file__).parent.parent
ROW = re.compile(
    r"^\|.+\|.+\| \[`(\w+)`\]\(\.\./configs/memory/(\w+)\.yaml\) \| `tests/(\w+\.py)::(\w+)` \|.+\|$", re.M
)
ROWS = ROW.findall((ROOT / "docs/methods.md").read_text())


def test_the_table_has_every_preset_once():
    assert [name for name, file, *_ in ROWS if name != file] == []
    assert sorted(name for name, *_ in ROWS) == sorted(path.stem for path in CONFIGS.glob("memory/*.yaml"))


@pytest.mark.parametrize(
    ("preset", "file", "proof"), [(row[0], *row[2:]) for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_what_proves_a_preset_is_there(preset, file, proof):
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert proof in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if not proof.startswith("test_"):
        recurrences = {case.method.__qualname__.split(".")[0] for case in CASES.values() if case.preset == preset}
        assert proof in recurrences
