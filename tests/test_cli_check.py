"""`metamem check` and `metamem schema`: what they print, and one line with exit code 2 for a user's error."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from config_example import TEXT, model, registered
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import metamem.cli as cli
from metamem.config import load_config, ownership
from metamem.config.tables import hierarchy_table, network_tree, schedule_table
from metamem.hierarchy import calendar_of


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    stub = types.ModuleType("metamem.network")
    stub.build = lambda config: model()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "metamem.network", stub)
    monkeypatch.setattr(cli, "register_shipped", lambda: None)
    Path("c.yaml").write_text(TEXT)
    with registered():
        yield


def printed(item: object) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(item)
    return capture.get()


def test_check_prints_the_network_the_hierarchy_and_the_schedule_and_writes_nothing() -> None:
    result = CliRunner().invoke(cli.app, ["check", "c.yaml", "training.steps=20", "hierarchy.levels.stream.period=64"])
    assert result.exit_code == 0, result.output
    for text in ("example", "0 … 1", "×2", "surprise", "losses.recall.mse", "64", "416", "20, the first 50"):
        assert text in result.stdout
    assert [path.name for path in Path().iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["c.yaml", "training.stepz=3"], "command line: training.stepz: unknown key; did you mean 'steps'?"),
        (["d.yaml"], "d.yaml: no such file; did you mean 'c.yaml'?"),
        (
            ["c.yaml", "hierarchy.groups.body.match=nothing.**"],
            "command line: hierarchy.groups.body.match: 'nothing.**'",
        ),
        (["c.yaml", "network.modules.head.kind=linaer"], "network.modules.head.kind: there is no module kind 'linaer'"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.app, ["check", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_tables() -> None:
    config = load_config(Path("c.yaml"))
    parameters = dict(model().named_parameters())
    owned = ownership(parameters, config.hierarchy)
    table = printed(hierarchy_table(config, owned, {name: p.numel() for name, p in parameters.items()}))
    assert "embed.**" in table and "blocks.{0,1}.memory.**" in table
    assert "416" in table  # 16·8 + 2·(8·8 + 8) + 8·16 + 16
    assert "8,192 tokens" in printed(schedule_table(config, calendar_of(config)))
    tree = printed(network_tree(nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 1)), "net"))
    assert "0 … 1  Linear  9  weight [3, 2]  bias [3], ×2" in tree and "2  Linear  4" in tree


def test_schema_knows_the_registered_kinds_and_tasks() -> None:
    result = CliRunner().invoke(cli.app, ["schema"])
    assert result.exit_code == 0, result.output
    schema = json.loads(result.stdout)
    named = [
        entry for entry in schema["$defs"]["Module"]["anyOf"] if "const" in entry.get("properties", {}).get("kind", {})
    ]
    kinds = {entry["properties"]["kind"]["const"]: entry for entry in named}
    assert set(kinds) == {"embedding", "fast_weights", "linear", "network"}
    assert kinds["fast_weights"]["properties"]["heads"] == {
        "anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"\$\{"}],
        "default": 1,
    }
    assert schema["properties"]["task"]["anyOf"][0]["properties"]["name"] == {"const": "reading"}
    assert schema["properties"]["training"]["$ref"] == "#/$defs/TrainingConfig"
    steps = schema["$defs"]["TrainingConfig"]["properties"]["steps"]
    assert steps["anyOf"][0] == {"type": "integer", "minimum": 1} and steps["default"] == 2000
    listed, named = schema["$defs"]["HierarchyConfig"]["properties"]["levels"]["anyOf"]
    level = {"$ref": "#/$defs/LevelConfig"}
    assert listed["items"] == {**level, "required": ["name", "clock", "objective", "groups"]}
    assert named["additionalProperties"] == {"anyOf": [level, {"type": "null"}]}
    assert schema["$defs"]["NetworkConfig"]["properties"]["modules"]["additionalProperties"] == {
        "anyOf": [{"$ref": "#/$defs/Module"}, {"type": "string", "pattern": r"\$\{"}]
    }
    assert "from" in schema["$defs"]["ConnectionConfig"]["properties"]
