"""Meta-training over tasks: every config of configs/episodes runs, learns and comes back; what is wrong is refused."""

import json

import pytest
import torch
from config_example import error_of
from small_models import CONFIGS
from torch import nn
from typer.testing import CliRunner

from losses.recall import mse
from metamem import load_config
from metamem.cli import app
from metamem.config import ConfigError, UserError, to_yaml
from metamem.episodes import Episode, EpisodeLevel, Rates
from metamem.episodes.evaluation import Estimate, evaluate
from metamem.episodes.learner import Learner, build_learner
from metamem.episodes.level import Batch
from metamem.episodes.schema import OPTIMIZERS, is_episodes, load_episodes
from metamem.episodes.tasks import Sinusoid
from metamem.episodes.tasks.glyphs import INSTALLED
from metamem.episodes.training import evaluation_row, load_episodes_run, outer_levels, train_episodes
from metamem.training import Diverged

FILES = sorted((CONFIGS / "episodes").glob("*.yaml"))
SMALL = ("training.steps=2", "training.evaluated_tasks=3", "training.batch=2", "training.evaluated_steps=[0, 1]")
MAML = CONFIGS / "episodes/maml.yaml"
LEVEL = "hierarchy.levels.adapt"


def small(path, *overrides):
    settings = [*SMALL, *overrides]
    if path.stem == "glyphs" and not INSTALLED.is_file():
        pytest.skip(f"needs the system's package of Unifont ({INSTALLED})")
    if path.stem == "temperatures":
        pytest.importorskip("vega_datasets", reason="needs the extra few-shot")
    if path.stem == "digits":
        pytest.importorskip("sklearn", reason="needs the extra few-shot")
    return load_episodes(path, settings)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_trains_two_steps_and_comes_back(path, tmp_path):
    config = small(path)
    trained = train_episodes(config, tmp_path)
    assert trained.step == 2 and trained.best == 2 and set(trained.evaluation) >= {0, 1, config.inner.steps}
    learner, again = load_episodes_run(trained.folder)
    assert again == config
    for one, other in zip(learner.state_dict().values(), trained.learner.state_dict().values(), strict=True):
        assert one.equal(other)
    fresh = build_learner(config)
    moved = [
        name
        for (name, one), other in zip(trained.learner.named_parameters(), fresh.parameters(), strict=True)
        if not one.equal(other)
    ]
    trainable = [name for name, p in fresh.named_parameters() if p.requires_grad]
    assert set(moved) <= set(trainable) and len(moved) >= len(trainable) - 1
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_episodes(tmp_path / "again.yaml", [f"name={config.name}"]) == config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_check_describes_a_config(path):
    small(path)
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 0, result.output
    assert "adapt" in result.stdout and "inner updates by the engine" in result.stdout
    assert is_episodes(path) and not is_episodes(CONFIGS / "quickstart.yaml")


def test_train_on_the_command_line(tmp_path):
    result = CliRunner().invoke(app, ["train", str(MAML), *SMALL, "--runs", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "after 1 updates: loss" in result.stdout and "2 steps in" in result.stdout
    assert (tmp_path / "maml/checkpoint.safetensors").is_file()


def test_training_lowers_the_loss_after_adapting(tmp_path):
    steps = ("training.steps=150", "training.batch=10", "training.evaluated_tasks=60", "training.evaluate_every=50")
    config = small(MAML, *steps, f"{LEVEL}.optimizer.lr=0.05", "training.evaluated_steps=[0, 1, 5]")
    trained = train_episodes(config, tmp_path)
    logged = [row for row in rows(trained.folder) if row["kind"] == "evaluation"]
    assert [row["step"] for row in logged] == [50, 100, 150]
    assert min(row["mse/updates-1"] for row in logged) == trained.evaluation[1].figures["mse"].mean
    untrained = build_learner(config)
    task = Sinusoid(shots=10)
    before = evaluate(untrained, task, task.evaluation(60), (1,), {mse: 2.0})[1].loss.mean
    assert trained.evaluation[1].loss.mean < 0.9 * before
    assert trained.evaluation[1].loss.mean < trained.evaluation[0].loss.mean


def test_the_best_checkpoint_stays_and_training_stops_without_patience(tmp_path):
    rates = ("hierarchy.levels.meta.optimizer.lr=0.3", f"{LEVEL}.optimizer.lr=0.0")
    overrides = (*rates, "training.steps=20", "training.evaluate_every=1")
    config = small(MAML, *overrides, "training.patience=3")
    trained = train_episodes(config, tmp_path)
    losses = [row["loss/updates-1"] for row in rows(trained.folder) if row["kind"] == "evaluation"]
    assert trained.best == losses.index(min(losses)) + 1 and trained.step == trained.best + 3 < 20
    learner, _ = load_episodes_run(trained.folder)
    task = Sinusoid(shots=10)
    again = evaluate(learner, task, task.evaluation(3), (1,), {mse: 2.0})[1].loss.mean
    assert again == pytest.approx(min(losses))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("sparseadam", "muon")])
