"""Continual: tasks come in turn and each in its own spelling; R's means are their papers'; training measures them."""

import json

import pytest
import torch
from small_models import SENTENCE, config_of, write_text

from metamem import train
from metamem.tasks import Continual, TaskError
from metamem.tasks.continual import transfer
from metamem.training import build_task


@pytest.fixture
def files(tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("0123456789 " * 300)
    return str(write_text(tmp_path / "text.txt")), str(other)


def test_tasks_come_in_turn(files):
    task = Continual(sources=files, steps_per_task=3)
    assert [task.task_at(step) for step in range(1, 11)] == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    digits = set(b"0123456789 ")
    for number in (0, 1):
        inputs, targets = task.sample(torch.Generator().manual_seed(0), 4, 30, task=number)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert (set(inputs.unique().tolist()) <= digits) == (number == 1)


def test_a_spelling_swaps_letters_and_nothing_else(files):
    task = Continual(sources=files, spellings=3)
    assert len(task.tasks) == 6 and [task.task_at(1 + 200 * number) for number in range(6)] == list(range(6))
    plain, *spelled = (bytes(task.tasks[number][0].tolist()).decode() for number in (0, 2, 4))
    assert plain.startswith(SENTENCE) and len({plain, *spelled}) == 3
    for other in spelled:
        swap = dict(zip(plain, other, strict=True))
        assert all(swap[a] == b for a, b in zip(plain, other, strict=True))
        assert len(set(swap.values())) == len(swap)
        assert all(a == b or (a.isalpha() and b.isalpha() and a.isupper() == b.isupper()) for a, b in swap.items())
    assert torch.equal(task.tasks[1][0], task.tasks[3][0])  # digits have one spelling


def test_transfer_is_what_its_papers_say():
    r = torch.tensor(
        [
            [-8.0, -7.0, -6.0],  # before any
            [-2.0, -6.5, -5.0],
            [-1.5, -3.0, -5.5],
            [-4.0, -2.0, -1.0],
        ],
        dtype=torch.float64,
    )
    found = transfer(r)
    assert found.backward_transfer == pytest.approx(((-4.0 + 2.0) + (-2.0 + 3.0)) / 2)
    assert found.forward_transfer == pytest.approx(((-6.5 + 7.0) + (-5.5 + 6.0)) / 2)
    assert found.forgetting == pytest.approx(((-1.5 + 4.0) + (-3.0 + 2.0)) / 2)


CONFIG = """
task: {name: continual, sources: %s, steps_per_task: 12, examples: 4}
network:
  modules: {embed: {kind: embedding, size: 256, dim: 16}, head: {kind: linear, dim_in: 16, dim_out: 256}}
  connections: [{from: in, to: embed}, {from: embed, to: head}, {from: head, to: out}]
hierarchy:
  groups: {all: {match: "**"}}
  levels:
    task: {clock: step, objective: {losses.outer.next_token: 1.0}, groups: [all], optimizer: {name: adam, lr: 0.1}}
training: {steps: 24, batch: 8, length: 32, warmup: 0, schedule: constant, evaluate_every: %d}
"""


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row.pop("step"): row for row in found if row.pop("kind") == "evaluation"}


@pytest.mark.parametrize("every", [12, 24, 7])
def test_training_measures_forgetting_and_transfer(files, tmp_path, every):
    """A bigram model of letters, then of digits: each is worse than chance for the other."""
    config = config_of(CONFIG % (list(files), every))
    trained = train(config, tmp_path / "runs")
    found = rows(trained.folder)
    assert set(found) == {0, *range(every, 25, every), 12, 24}
    r = [[-found[step][f"bits_per_byte/task-{task}"] for task in (0, 1)] for step in (0, 12, 24)]
    last = found[24]
    assert r[0] == pytest.approx([-8.0, -8.0], abs=0.5)
    assert last["backward_transfer"] == pytest.approx(r[2][0] - r[1][0]) and last["backward_transfer"] < -0.5
    assert last["forward_transfer"] == pytest.approx(r[1][1] - r[0][1]) and last["forward_transfer"] < 0
    assert last["forgetting"] == pytest.approx(-last["backward_transfer"])
    assert "forgetting" not in found[12]


def test_a_training_that_ends_before_the_last_task_has_no_summary(files, tmp_path):
    config = config_of(CONFIG % (list(files), 12), "training.steps=12")
    assert set(rows(train(config, tmp_path / "runs").folder)[12]) == {f"bits_per_byte/task-{task}" for task in (0, 1)}
    assert build_task(config).summarise({}) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ("python",)}, "1 spellings of ['python'] are no sequence of different tasks; name more"),
        ({"sources": ("web", "web")}, "1 spellings of ['web', 'web'] are no sequence of different tasks"),
        ({"spellings": 0}, "spellings, steps_per_task and examples must be at least 1, not 0, 200 and 16"),
        ({"sources": ("no", "where")}, "there is no source 'no'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(TaskError) as error:
        Continual(**options)
    assert str(error.value).startswith(message)
