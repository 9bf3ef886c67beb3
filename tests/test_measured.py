"""Objectives `aux.<glob>`: what a memory measured on the way, in the loss of an outer level."""

import json

import pytest
import torch
from config_example import error_of
from small_models import (
    GROUPS,
    MEMORY_GROUP,
    RECURRENT,
    STEP_LEVEL,
    TINY,
    TOKEN_LEVEL,
    close,
    config_of,
    inner_level,
    recurrent,
)
from typer.testing import CliRunner

from losses.outer import next_token
from metamem import OuterLevels, Session, build, train
from metamem.cli import app
from metamem.config import to_yaml

pytestmark = pytest.mark.usefixtures("float64")
KEY = "hierarchy.levels.task.objective"
SHORT = ("training.steps=30", "training.batch=2", "training.length=8", "training.warmup=0", "training.log_every=1")


@pytest.fixture
def batch():
    inputs, targets = torch.randint(7, (2, 3, 9))
    return inputs, targets


def measuring(objective="{losses.outer.next_token: 1.0, aux.**.surprise: 0.5}", *overrides):
    return recurrent("", f"{KEY}={objective}", *overrides)


@pytest.mark.parametrize("glob", ["**.surprise", "memory.surprise", "**", "memory.*"])
def test_what_a_glob_matches_is_added_to_the_loss_with_its_weight(glob, batch):
    inputs, targets = batch
    config = measuring(f"{{losses.outer.next_token: 1.0, aux.{glob}: 0.5}}")
    model, reference = build(config), build(config)
    out = model(inputs)
    levels = OuterLevels(config, model)
    values = levels.backward(lambda objectives: next_token(out.y, targets).mean(), out.aux)

    y, _, aux = reference(inputs)
    expected = next_token(y, targets).mean() + 0.5 * aux["memory.surprise"].mean()
    expected.backward()
    assert values == pytest.approx({"task": expected.item()})
    mine = dict(zip([name for name, _ in model.named_parameters()], levels.gathered["task"].sums, strict=True))
    close(mine, {name: p.grad for name, p in reference.named_parameters()})
    assert aux["memory.surprise"].requires_grad


def test_several_matches_count_by_their_mean(batch):
    config = measuring("{aux.**: 2.0}")
    model = build(config)
    weight = model.head.weight
    aux = {"a": weight.square(), "b.c": weight[0] * 3}
    levels = OuterLevels(config, model)
    value = levels.backward(lambda objectives: pytest.fail("no loss per token"), aux)
    assert value["task"] == pytest.approx(weight.square().mean().item() + 3 * weight[0].mean().item())
    by_hand = 2 * weight / weight.numel()
    by_hand[0] += 3 / len(weight[0])
    gathered = dict(zip(levels.parameters["task"], levels.gathered["task"].sums, strict=True))
    torch.testing.assert_close(gathered[weight], by_hand)


def test_levels_differ_by_what_they_measure_too():
    second = STEP_LEVEL.replace("name: task", "name: second, period: 2").replace("[all]", "[ends]")
    text = RECURRENT + GROUPS % MEMORY_GROUP + TOKEN_LEVEL + STEP_LEVEL.rstrip() + second
    config = config_of(text, f"{KEY}={{losses.outer.next_token: 1.0, aux.**.surprise: 0.5}}")
    levels = OuterLevels(config, build(config))
    assert [[level.name for level in same] for *_, same in levels.distinct()] == [["task"], ["second"]]
    weight = levels.parameters["task"][0]
    values = levels.backward(lambda objectives: weight.sum() * 0 + 1.0, {"memory.surprise": torch.tensor([4.0])})
    assert values == {"task": 3.0, "second": 1.0}


def test_training_adds_what_is_measured_and_lowers_it(batch, tmp_path):
    class Task:
        def sample(self, generator, batch_size, length):
            return batch

    surprises = {}
    for weight in (0.0, 3.0):
        config = measuring(f"{{losses.outer.next_token: 1.0, aux.**.surprise: {weight}}}", *SHORT)
        model = build(config)
        y, _, aux = model(batch[0])
        expected = next_token(y, batch[1]).mean().item() + weight * aux["memory.surprise"].mean().item()
        folder = train(config, tmp_path, task=Task()).folder
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert logged[0]["loss/task"] == pytest.approx(expected)
        surprises[weight] = [row["memory.surprise"] for row in logged]
    assert surprises[3.0][-1] < 0.9 * min(surprises[0.0])


def test_a_session_needs_a_loss_per_token():
    config = measuring()
    session = Session(build(config), config)
    assert (
        list(session.objectives) == [next_token] and session.observe(torch.randint(7, (1, 5))).losses.isfinite().all()
    )
    config = measuring("{aux.**.surprise: 1.0}")
    text = error_of(lambda: Session(build(config), config))
    assert "no outer level has an objective that is a loss per token" in text


def test_it_comes_back_from_yaml_and_check_shows_it(tmp_path):
    (tmp_path / "c.yaml").write_text(to_yaml(measuring("{losses.outer.next_token: 1.0, aux.**.surprise: 0.5}")))
    config = config_of((tmp_path / "c.yaml").read_text(), f"{KEY}.aux.**.surprise=0.25", "task={name: english}")
    assert config.hierarchy.levels[-1].objective == {"losses.outer.next_token": 1.0, "aux.**.surprise": 0.25}
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "c.yaml")])
    assert result.exit_code == 0 and "0.25 × aux.**.surprise" in result.stdout


def test_a_glob_that_matches_nothing_is_refused_with_the_nearest_names():
    config = measuring("{losses.outer.next_token: 1.0, aux.**.suprise: 0.5}")
    text = error_of(lambda: build(config))
    assert "(task).objective.aux.**.suprise: '**.suprise' matches nothing that the network measures" in text
    assert text.endswith("the nearest are aux.memory.surprise")
    bare = config_of(TINY + GROUPS % "" + STEP_LEVEL, f"{KEY}.aux.**=1.0")
    assert "it has no memory that measures anything" in error_of(lambda: build(bare))


def test_only_step_levels_can_name_what_is_measured():
    text = error_of(lambda: recurrent("", "hierarchy.levels.surprise.objective={aux.**.surprise: 1.0}"))
    assert "(surprise).objective.aux.**.surprise: aux.… is what memories measured on the way" in text
    assert "a level with the clock 'token' learns from a loss per token" in text
    text = error_of(lambda: recurrent(inner_level(objective="{aux.**.surprise: 1.0}")))
    assert "a level with the clock 'inner' learns from a loss per token" in text
