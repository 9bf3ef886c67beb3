"""Dictionary inference: what is asked was shown, its translation is the episode's, and what is measured is right."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from metamem.tasks import IGNORE, Dictionary, TaskError


def sampled(task, batch=4, length=16, seed=0):
    return task.sample(torch.Generator().manual_seed(seed), batch, length)


def solve(inputs, pairs, word, symbols):
    """The answers of one who looks every symbol up, at all positions; IGNORE where nothing is asked or known."""
    answers = torch.full_like(inputs, IGNORE)
    for row, found in zip(inputs.tolist(), answers, strict=True):
        known = {}
        for start in range(0, 2 * pairs * word, 2 * word):
            known |= dict(zip(row[start : start + word], row[start + word : start + 2 * word], strict=True))
        for start in range(2 * pairs * word, len(row) - 2 * word + 1, 2 * word):
            asked = row[start : start + word]
            if 2 * symbols not in asked:
                found[start + word : start + 2 * word] = torch.tensor([known[symbol] for symbol in asked])
    return answers


@settings(max_examples=40)
@given(
    st.integers(1, 6), st.integers(1, 4), st.integers(2, 9), st.integers(1, 3), st.integers(0, 7), st.integers(0, 99)
)
def test_what_is_asked_was_shown_and_its_translation_is_the_target(pairs, word, symbols, questions, spare, seed):
    task = Dictionary(pairs=pairs, word=word, symbols=symbols)
    length = 2 * word * (pairs + questions) + min(spare, 2 * word - 1)
    inputs, targets = sampled(task, 3, length, seed)
    assert inputs.shape == targets.shape == (3, length) and inputs.max() < task.vocabulary
    assert torch.equal(targets, solve(inputs, pairs, word, symbols))
    assert ((targets != IGNORE).sum(1) == questions * word).all()
    assert (inputs[targets != IGNORE] == 2 * symbols).all(), "the answer is not in the input"


def test_a_dictionary_is_one_to_one_and_another_in_every_episode():
    inputs, _ = sampled(Dictionary(pairs=8), batch=500, length=18)
    shown = inputs[:, :16].unflatten(1, (8, 2))
    assert (shown[..., 0].sort(1).values == torch.arange(8)).all()
    assert (shown[..., 1].sort(1).values == torch.arange(8, 16)).all()
    table = shown[..., 1].gather(1, shown[..., 0].argsort(1))
    share = torch.stack([(table == 8 + target).double().mean(0) for target in range(8)])
    assert ((share - 1 / 8).abs() < 4.5 * (1 / 8 * 7 / 8 / 500) ** 0.5).all()


def test_no_symbol_comes_again_before_all_that_there_are_have():
    inputs, targets = sampled(Dictionary(pairs=4, symbols=8), batch=50, length=16)
    assert all(len(set(row[:8:2])) == 4 for row in inputs.tolist())
    assert all(len(set(row)) == 4 for row in targets[targets != IGNORE].view(50, 4).tolist())
    inputs, _ = sampled(Dictionary(pairs=3, word=2, symbols=4), batch=50, length=16)
    assert all(set(row[0:2] + row[4:6]) == {0, 1, 2, 3} for row in inputs.tolist())


def test_the_generator_decides_all_and_of_several_numbers_one_is_drawn_for_each_batch():
    task = Dictionary(pairs=(2, 4), word=(1, 2))
    for one, other in zip(sampled(task, length=24), sampled(task, length=24), strict=True):
        assert torch.equal(one, other)
    generator, found = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        targets = task.sample(generator, 3, 24)[1]
        first = (targets != IGNORE).int().argmax(1)
        assert (first == first[0]).all()
        found.add(int(first[0]))
    assert found == {2 * 2 + 1, 4 * 2 + 1, 2 * 4 + 2, 4 * 4 + 2}


def test_evaluation_counts_right_answers_for_trained_and_more_pairs_and_every_length_of_words():
    task = Dictionary(pairs=4, symbols=8, word=(1, 2), evaluated_pairs=(6,), examples=70)
    names = [f"accuracy/pairs-{pairs}-word-{word}" for word in (1, 2) for pairs in (4, 6)]

    def knows(inputs, targets):
        return torch.nn.functional.one_hot(targets.clamp(min=0), task.vocabulary).double()

    assert task.evaluate(knows) == dict.fromkeys(names, 1.0)
    guess = task.evaluate(lambda inputs, targets: torch.zeros(*inputs.shape, task.vocabulary))
    assert list(guess) == names and set(guess.values()) == {0.0}  # symbol 0 is no translation
    assert list(Dictionary(evaluated_pairs=(4, 8)).evaluate(knows)) == ["accuracy/pairs-4", "accuracy/pairs-8"]
    inputs, targets = task.evaluation(6, 2)
    assert inputs.shape == (70, 48) and (targets != IGNORE).sum(1).eq(12).all()
    assert torch.equal(inputs, Dictionary(symbols=8, examples=70).evaluation(6, 2)[0])
    assert not torch.equal(inputs, Dictionary(symbols=8, examples=70, seed=1).evaluation(6, 2)[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pairs": ()}, r"pairs must be numbers of at least 1, not \[\]"),
        ({"word": (1, 0)}, r"word must be numbers of at least 1, not \[1, 0\]"),
        ({"evaluated_pairs": (0,)}, r"evaluated_pairs must be numbers of at least 1, not \[4, 0\]"),
        ({"symbols": 1}, "symbols must be at least 2"),
        ({"examples": 0}, "examples at least 1, not 8 and 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, told):
    with pytest.raises(TaskError, match=told):
        Dictionary(**options)


def test_a_sequence_too_short_for_a_question_is_refused():
    sampled(Dictionary(pairs=4, word=2), length=20)
    with pytest.raises(TaskError, match=r"at least 20 tokens, not 19: make training.length larger"):
        sampled(Dictionary(pairs=4, word=2), length=19)


def test_it_says_what_an_episode_holds():
    text = Dictionary(pairs=(2, 4), word=3).describe()
    assert "train: 2, 4 pairs of words of 3 symbols" in text and "256 episodes of 2, 4, 6, 8 pairs" in text