def test_any_torch_optimizer_steps_on_slow_weights(name):
    config = small(MAML, f"hierarchy.levels.meta.optimizer={{name: {name}, lr: 0.01}}")
    learner = build_learner(config)
    outer = outer_levels(config, learner)
    assert type(outer.optimizers["meta"]) is OPTIMIZERS[name]
    before = learner.module[1].weight.clone()
    outer.backward(lambda objectives: learner(Sinusoid().evaluation(2)).square().mean())
    outer.step(1, 1.0, None)
    assert not learner.module[1].weight.equal(before)


def test_options_reach_the_optimizer_and_wrong_ones_are_refused():
    optimizer = "{name: rmsprop, lr: 0.01, options: {alpha: 0.5}}"
    config = small(MAML, f"hierarchy.levels.meta.optimizer={optimizer}")
    assert outer_levels(config, build_learner(config)).optimizers["meta"].param_groups[0]["alpha"] == 0.5
    config = small(MAML, f"hierarchy.levels.meta.optimizer={optimizer.replace('alpha', 'alfa')}")
    text = error_of(lambda: outer_levels(config, build_learner(config)))
    assert "(meta).optimizer.options: torch.optim refuses" in text or "levels.meta.optimizer.options" in text


def test_the_outer_gradient_is_clipped(tmp_path):
    trained = train_episodes(small(MAML, "training.gradient_clip=1.0e-6", "training.log_every=1"), tmp_path)
    assert rows(trained.folder)[0]["gradient_norm/meta"] > 1e-3  # as it was before


class Spoiled(Sinusoid):
    """A task whose every second outer step is of targets that are not finite."""

    drawn = 0

    def sample(self, generator, tasks, query=None):
        episode = super().sample(generator, tasks, query)
        if query is not None:  # of an evaluation
            return episode
        self.drawn += 1
        spoiled = float("nan") if self.drawn % 2 == 0 else 0.0
        return Episode(episode.support, Batch(episode.query.inputs, episode.query.targets + spoiled))


def test_a_step_that_is_not_finite_moves_nothing_and_is_skipped_or_ends_the_training(tmp_path):
    with pytest.raises(Diverged, match="step 2: the loss of level 'meta' is nan"):
        train_episodes(small(MAML), tmp_path, Spoiled(shots=5))
    skipping = small(MAML, "training.skips=1", "training.log_every=1", "training.steps=4")
    trained = train_episodes(skipping, tmp_path, Spoiled(shots=5))
    assert trained.skipped == 2 and trained.step == 4
    assert [row["skipped"] for row in rows(trained.folder) if row["kind"] == "train"] == [0, 1, 1, 2]
    assert all(weight.isfinite().all() for weight in trained.learner.state_dict().values())


def test_the_rates_of_a_run_are_its_levels():
    learner = build_learner(small(CONFIGS / "episodes/maml_plus_plus.yaml"))
    assert learner.rates.rates.shape == (5, 6)  # K entries, not one more
    learner = build_learner(small(CONFIGS / "episodes/meta_sgd.yaml"))
    assert learner.rates.rates.shape == (1, 1761) and not learner.rates.layout.positive
    learner = build_learner(small(CONFIGS / "episodes/cavia.yaml"))
    assert learner.level.members == ("context",) and not learner.module.context.requires_grad
    config = small(MAML, f"{LEVEL}.optimizer={{name: sgd, lr: learned, lr_per: group}}", f"{LEVEL}.groups=[head, all]")
    assert build_learner(config).rates.rates.shape == (1, 2)


def test_negative_rates_are_reported():
    module = nn.Sequential(nn.Linear(1, 1))
    rates = Rates(dict(module.named_parameters()), 0.1, learned=True, per="element")
    learner = Learner(module, EpisodeLevel({mse: 1.0}, rates=rates))
    with torch.no_grad():
        rates.rates[0, 0] = -0.5
    assert evaluation_row({}, learner) == {"negative_rates": 0.5}


def test_an_estimate_is_the_mean_with_its_interval():
    values = torch.tensor([1.0, 2.0, 4.0, 5.0])
    found = Estimate.of(values)
    assert found.mean == found.median == 3.0 and found.tasks == 4 and str(found) == "3 ± 1.8"
    assert found.interval == pytest.approx(1.959964 * values.std().item() / 2)


def test_diverged_tasks_are_counted_and_not_averaged_away():
    """One task of four explodes to a finite error, one to infinity."""
    learner = Learner(nn.Sequential(nn.Linear(1, 1, bias=False)), EpisodeLevel({mse: 1.0}, rates=0.1))
    with torch.no_grad():
        learner.module[0].weight.fill_(0.0)
    x = torch.ones(4, 3, 1)
    x[2], x[3] = 30.0, 1e20
    support = Batch(x, torch.ones(4, 3, 1))
    episode = Episode(support, Batch(torch.ones(4, 3, 1), torch.ones(4, 3, 1)))
    found = evaluate(learner, Sinusoid(), episode, (0, 5), {mse: 1.0})
    assert found[0].diverged == 0 and found[0].loss.tasks == 4
    assert found[5].diverged == 2 and found[5].loss.tasks == 3 and found[5].loss.mean > 1e3


