"""`metamem schema`: what it prints takes every shipped config, and refuses what the loader refuses."""

import json

import jsonschema
import pytest
import yaml
from small_models import CONFIGS
from typer.testing import CliRunner

from metamem.cli import app

EPISODES = sorted((CONFIGS / "episodes").glob("*.yaml"))
ABLATIONS = {path for path in CONFIGS.rglob("*.yaml") if "base" in yaml.safe_load(path.read_text())}
ADAPT = sorted((CONFIGS / "adapt").glob("*.yaml"))
OTHERS = sorted(set(CONFIGS.rglob("*.yaml")) - {*EPISODES, *ABLATIONS, *ADAPT})


def validator(*options: str) -> jsonschema.Draft202012Validator:
    result = CliRunner().invoke(app, ["schema", *options])
    assert result.exit_code == 0, result.output
    schema = json.loads(result.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(
    ("options", "files"),
    [((), OTHERS), (("--of", "episodes"), EPISODES), (("--of", "adapt"), ADAPT)],
    ids=["config", "episodes", "adapt"],
)
def test_every_shipped_config_is_valid(options, files):
    check, wrong = validator(*options), {}
    for path in files:
        errors = list(check.iter_errors(yaml.safe_load(path.read_text())))
        if errors:
            wrong[path.name] = str(jsonschema.exceptions.best_match(errors).message)[:200]
    assert len(files) > 1 and not wrong


def test_a_meta_training_over_tasks_has_its_own_tasks_modules_and_engines():
    check = validator("--of", "episodes")
    own = {"module": {"kind": "mine.Module", "width": 3}, "task": {"name": "sinusoid"}}
    assert check.is_valid(own)
    for wrong in ({"trainig": {}}, {"task": {"name": "sin"}}, {"module": {"kind": "perceptrn"}}):
        assert not check.is_valid({**own, **wrong})
    levels = {"adapt": {"engine": "functionl"}}
    assert not check.is_valid({**own, "hierarchy": {"levels": levels}})
    assert check.is_valid({**own, "hierarchy": {"levels": {"adapt": {"engine": "functional"}}}})
