"""The loader: places in errors, extends, overrides, references, consistency, objectives by name."""

import dataclasses
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from config_example import NAMES, TEXT, error_of, load, registered

from metamem.config import load_config, objective_gradient, ownership, resolve_objective


@pytest.fixture(scope="module", autouse=True)
def in_a_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every test runs where its files are, so that errors show short paths."""
    folder, before = tmp_path_factory.mktemp("configs"), Path.cwd()
    os.chdir(folder)
    with registered():
        yield folder
    os.chdir(before)


def test_the_example_loads() -> None:
    config = load()
    assert (config.name, config.seed, config.training.batch, config.training.warmup) == ("example", 0, 16, 50)
    assert config.network.modules["embed"]["dim"] == 8
    assert config.network.modules["blocks"]["modules"]["memory"]["dim"] == 8
    surprise, stream, task = config.hierarchy.levels
    assert surprise.rule is not None and surprise.rule.forget == 0.1
    assert stream.optimizer is not None and stream.optimizer.lr == 0.01
    assert task.optimizer is not None and task.optimizer.betas == (0.9, 0.95)
    assert config.hierarchy.groups["body"].match == ["**"]
    assert config.training.gradient_clip is None
    assert str(stream.where / "clock") == "c.yaml:30: hierarchy.levels[1] (stream).clock"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 2000", "stepz: 2000", "c.yaml:34: training.stepz: unknown key; did you mean 'steps'? (steps, "),
        ("steps: 2000", "steps: ten", "c.yaml:34: training.steps: expected an integer (at least 1), not 'ten'"),
        ("batch: 16", "batch: 0", "c.yaml:34: training.batch: must be at least 1, not 0"),
        ("steps: 2000", "compile: yes", "c.yaml:34: training.compile: expected true or false, not 'yes'"),
        ("gradient_clip: null", "gradient_clip: 0", "gradient_clip: must be above 0, not 0"),
        ("vars:", "tsak: 3\nvars:", "c.yaml:2: tsak: unknown key; did you mean 'task'?"),
        ("name: example", "name: a/b", "c.yaml:1: name: 'a/b' cannot name a folder"),
        ("name: example", "seed: -1", "c.yaml:1: seed: must be at least 0, not -1"),
        ("  name: reading\n", "", "c.yaml:3: task.name: is missing: name a task"),
        ("name: reading", "name: readin", "c.yaml:4: task.name: there is no task 'readin'; did you mean 'reading'?"),
        (
            "train: [web]",
            "trian: [web]",
            "c.yaml:5: task.trian: task 'reading' has no such option; did you mean 'train'",
        ),
        (
            "heads: 2",
            "heds: 2",
            "c.yaml:13: network.modules.blocks.modules.memory.heds: module kind 'fast_weights' has",
        ),
        ("heads: 2", "heads: two", "c.yaml:13: network.modules.blocks.modules.memory.heads: expected an integer, not"),
        ("kind: linear, ", "", "c.yaml:17: network.modules.head.kind: is missing"),
        (
            "{kind: linear, ",
            "{kind: linaer, ",
            "c.yaml:17: network.modules.head.kind: there is no module kind 'linaer'",
        ),
        ("    head:", "    out:", "c.yaml:17: network.modules.out: 'out' cannot name a module"),
        (
            "{from: embed,",
            "{from: embd,",
            "c.yaml:20: network.connections[1] (embd -> blocks).from: there is no module",
        ),
        ("[in, memory]", "[in, memry]", "c.yaml:16: network.modules.blocks.connections[1] (in, memry -> out).from: th"),
        (
            "by: sum",
            "by: concta",
            "(in, memory -> out).by: 'concta' is not valid; did you mean 'concat'? (feed, concat,",
        ),
        (", by: sum", "", "c.yaml:16: network.modules.blocks.connections[1] (in, memory -> out).by: feed takes one"),
        (
            "to: head}",
            "to: haed}",
            "c.yaml:21: network.connections[2] (blocks -> haed).to: 'haed' is no module, and no ",
        ),
        ("    - {from: head, to: out}\n", "", "c.yaml:17: network.modules.head: no connection leads from the module"),
        (
            "to: head}",
            "to: out}",
            "c.yaml:22: network.connections[3] (head -> out).to: 'out' is already fed by network",
        ),
        ("to: embed}", "to: in}", "c.yaml:19: network.connections[0] (in -> in).to: 'in' is where the graph begins"),
        (
            "scope: sample",
            "scope: smaple",
            "c.yaml:25: hierarchy.groups.memory.scope: 'smaple' is not valid; did you m",
        ),
        ("scope: sample", "scope: meta", "c.yaml:29: hierarchy.levels[0] (surprise).groups[0]: a token level changes"),
        (
            "clock: inner",
            "clock: iner",
            "c.yaml:30: hierarchy.levels[1] (stream).clock: 'iner' is not valid; did you me",
        ),
        (
            "clock: inner",
            "clock: token",
            "c.yaml:31: hierarchy.levels[1] (stream).optimizer: a level with the clock 't",
        ),
        ("period: 256", "period: -4", "c.yaml:30: hierarchy.levels[1] (stream).period: must be at least 1, not -4"),
        ("name: stream", "name: surprise", "c.yaml:30: hierarchy.levels[1] (surprise).name: 'surprise' is already the"),
        (
            "[body], unroll",
            "[bodi], unroll",
            "hierarchy.levels[1] (stream).groups[0]: there is no group 'bodi'; did yo",
        ),
        ("[body], unroll", "[], unroll", "c.yaml:31: hierarchy.levels[1] (stream).groups: is empty"),
        (
            "[body], unroll",
            "[memory], unroll",
            "(stream).groups[0]: 'memory' already learns in level 'surprise' (token)",
        ),
        (
            "clock: step",
            "clock: inner",
            "hierarchy.levels[2] (task): inner/1 is faster than inner/256 of 'stream' before",
        ),
        (
            "lr: 3e-3",
            "lr: lerned",
            "(task).optimizer.lr: 'lerned' is not valid; did you mean 'learned'? (a number (at l",
        ),
        (
            "lr: 3e-3",
            "lr: learned",
            "c.yaml:33: hierarchy.levels[2] (task).optimizer.lr: an outer level's rate must be a",
        ),
        ("lr: 3e-3", "lr: .nan", "c.yaml:33: hierarchy.levels[2] (task).optimizer.lr: nan is not a finite number"),
        ("lr: 3e-3", "lr: -.inf", "optimizer.lr: -inf is not a finite number"),
        ("lr: 3e-3", "lr: 1, momentum: 0.9", "optimizer.momentum: is sgd's; adamw has betas"),
        ("lr: 1e-2", "lr: 1, betas: [0.5, 0.5]", "optimizer.betas: are those of adam and adamw"),
        ("lr: 1e-2", "lr: 1, decay_to: init", "optimizer.decay_to: is of weight_decay, which is 0"),
        ("lr: 3e-3", "lr: 1, decay_to: init", "(task).optimizer.decay_to: is of inner levels: an outer level has no"),
        ("forget: 0.1", "forget: 1.0", "(surprise).rule.forget: must be at least 0 and below 1, not 1.0"),
        (
            "signal: backprop",
            "signal: backprob",
            "did you mean 'backprop'? ('backprop', 'predicted_targets', 'hebbian' or a dotted path)",
        ),
        (
            "losses.recall.mse: 1.0",
            "losses.recall.mes: 1.0",
            "there is no 'mes' in losses.recall; did you mean 'losses.",
        ),
        ("losses.recall.mse: 1.0", "", "c.yaml:28: hierarchy.levels[0] (surprise).objective: is empty"),
        (
            "losses.recall.mse: 1.0",
            "losses.recall.mse: .inf",
            "objective.losses.recall.mse: inf is not a finite number",
        ),
        (
            '"blocks.*.memory.**"',
            '"blocks.*.memry.**"',
            "c.yaml:25: hierarchy.groups.memory.match: 'blocks.*.memry.**' m",
        ),
        (
            'body: {match: "**"',
            'body: {match: "blocks.**"',
            "the parameter 'embed.weight' belongs to no outer level; near",
        ),
        ("vars: {dim: 8}", "vars: {dim: 8, dim: 9}", "c.yaml:2: dim: key given twice, first in line 2"),
        (
            "vars: {dim: 8}",
            "vars: {dmi: 8}",
            "network.modules.embed.dim: '${vars.dim}' refers to vars.dim, which is not",
        ),
        ("vars: {dim: 8}", 'vars: {dim: "${vars.dim}"}', "c.yaml:2: vars.dim: '${vars.dim}': Recursive"),
        ("vars: {dim: 8}", 'vars: {dim: "${"}', "c.yaml:2: vars.dim: '${' is not a valid reference"),
        ("vars: {dim: 8}", "vars: {dim: 8", "c.yaml:3: not valid YAML: "),
        ("vars: {dim: 8}", "vars: &a [*a]", "c.yaml:2: not valid YAML: an alias that contains itself"),
        (
            "vars: {dim: 8}",
            "vars: !!python/name:os.system {}",
            "c.yaml:2: the tag tag:yaml.org,2002:python/name:os.sys",
        ),
        ("vars: {dim: 8}", "vars: {[1]: 8}", "c.yaml:2: a key must be a plain word"),
        ("training:", "extends: 3\ntraining:", "c.yaml:34: extends: expected a file name"),
    ],
)
def test_an_error_names_file_line_key_and_choice(old: str, new: str, message: str) -> None:
    assert old in TEXT
    assert message in error_of(lambda: load(TEXT.replace(old, new, 1)))


def test_a_step_level_without_a_weight_is_refused() -> None:
    slower = "\n    - {name: slow, clock: step, period: 8, objective: {losses.outer.next_token: 1.0},"
    text = TEXT.replace("\ntraining:", slower + " optimizer: {name: sgd, lr: 1}, groups: [body]}\ntraining:")
    assert "no parameter is left to level 'task'" in error_of(lambda: load(text))


def test_each_slow_weight_belongs_to_the_slowest_level_that_matches_it() -> None:
    extra = """
    - {name: late, clock: step, period: 1, objective: {losses.outer.next_token: 1.0},
       optimizer: {name: sgd, lr: 0.1}, groups: [head]}
    - {name: slow, clock: step, period: 8, objective: {losses.outer.next_token: 1.0},
       optimizer: {name: sgd, lr: 0.1}, groups: [memory]}"""
    text = TEXT.replace("\ntraining:", extra + "\ntraining:").replace(
        "    body:", "    head: {match: head.*}\n    body:"
    )
    config = load(text)
    owned = ownership(NAMES, config.hierarchy)
    assert owned["late"] == ["head.weight", "head.bias"]
    assert owned["slow"] == [name for name in NAMES if ".memory." in name]
    assert owned["task"] == ["embed.weight"]
    assert sorted(name for own in owned.values() for name in own) == sorted(NAMES)


def test_token_levels_can_share_a_group() -> None:
    gist = """
    - {name: gist, clock: token, period: 64, objective: {losses.recall.cosine: 1.0}, rule: {}, groups: [memory]}"""
    assert len(load(TEXT.replace("\n    - {name: stream", gist + "\n    - {name: stream")).hierarchy.levels) == 4


# extends


def write(**files: str) -> None:
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")


def test_extends_merges_mappings_replaces_lists_and_later_wins() -> None:
    Path("sub").mkdir(exist_ok=True)
    write(base=TEXT, **{"sub/more": "training: {steps: 7, batch: 3}\n"})
    write(
        top="extends: [base.yaml, sub/more.yaml]\ntraining: {batch: 4}\nhierarchy: {groups: {memory: {match: [a]}}}\n"
    )
    config = load_config(Path("top.yaml"))
    assert (config.name, config.training.steps, config.training.batch) == ("top", 7, 4)
    assert config.training.length == 512
    assert config.hierarchy.groups["memory"].match == ["a"]
    assert config.training.where.at("steps").place == os.path.join("sub", "more.yaml") + ":1"
    assert config.training.where.at("batch").place == "top.yaml:2"
    assert config.hierarchy.levels[2].where.at("clock").place == "base.yaml:32"


def test_another_kind_or_task_starts_afresh() -> None:
    write(
        base=TEXT, top="extends: base.yaml\ntask: {name: other}\nnetwork: {modules: {head: {kind: mine, width: 3}}}\n"
    )
    config = load_config(Path("top.yaml"))
    assert config.task == {"name": "other"}
    assert config.network.modules["head"] == {"kind": "mine", "width": 3}
    config = load_config(Path("base.yaml"), ["task.path=x", "task.name=other"])
    assert config.task == {"name": "other", "path": "x"}


def test_a_config_that_ships_is_named_from_any_folder() -> None:
    files = "[metamem:memory/titans.yaml, metamem:experiment/associative_recall.yaml]"
    write(mine=f"extends: {files}\ntraining: {{steps: 7}}\n")
    config = load_config("mine.yaml")
    assert (config.name, config.training.steps, config.network.modules["embed"]["kind"]) == ("mine", 7, "embedding")
    assert config.hierarchy.levels[0].where.place.startswith("metamem:memory/titans.yaml:")
    shipped = load_config("metamem:quickstart.yaml", ["training.steps=3"])
    assert (shipped.name, shipped.training.steps) == ("quickstart", 3)


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        ("metamem:memory/titan.yaml", "metamem:memory/titans.yaml"),  # nearest beside it
        ("configs/memory/titans.yaml", "metamem:memory/titans.yaml"),  # as from a checkout
        ("quickstart.yaml", "metamem:quickstart.yaml"),
    ],
)
def test_a_file_that_is_not_there_may_be_one_that_ships(named: str, meant: str) -> None:
    write(mine=f"extends: {named}\n")
    said = f"{named}: no such file; did you mean '{meant}'?"
    assert error_of(lambda: load_config("mine.yaml")) == f"mine.yaml:1: extends: {said}"
    assert error_of(lambda: load_config(named)) == said


def test_extends_errors() -> None:
    write(a="extends: b.yaml\n", b="extends: [a.yaml]\n", lost="extends: [a.yaml, bb.yaml]\n", bbc="")
    assert error_of(lambda: load_config(Path("a.yaml"))) == (
        "b.yaml:1: extends: extends goes in a circle: a.yaml -> b.yaml -> a.yaml"
    )
    write(lost="\nextends:\n  - bbc.yaml\n  - bb.yaml\n")
    assert error_of(lambda: load_config(Path("lost.yaml"))).startswith(
        "lost.yaml:4: extends: bb.yaml: no such file; did you mean 'bbc.yaml'?"
    )
    assert error_of(lambda: load_config(Path("lst.yaml"))) == "lst.yaml: no such file; did you mean 'lost.yaml'?"
    assert "bbc.yaml: task: is missing" in error_of(lambda: load_config(Path("bbc.yaml")))
    Path("latin.yaml").write_bytes("name: é".encode("latin-1"))
    assert error_of(lambda: load_config(Path("latin.yaml"))) == "latin.yaml: not UTF-8 text (byte 6)"
    assert "cannot be read" in error_of(lambda: load_config(Path(".")))
    write(list="[1, 2]")
    assert "list.yaml: a config is a mapping" in error_of(lambda: load_config(Path("list.yaml")))


# overrides


def test_overrides() -> None:
    config = load(
        TEXT,
        "training.steps=20",
        "hierarchy.levels[0].period=4",
        "hierarchy.levels.stream.period=8",
        "hierarchy.levels.0.rule.lr=3e-3",
        "hierarchy.levels.task.objective.losses.outer.next_token=0.5",
        "network.modules.blocks.modules.memory.heads=4",
        "vars.dim=32",
        "training.threads=2",
        "hierarchy.groups.head={match: head.*}",
    )
    levels = config.hierarchy.levels
    assert (config.training.steps, config.training.threads) == (20, 2)
    assert [level.period for level in levels] == [4, 8, 1]
    assert levels[0].rule is not None and levels[0].rule.lr == 0.003
    assert levels[2].objective == {"losses.outer.next_token": 0.5}
    assert config.network.modules["blocks"]["modules"]["memory"] == {"kind": "fast_weights", "dim": 32, "heads": 4}
    assert config.hierarchy.groups["head"].match == ["head.*"]


def test_an_override_can_set_what_no_file_has() -> None:
    text = TEXT.partition("training:")[0]
    assert load(text, "training.steps=3").training.steps == 3
    assert load(text, "seed=3").seed == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainig.steps=3", "trainig: unknown key; did you mean 'training'?"),
        ("training.stepz=3", "training.stepz: unknown key; did you mean 'steps'?"),
        ("training.steps.x=3", "training.steps: is 2000, and has no 'x' to set"),
        ("hierarchy.levels.stram.period=3", "hierarchy.levels.stram: no item has this name; did you mean 'stream'?"),
        ("hierarchy.levels[9].period=3", "hierarchy.levels: has no item 9: there are 3, counted from 0"),
        ("hierarchy.levels[0].perod=3", "hierarchy.levels[0] (surprise).perod: unknown key; did you mean 'period'?"),
        ("network.modules.blcks.repeat=3", "network.modules.blcks: unknown key; did you mean 'blocks'?"),
        ("network.modules.blocks.reapet=3", "network.modules.blocks.reapet: module kind 'network' has no such option"),
        ("network.modules.hed=3", "network.modules.hed: unknown key; did you mean 'head'?"),
        ("task.trian=[web]", "task.trian: task 'reading' has no such option; did you mean 'train'?"),
        ("vars.dmi=3", "vars.dmi: unknown key; did you mean 'dim'?"),
        ("training.steps=", "training.steps: expected an integer (at least 1), not null"),
        ("training.steps=[", "training.steps: not valid YAML"),
        ("training.steps", "'training.steps': write an override as key.path=value"),
        ("extends=a.yaml", "extends: unknown key"),
    ],
)
def test_override_errors(override: str, message: str) -> None:
    assert error_of(lambda: load(TEXT, override)).startswith(f"command line: {message}")


# objectives


def test_objectives_are_found_by_name() -> None:
    mse = resolve_objective("losses.recall.mse", "here")
    gradient = objective_gradient(mse)
    assert mse.__name__ == "mse" and gradient is not None and gradient.__name__ == "mse_gradient"
    assert objective_gradient(resolve_objective("losses.outer.next_token", "here")) is None
    assert objective_gradient(lambda pred, target: pred) is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mse", "'mse' is not a dotted path"),
        ("losses.recall.msee", "there is no 'msee' in losses.recall; did you mean 'losses.recall.mse'?"),
        ("losses.recal.mse", "there is no module 'losses.recal' for 'losses.recal.mse'; did you mean 'losses.recall'?"),
        ("loses.recall.mse", "there is no module 'loses' for 'loses.recall.mse'; did you mean 'losses'?"),
        ("losses.recall", "'losses.recall' is not a function"),
        ("mine.wrong.loss", "importing mine.wrong failed: NameError: name 'x' is not defined"),
        ("mine.needs.loss", "importing mine.needs failed: No module named 'not_there'"),
        ("os.sep", "'os.sep' is not a function"),
    ],
)
def test_objective_errors(path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine").mkdir(exist_ok=True)
    Path("mine/__init__.py").touch()
    Path("mine/wrong.py").write_text("x\n")
    Path("mine/needs.py").write_text("import not_there\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert error_of(lambda: resolve_objective(path, "here")).startswith(f"here: {message}")


def test_another_package_named_losses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("losses")
    other.__path__ = []
    other.__file__ = "/elsewhere/losses/__init__.py"
    for name in [name for name in sys.modules if name == "losses" or name.startswith("losses.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "losses", other)
    text = error_of(lambda: resolve_objective("losses.recall.mse", "here"))
    assert "another package named 'losses' shadows metamem's, the one at /elsewhere/losses/__init__.py" in text
