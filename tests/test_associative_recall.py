"""Associative recall: every query has one answer and it came before; gaps are the law's; what is measured is right."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from metamem.targets import accuracy
from metamem.tasks import IGNORE, AssociativeRecall, TaskError
from metamem.tasks.associative_recall import gap_law


def sampled(task, batch=4, length=64, seed=0):
    return task.sample(torch.Generator().manual_seed(seed), batch, length)


@settings(max_examples=40)
@given(st.integers(1, 16), st.integers(32, 80), st.sampled_from([64, 97, 300]), st.integers(0, 99))
def test_every_query_has_one_answer_and_it_came_before(pairs, spare, vocabulary, seed):
    task = AssociativeRecall(pairs=pairs, vocabulary=vocabulary)
    inputs, targets = sampled(task, 3, 2 * pairs + spare, seed)
    assert inputs.shape == targets.shape == (3, 2 * pairs + spare)
    assert inputs.min() >= 0 and inputs.max() < vocabulary
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert max(keys) < vocabulary // 2 <= min(values)
        asked = [place for place, target in enumerate(wanted) if target != IGNORE]
        assert sorted(row[place] for place in asked) == sorted(keys) and min(asked) >= 2 * pairs
        assert all(wanted[place] == values[keys.index(row[place])] for place in asked)
        others = [token for place, token in enumerate(row) if place >= 2 * pairs and place not in asked]
        assert not set(others) & set(keys)


def test_the_generator_decides_all():
    task = AssociativeRecall(pairs=(2, 4, 8))
    (first, targets), (again, same_targets), (other, _) = (sampled(task, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and torch.equal(targets, same_targets) and not torch.equal(first, other)


def test_of_several_numbers_of_pairs_one_is_drawn_for_each_batch():
    task, generator = AssociativeRecall(pairs=(2, 4, 8)), torch.Generator().manual_seed(0)
    counts = [(task.sample(generator, 3, 64)[1] != IGNORE).sum(1) for _ in range(60)]
    assert all(len(count.unique()) == 1 for count in counts)
    assert {int(count[0]) for count in counts} == {2, 4, 8}


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power):
    places, rows = 12, 20_000
    _, targets = sampled(AssociativeRecall(pairs=1, power=power), rows, 2 + 2 * places)
    gaps = (targets != IGNORE).int().argmax(1) - 2
    assert (gaps % 2 == 0).all()
    found = torch.bincount(gaps // 2, minlength=places) / rows
    law = torch.arange(1, places + 1, dtype=torch.float64) ** (power - 1)
    expected = law / law.sum()
    torch.testing.assert_close(gap_law(places, power), expected)
    assert ((found - expected).abs() < 4.5 * (expected * (1 - expected) / rows).sqrt()).all()


def test_the_evaluation_set_is_fixed_by_its_seed_and_was_not_trained_on():
    task, again, other = (AssociativeRecall(pairs=(4, 8), examples=50, seed=seed) for seed in (0, 0, 1))
    inputs, targets = task.evaluation(8, 64)
    assert inputs.shape == (50, 64) and ((targets != IGNORE).sum(1) == 8).all()
    assert torch.equal(inputs, again.evaluation(8, 64)[0])
    assert not torch.equal(inputs, other.evaluation(8, 64)[0])
    starts = {tuple(row[:16].tolist()) for row in inputs}
    for seed in range(8):
        batch = task.episodes(torch.Generator().manual_seed(seed), 200, 64, 8)[0]
        assert not starts & {tuple(row[:16].tolist()) for row in batch}


def one_hot(answers, vocabulary):
    return torch.nn.functional.one_hot(answers, vocabulary).float()


def test_looking_the_answer_up_is_right_always_and_guessing_at_the_level_of_chance():
    task = AssociativeRecall(pairs=(4, 16), vocabulary=64, examples=400)

    def look_up(inputs, targets):
        answers = torch.zeros_like(inputs)
        for row, tokens in enumerate(inputs.tolist()):
            pairs = int((targets[row] != IGNORE).sum())
            known = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
            answers[row] = torch.tensor([known.get(token, 0) for token in tokens])
        return one_hot(answers, 64)

    def any_value_seen(inputs, targets):
        places = 2 * torch.randint(4, inputs.shape) + 1
        return one_hot(inputs.gather(1, places), 64)

    def any_value(inputs, targets):
        return one_hot(torch.randint(32, 64, inputs.shape), 64)

    assert task.evaluate(look_up, 64) == {"accuracy/pairs-4": 1.0, "accuracy/pairs-16": 1.0}
    assert task.evaluate(any_value_seen, 64)["accuracy/pairs-4"] == pytest.approx(1 / 4, abs=0.05)
    assert task.evaluate(any_value, 64)["accuracy/pairs-16"] == pytest.approx(1 / 32, abs=0.01)


def test_accuracy_counts_what_is_asked_only():
    targets = torch.tensor([[IGNORE, 3, IGNORE], [1, 2, IGNORE]])
    assert accuracy(torch.tensor([[3, 3, 3], [1, 1, 1]]), targets) == pytest.approx(2 / 3)
    assert torch.tensor(accuracy(targets[:, 2:], targets[:, 2:])).isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": ()}, "pairs must be numbers of at least 1, not []"),
        ({"pairs": (4, 0)}, "pairs must be numbers of at least 1, not [4, 0]"),
        (
            {"pairs": 64, "vocabulary": 100},
            "a vocabulary of 100 has 50 keys, too few for 64 pairs; make it at",
        ),
        ({"power": 0.0}, "power must be above 0 and at most 1, not 0.0"),
        ({"examples": 0}, "examples must be at least 1, not 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(TaskError) as error:
        AssociativeRecall(**options)
    assert str(error.value).startswith(message)


def test_a_sequence_too_short_for_its_pairs_is_refused():
    with pytest.raises(TaskError, match="16 pairs and their queries need a sequence of at least 64 tokens, not 63"):
        sampled(AssociativeRecall(pairs=(4, 16)), length=63)
    assert sampled(AssociativeRecall(pairs=(4, 16)), length=64)[0].shape == (4, 64)
