"""Every YAML in configs/: a full config loads, comes back from its own YAML, trains two steps and adapts one; a
fragment, which lacks a task, a network or a hierarchy, is extended by a full one."""

import pytest
import torch
from omegaconf import OmegaConf
from small_models import CONFIGS, write_text
from typer.testing import CliRunner

from metamem import Session, build_task, load_config, load_run, train
from metamem.cli import app
from metamem.config import to_yaml

WHOLE = {"task", "network", "hierarchy"}


def extended(path):
    """The files that a config extends, and those that these extend."""
    named = OmegaConf.to_container(OmegaConf.load(path)).get("extends") or []
    bases = [(path.parent / name).resolve() for name in ([named] if isinstance(named, str) else named)]
    return {*bases, *(further for base in bases for further in extended(base))}


def is_full(path):
    """Whether a config has a task, a network and a hierarchy, its own or inherited."""
    return {key for file in (path, *extended(path)) for key in OmegaConf.load(file)} >= WHOLE


FILES = sorted(path.resolve() for path in CONFIGS.rglob("*.yaml"))
FULL = [path for path in FILES if is_full(path)]
FRAGMENTS = [path for path in FILES if path not in FULL]


def label(path):
    return str(path.relative_to(CONFIGS))


@pytest.fixture
def overrides(tmp_path):
    """What makes a config small, as far as it has it."""
    text = write_text(tmp_path / "text.txt")

    def of(path):
        config = load_config(path)
        small = {"dim": 16, "blocks": 1}
        settings = [f"vars.{name}={size}" for name, size in small.items() if name in config.vars]
        settings += ["training.steps=2", "training.batch=2", "training.length=16", "training.warmup=0"]
        return settings + ([f"task.path={text}"] if config.task["name"] == "english" else [])

    return of


def test_there_are_full_configs_and_the_quickstart_is_one():
    assert CONFIGS / "quickstart.yaml" in FULL


@pytest.mark.parametrize("path", FRAGMENTS, ids=label)
def test_a_fragment_is_extended_by_a_full_config(path):
    assert any(path in extended(full) for full in FULL), f"no full config extends {label(path)}: does anything use it?"


@pytest.mark.parametrize("path", FULL, ids=label)
def test_a_config_comes_back_from_its_own_yaml(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert config.name == path.stem


@pytest.mark.parametrize("path", FULL, ids=label)
def test_a_config_trains_two_steps_and_adapts_one(path, tmp_path, overrides):
    config = load_config(path, overrides(path))
    trained = train(config, tmp_path / "runs", task=build_task(config))
    assert trained.step == 2
    model, config = load_run(trained.folder)
    session = Session(model, config)
    period = session.loop.piece or 8
    observed = session.observe(torch.randint(model.dim_out, (1, period)))
    assert observed.losses.shape == (1, period) and observed.losses.isfinite().all()
    assert (observed.updates > 0) == bool(session.loop.levels)


@pytest.mark.parametrize("path", FULL, ids=label)
def test_check_describes_a_config(path, overrides):
    result = CliRunner().invoke(app, ["check", str(path), *overrides(path)])
    assert result.exit_code == 0, result.output
    for level in load_config(path).hierarchy.levels:
        assert level.name in result.stdout