def test_a_module_of_ones_own_by_its_path(tmp_path):
    config = small(
        MAML, "module={kind: torch.nn.Linear, in_features: 1, out_features: 1}", "hierarchy.groups={all: {match: '**'}}"
    )
    assert type(build_learner(config).module) is nn.Linear
    assert train_episodes(config, tmp_path).step == 2


REFUSED = {
    "module.kind: is missing": ["module={widths: [1, 1]}"],
    "there is no episodic module kind 'perzeptron'; did you mean 'perceptron'?": ["module.kind=perzeptron"],
    "module.width: episodic module kind 'perceptron' has no such option; did you mean 'widths'?": [
        "module={kind: perceptron, width: [1, 1]}"
    ],
    "torch.nn.Linear cannot be made": ["module={kind: torch.nn.Linear, size: 3}"],
    "kind: os.mkdir is no class of nn.Module": ["module={kind: os.mkdir, path: marked}"],
    "there is no 'Linaer' in torch.nn": ["module={kind: torch.nn.Linaer}"],
    "there is no inner optimizer 'rmsprop'": [f"{LEVEL}.optimizer={{name: rmsprop, lr: 0.1}}"],
    "there is no step optimizer 'adem'; did you mean 'adam'?": [
        "hierarchy.levels.meta.optimizer={name: adem, lr: 0.1}"
    ],
    "'functionl' is not valid; did you mean 'functional'?": [f"{LEVEL}.engine=functionl"],
    "engine: engine 'implicit' needs a `proximal` above 0": [f"{LEVEL}.engine=implicit"],
    "engine: engine 'higher' has no AdamW": [f"{LEVEL}.engine=higher", f"{LEVEL}.optimizer={{name: adamw, lr: 0.1}}"],
    "period: is 1 in episodes": [f"{LEVEL}.period=2"],
    "steps: is the inner level's": ["hierarchy.levels.meta.steps=3"],
    "episodes have one level on the clock 'inner', not 0": [f"{LEVEL}=null"],
    "evaluated_tasks: must be at least 2": ["training.evaluated_tasks=1"],
    "lr_per_step: is of a learned rate, and lr is a number": [
        f"{LEVEL}.optimizer.lr_per_step=true",
        f"{LEVEL}.router={{kind: binary}}",
    ],
    "router: a softmax over one choice is always 1": [f"{LEVEL}.router={{kind: dense, hold: false}}"],
    "router: gates of the task are per level, group or tensor": [
        f"{LEVEL}.router={{kind: binary, per: element, input: task}}"
    ],
    "'module.9.*' matches no parameter": ["hierarchy.groups.head.match=module.9.*"],
    "keeps running statistics, which every task has of its own": None,
    "task.shots: expected an integer": ["task.shots=many"],
    "shots and query must be at least 1": ["task.shots=0"],
    "there is no episodic task 'sinusiod'; did you mean 'sinusoid'?": ["task={name: sinusiod}"],
    "hierarchy.router: is that of memories": ["hierarchy.router={kind: dense}"],
}


class Normed(nn.Sequential):
    """A module with running statistics."""

    def __init__(self):
        super().__init__(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_wrong_is_one_line_that_says_where(reason, tmp_path, monkeypatch):
    groups = "hierarchy.groups={all: {match: '**'}}"
    overrides = REFUSED[reason]
    if "running statistics" in reason:
        overrides = [f"module={{kind: {Normed.__module__}.Normed}}", groups]
    with pytest.raises(UserError) as raised:
        train_episodes(load_episodes(MAML, [*SMALL, *overrides]), tmp_path)
    assert reason in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir()), "nothing is made before everything is checked"


def test_a_config_of_episodes_is_none_of_a_network():
    with pytest.raises(ConfigError, match=r"module: unknown key"):
        load_config(MAML)


def test_a_run_that_cannot_be_loaded_says_why(tmp_path):
    trained = train_episodes(small(MAML), tmp_path)
    checkpoint = trained.folder / "checkpoint.safetensors"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="truncated or not metamem's"):
        load_episodes_run(trained.folder)
    checkpoint.write_bytes(whole)
    config = trained.folder / "config.yaml"
    config.write_text(config.read_text().replace("- 40", "- 41", 1))
    with pytest.raises(UserError, match="it is of another model"):
        load_episodes_run(trained.folder)
    checkpoint.unlink()
    with pytest.raises(UserError, match="no such checkpoint"):
        load_episodes_run(trained.folder)
    with pytest.raises(UserError, match="no run folder"):
        load_episodes_run(tmp_path)
