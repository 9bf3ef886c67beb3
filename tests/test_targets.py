"""Positions that are not asked: no loss sees them, on any clock, and means are over those that are."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from small_models import brier, close, inner_level, recurrent, shaken, tiny
from torch.func import functional_call

from losses.outer import next_token
from metamem import InnerLoop, build, inner_levels, train
from metamem.hierarchy import loss_per_token
from metamem.targets import asked, mean_asked
from metamem.tasks import IGNORE

pytestmark = pytest.mark.usefixtures("float64")
VOCABULARY, TIME = 7, 9
SHORT = ("training.steps=1", "training.batch=3", f"training.length={TIME}", "training.warmup=0")


def masked(targets, kept):
    return torch.where(kept, targets, IGNORE)


@pytest.fixture
def batch():
    inputs, targets = torch.randint(VOCABULARY, (2, 3, TIME))
    return inputs, masked(targets, torch.rand(3, TIME) < 0.4)


@settings(max_examples=20)
@given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 1000))
def test_a_loss_is_the_mean_over_what_is_asked_and_zero_where_nothing_is(kept, seed):
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(2, 3, VOCABULARY, dtype=torch.float64, generator=generator).requires_grad_()
    targets = masked(torch.randint(VOCABULARY, (2, 3), generator=generator), torch.tensor(kept).view(2, 3))
    losses = loss_per_token({next_token: 0.5, brier: 2.0}, pred, targets)
    loss = mean_asked(losses, targets)
    by_hand = [
        0.5 * -pred[row, t].log_softmax(-1)[targets[row, t]]
        + 2 * (pred[row, t].softmax(-1) - torch.eye(VOCABULARY)[targets[row, t]]).square().sum()
        for row in range(2)
        for t in range(3)
        if asked(targets)[row, t]
    ]
    expected = torch.stack(by_hand).mean() if by_hand else pred.sum() * 0
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, pred)[0], torch.autograd.grad(expected, pred)[0])
    assert (losses[~asked(targets)] == 0).all()


def by_hand(model, inputs, targets, period):
    """Predictions of a level `stream` on the tiny model's middle, its losses means over what a period asks."""
    fast = {name: value for name, value in model.named_parameters() if name.startswith(("mlp.", "norm."))}
    memory, predictions = None, []
    for start in range(0, TIME, period):
        here = slice(start, start + period)
        out = functional_call(model, fast, (inputs[:, here], memory))
        memory, wanted = out.state, targets[:, here] != -100
        predictions.append(out.y)
        if start + period < TIME:
            loss = next_token(out.y[wanted], targets[:, here][wanted]).mean() if wanted.any() else out.y.sum() * 0
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {key: value - 0.3 * step for (key, value), step in zip(fast.items(), gradients, strict=True)}
    return torch.cat(predictions, 1)


def test_an_inner_update_is_on_the_mean_of_what_its_period_asks(batch):
    inputs, targets = batch
    targets[:, 4:6] = IGNORE  # of the third period nothing is asked: a zero gradient
    config = recurrent(inner_level())
    model = shaken(config)
    y = InnerLoop(model, inner_levels(config, model)).run(inputs, targets).y
    expected = by_hand(model, inputs, targets, 2)
    close({"y": y}, {"y": expected})
    of = dict(model.named_parameters())
    mine, theirs = (torch.autograd.grad(next_token(one, inputs).sum(), list(of.values())) for one in (y, expected))
    close(dict(zip(of, mine, strict=True)), dict(zip(of, theirs, strict=True)))


@pytest.mark.parametrize("optimizer", ["{name: sgd, lr: 0.3, momentum: 0.5}", "{name: adam, lr: 0.3}"])
def test_with_nothing_asked_no_level_moves_and_nothing_is_nan(optimizer, batch):
    config = tiny(inner_level(optimizer=optimizer))
    model = shaken(config)
    inputs, targets = batch[0], torch.full_like(batch[1], IGNORE)
    y = InnerLoop(model, inner_levels(config, model)).run(inputs, targets).y
    torch.testing.assert_close(y, model(inputs).y)
    gradients = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


class Asking:
    """A task of one batch."""

    def __init__(self, inputs, targets):
        self.batch = inputs, targets

    def sample(self, generator, batch, length):
        return self.batch


def test_training_steps_on_the_mean_over_what_is_asked(batch, tmp_path):
    inputs, targets = batch
    config = tiny("", *SHORT, "training.gradient_clip=null", "training.schedule=constant")
    reference = build(config)
    kept = targets != -100
    loss = next_token(reference(inputs).y[kept], targets[kept]).mean()
    loss.backward()
    seen = []
    model = train(config, tmp_path, task=Asking(inputs, targets), progress=seen.append).model
    assert seen[0].losses["task"] == pytest.approx(loss.item())
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        close({name: mine}, {name: theirs - 0.1 * theirs.grad})


def test_training_on_a_batch_that_asks_nothing_moves_nothing(batch, tmp_path):
    config = tiny("", *SHORT)
    seen = []
    task = Asking(batch[0], torch.full_like(batch[1], IGNORE))
    model = train(config, tmp_path, task=task, progress=seen.append).model
    assert seen[0].losses["task"] == 0.0
    close(dict(model.named_parameters()), dict(build(config).named_parameters()))
