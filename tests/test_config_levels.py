"""Levels by name: a mapping merges through `extends`, null takes one out, fast comes first; lists go on as before."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from config_example import TEXT, error_of, load, registered

from metamem.config import load_config, to_yaml

HEAD, _, LISTED = TEXT.partition("  levels:\n")
LISTED, _, TRAINING = LISTED.partition("training:")
NAMED = """\
    task: {clock: step, objective: {losses.outer.next_token: 1.0}, optimizer: {name: adamw, lr: 3e-3}, groups: [body]}
    stream: {clock: inner, period: 256, objective: {losses.outer.next_token: 1.0}, unroll: 4,
             optimizer: {name: sgd, lr: 1e-2}, groups: [body]}
    surprise: {clock: token, objective: {losses.recall.mse: 1.0}, groups: [memory],
               rule: {signal: backprop, lr: learned, momentum: learned, forget: 0.1}}
"""
MAPPING = f"{HEAD}  levels:\n{NAMED}training:{TRAINING}"


@pytest.fixture(scope="module", autouse=True)
def in_a_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every test runs where its files are, so that errors show short paths."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("levels"))
    with registered():
        yield
    os.chdir(before)


def extending(levels: str, base: str = MAPPING, *overrides: str):
    Path("base.yaml").write_text(base)
    Path("top.yaml").write_text(f"extends: base.yaml\nhierarchy:\n  levels:\n{levels}\n")
    return load_config("top.yaml", overrides)


def names(config) -> list[str]:
    return [level.name for level in config.hierarchy.levels]


def test_a_mapping_says_the_same_as_a_list() -> None:
    assert load(MAPPING) == load(TEXT)
    assert names(load(MAPPING)) == ["surprise", "stream", "task"]


def test_any_order_of_keys_becomes_fast_to_slow_and_equal_ones_keep_theirs() -> None:
    token = "objective: {losses.recall.mse: 1}, rule: {}, groups: [memory]}"
    levels = {
        "late": "{clock: step, objective: {losses.outer.next_token: 1}, optimizer: {name: sgd, lr: 1}, groups: [body]}",
        "one": f"{{clock: token, period: 2, {token}",
        "other": f"{{clock: token, period: 2, {token}",
        "early": f"{{clock: token, {token}",
    }
    for order in itertools.permutations(levels):
        lines = "\n".join(f"    {name}: {levels[name]}" for name in order)
        config = load(f"{HEAD}  levels:\n{lines}\n")
        assert names(config) == ["early", *(name for name in order if name in ("one", "other")), "late"]


def test_the_period_that_orders_may_be_a_reference() -> None:
    text = MAPPING.replace("vars: {dim: 8}", "vars: {dim: 8, slow: 7}").replace("period: 256", 'period: "${vars.slow}"')
    text = text.replace("    task:", "    quick: {clock: inner, period: 5, objective: {losses.outer.next_token: 1.0},\n"
                        "            optimizer: {name: sgd, lr: 1}, groups: [head]}\n    task:")  # fmt: skip
    text = text.replace("    body:", "    head: {match: head.*}\n    body:")
    assert names(load(text)) == ["surprise", "quick", "stream", "task"]
    assert names(load(text, "vars.slow=3")) == ["surprise", "stream", "quick", "task"]


def test_levels_merge_by_name_through_extends() -> None:
    gist = "    gist: {clock: token, period: 64, objective: {losses.recall.cosine: 1.0}, rule: {}, groups: [memory]}"
    config = extending(f"    surprise: {{rule: {{forget: 0.5}}}}\n{gist}")
    surprise, new, stream, task = config.hierarchy.levels
    assert (new.name, stream.period, task.period) == ("gist", 256, 1)
    assert surprise.rule is not None and (surprise.rule.forget, surprise.rule.momentum) == (0.5, "learned")
    assert surprise.rule.where.at("forget").place == "top.yaml:4"
    assert surprise.rule.where.at("momentum").place == f"base.yaml:{1 + line_of(MAPPING, 'surprise:') + 1}"


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n")


@pytest.mark.parametrize("base", [MAPPING, TEXT], ids=["mapping", "list"])
def test_null_takes_a_level_out_and_a_mapping_merges_over_a_list(base: str) -> None:
    assert names(extending("    stream: null", base)) == ["surprise", "task"]
    config = extending("    stream: {period: 3}\n    task: {period: 2}", base)
    assert [(level.name, level.period) for level in config.hierarchy.levels] == [
        ("surprise", 1),
        ("stream", 3),
        ("task", 2),
    ]
    assert names(extending("    stream: null", base, "hierarchy.levels.task.period=2")) == ["surprise", "task"]


def test_a_list_replaces_a_mapping() -> None:
    only = "    - {name: all, clock: step, objective: {losses.outer.next_token: 1.0}, groups: [body],"
    assert names(extending(f"{only}\n       optimizer: {{name: sgd, lr: 1}}}}")) == ["all"]


def test_another_objective_or_optimizer_starts_afresh() -> None:
    config = extending(
        "    surprise: {objective: {losses.recall.cosine: 2.0}}\n"
        "    stream: {optimizer: {name: adam, lr: 1}}\n"
        "    task: {optimizer: {name: adamw, weight_decay: 0.1}}",
        MAPPING.replace("name: sgd,", "name: sgd, momentum: 0.9,"),
    )
    surprise, stream, task = config.hierarchy.levels
    assert surprise.objective == {"losses.recall.cosine": 2.0}
    assert stream.optimizer is not None and (stream.optimizer.name, stream.optimizer.momentum) == ("adam", 0.0)
    assert task.optimizer is not None and (task.optimizer.lr, task.optimizer.weight_decay) == (0.003, 0.1)


@pytest.mark.parametrize("text", [MAPPING, TEXT], ids=["mapping", "list"])
def test_overrides_name_a_level_in_both_forms(text: str) -> None:
    config = load(
        text,
        "hierarchy.levels.stream.period=4",
        "hierarchy.levels.surprise.rule.lr=0.5",
        "hierarchy.levels.task.objective.losses.outer.next_token=0.5",
        "hierarchy.levels.surprise.rule.reduction=mean",
    )
    surprise, stream, task = config.hierarchy.levels
    assert surprise.rule is not None and (surprise.rule.lr, surprise.rule.reduction) == (0.5, "mean")
    assert stream.period == 4 and task.objective == {"losses.outer.next_token": 0.5}
    assert names(load(text, "hierarchy.levels.stream=null")) == ["surprise", "task"]
    assert str(stream.where.at("period")).startswith("command line: hierarchy.levels")


def test_an_override_can_add_a_level_by_name() -> None:
    level = "{clock: token, period: 9, objective: {losses.recall.cosine: 1}, rule: {}, groups: [memory]}"
    assert names(load(MAPPING, f"hierarchy.levels.gist={level}")) == ["surprise", "gist", "stream", "task"]


@pytest.mark.parametrize("text", [MAPPING, TEXT], ids=["mapping", "list"])
def test_both_forms_come_back_from_their_yaml(text: str) -> None:
    config = load(text)
    Path("example.yaml").write_text(to_yaml(config))
    assert load_config("example.yaml") == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("clock: inner", "clock: iner", "c.yaml:29: hierarchy.levels.stream.clock: 'iner' is not valid"),
        ("[body]}\n    stream", "[bodi]}\n    stream", "c.yaml:28: hierarchy.levels.task.groups[0]: there is no group"),
        ("    stream:", "    st-m:", "c.yaml:29: hierarchy.levels.st-m.name: 'st-m' cannot name a level: use letters"),
        (
            "    stream: {",
            "    stream: {name: x, ",
            "stream.name: is 'x', but its key already names it 'stream'",
        ),
        ("stream: {clock: inner, ", "stream: {", "c.yaml:29: hierarchy.levels.stream.clock: is missing"),
        ("unroll: 4", "unrol: 4", "c.yaml:29: hierarchy.levels.stream.unrol: unknown key; did you mean 'unroll'?"),
        ("period: 256", "period: many", "hierarchy.levels.stream.period: expected an integer (at least 1), not 'many'"),
        ("groups: [memory],", "groups: [body],", "c.yaml:31: hierarchy.levels.surprise.groups[0]: a token level ch"),
        (NAMED, "    task: null\n", "c.yaml:27: hierarchy.levels: there is none: nothing would learn"),
        (NAMED, "    task: 3\n", "c.yaml:28: hierarchy.levels.task: expected a mapping, not 3"),
        (f"\n{NAMED}", " 3\n", "c.yaml:27: hierarchy.levels: expected a list or a mapping, not 3"),
    ],
)
def test_an_error_keeps_file_and_key(old: str, new: str, message: str) -> None:
    assert MAPPING.count(old) == 1
    assert message in error_of(lambda: load(MAPPING.replace(old, new)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hierarchy.levels.stram.period=3", "hierarchy.levels.stram: unknown key; did you mean 'stream'?"),
        ("hierarchy.levels[0].period=3", "hierarchy.levels.0: unknown key (task, stream, surprise)"),
        ("hierarchy.levels.stram=null", "hierarchy.levels.stram: unknown key; did you mean 'stream'?"),
        ("hierarchy.levels.stream.perod=3", "hierarchy.levels.stream.perod: unknown key; did you mean 'period'?"),
    ],
)
def test_override_errors(override: str, message: str) -> None:
    assert error_of(lambda: load(MAPPING, override)).startswith(f"command line: {message}")
