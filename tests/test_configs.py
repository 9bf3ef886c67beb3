"""Every YAML in configs/: a whole config loads, comes back from its own YAML, trains two steps and adapts one; a
fragment is extended by a whole one; a memory stands in for any other in one line; the cells of an ablation run."""

import pytest
import torch
from omegaconf import OmegaConf
from small_models import CONFIGS, write_text
from typer.testing import CliRunner

from metamem import Session, build_task, load_config, load_run, train
from metamem.analysis import plan_ablation
from metamem.analysis.cell import run_cell
from metamem.cli import app
from metamem.config import to_yaml
from metamem.config.ablation import is_ablation

WHOLE = sorted(path for folder in ("", "algorithmic", "wiring") for path in (CONFIGS / folder).glob("*.yaml"))
ABLATIONS = sorted((CONFIGS / "ablation").glob("*.yaml"))
STUDIES = {path for path in (CONFIGS / "experiment").glob("*.yaml") if is_ablation(path)}  # each has a test of its own
EPISODES = CONFIGS.glob("episodes/*.yaml")  # whole, of a schema of their own: tests/test_episode_training.py
ADAPT = CONFIGS.glob("adapt/*.yaml")  # whole, of a schema of their own: tests/test_hugging_face.py
FRAGMENTS = sorted({*CONFIGS.glob("*/*.yaml")} - {*WHOLE, *ABLATIONS, *STUDIES, *EPISODES, *ADAPT})
MEMORIES = sorted((CONFIGS / "memory").glob("*.yaml"))
NETWORKS = ("memory_lm", "fast_weights_lm")
SMALL = {"dim": 16, "blocks": 1, "last": 0}
SMALL_TASKS = {
    "copy": ["task.lengths=[1, 3]", "task.tested=[5]", "task.examples=2"],
    "repeat_copy": ["task.lengths=[1, 2]", "task.repeats=[1, 2]", "task.tested=[[3, 3]]", "task.examples=2"],
    "adding": ["task.lengths=[4, 8]", "task.tested=[10]", "task.examples=2"],
    "sort": ["task.lengths=[2, 4]", "task.tested=[5]", "task.examples=2"],
    "argmax": ["task.lengths=[2, 4]", "task.tested=[5]", "task.examples=2"],
    "graph": ["task.nodes=[3, 4]", "task.tested=[5]", "task.stations=[3]", "task.extra=1", "task.examples=2"],
    "stories": ["task.kinds=[one_fact, counting]", "task.length=20", "task.examples=2"],
}
LENGTH = 64  # at least every memory's chunk and period


def extended(path):
    """The files that a config extends, and those that these extend."""
    named = OmegaConf.to_container(OmegaConf.load(path)).get("extends") or []
    bases = [(path.parent / name).resolve() for name in ([named] if isinstance(named, str) else named)]
    return {*bases, *(further for base in bases for further in extended(base))}


def label(path):
    return str(path.relative_to(CONFIGS))


@pytest.fixture
def overrides(tmp_path):
    """What makes a config small, as far as it has it."""
    text = write_text(tmp_path / "text.txt")

    def of(path):
        config = load_config(path)
        settings = [f"vars.{name}={size}" for name, size in SMALL.items() if name in config.vars]
        settings += ["training.steps=2", "training.batch=2", "training.length=16", "training.warmup=0"]
        task = {"english": [f"task.path={text}"], "associative_recall": ["task.pairs=[1, 4]", "task.examples=3"]}
        texts = [str(text), str(write_text(tmp_path / "other.txt", 3000))]
        task["two_clock"] = [f"task.sources={texts}", "task.fast=8", "task.slow=32", "task.stream=40"]
        task["continual"] = [f"task.sources={texts}", "task.steps_per_task=1", "task.examples=2"]
        task["drift"] = ["task.stream=64", "task.examples=2", "training.length=128"]
        return settings + (task | SMALL_TASKS).get(config.task["name"], [])

    return of


def test_the_quickstart_is_a_whole_config():
    assert CONFIGS / "quickstart.yaml" in WHOLE


@pytest.mark.parametrize("path", [path for path in FRAGMENTS if path not in MEMORIES], ids=label)
def test_a_fragment_is_extended_by_a_whole_config(path):
    assert any(path in extended(whole) for whole in WHOLE), f"no config extends {label(path)}: does anything use it?"


@pytest.mark.parametrize("path", WHOLE, ids=label)
def test_a_config_comes_back_from_its_own_yaml(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert config.name == path.stem


def run(path, overrides, folder):
    """Two steps of training; then a period of adaptation, or eight tokens, of what was saved."""
    config = load_config(path, overrides)
    trained = train(config, folder, task=build_task(config))
    assert trained.step == 2
    model, config = load_run(trained.folder)
    if model.dim_in is not None:  # of numbers, which no session reads
        assert model(torch.randn(1, 8, model.dim_in)).y.isfinite().all()
        return trained
    session = Session(model, config)
    period = session.loop.piece or 8
    observed = session.observe(torch.randint(model.dim_out, (1, period)))
    assert observed.losses.shape == (1, period) and observed.losses.isfinite().all()
    assert (observed.updates > 0) == bool(session.loop.levels)
    return trained


@pytest.mark.parametrize("path", WHOLE, ids=label)
def test_a_config_trains_two_steps_and_adapts_one(path, tmp_path, overrides):
    run(path, overrides(path), tmp_path / "runs")


@pytest.mark.parametrize("path", WHOLE, ids=label)
def test_check_describes_a_config(path, overrides):
    result = CliRunner().invoke(app, ["check", str(path), *overrides(path)])
    assert result.exit_code == 0, result.output
    for level in load_config(path).hierarchy.levels:
        assert level.name in result.stdout


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("memory", MEMORIES, ids=lambda path: path.stem)
def test_a_memory_stands_in_for_any_other_in_one_line(memory, network, tmp_path, overrides):
    stands_in(memory, network, tmp_path, overrides)


@pytest.mark.parametrize("block", ["context", "gate", "layer"])
@pytest.mark.parametrize("memory", ["delta_net", "titans"])
def test_a_memory_is_used_in_any_of_the_blocks_of_titans(memory, block, tmp_path, overrides):
    stands_in(CONFIGS / f"memory/{memory}.yaml", f"memory_as_{block}", tmp_path, overrides)


def stands_in(memory, network, tmp_path, overrides):
    """The memory of a file in the network of another, trained on associative recall."""
    files = [memory, CONFIGS / "experiment/associative_recall.yaml", CONFIGS / f"network/{network}.yaml"]
    path = tmp_path / f"{memory.stem}.yaml"
    path.write_text(f"extends: {[str(file) for file in files]}\n")
    trained = run(path, [*overrides(path), f"training.length={LENGTH}"], tmp_path / "runs")
    model, levels = trained.model, load_config(path).hierarchy.levels
    _, state, aux = model(torch.randint(model.dim_out, (2, 5)))
    assert any(name.endswith(".surprise") for name in aux) == any(level.clock == "token" for level in levels)
    assert model.blocks.reset_state(state["blocks"]).keys() == state["blocks"].keys()


@pytest.mark.parametrize("path", ABLATIONS, ids=label)
def test_the_first_cell_of_each_family_of_an_ablation_runs(path, tmp_path):
    plan = plan_ablation(path, ["seeds=[0]", "training.steps=2", "training.batch=2"])
    for family in dict.fromkeys(cell.family for cell in plan.cells):
        cell = next(cell for cell in plan.cells if cell.family == family)
        result = run_cell(cell, plan.function, tmp_path)
        assert result.status == "done" and result.metrics, result.message
