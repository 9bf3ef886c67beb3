"""Objectives: each gradient that is written out is autograd's, also at extreme values."""

import importlib
import inspect
import math
import pkgutil

import pytest
import torch

import losses
from losses import outer, recall

pytestmark = pytest.mark.usefixtures("float64")


def written_out():
    """Every objective of the package with its gradient beside it: a new one joins by being written."""
    for module in pkgutil.iter_modules(losses.__path__):
        functions = dict(inspect.getmembers(importlib.import_module(f"losses.{module.name}"), inspect.isfunction))
        for name, function in functions.items():
            if f"{name}_gradient" in functions:
                yield pytest.param(function, functions[f"{name}_gradient"], id=f"{module.name}.{name}")


WRITTEN_OUT = list(written_out())


def pairs():
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    basis = torch.eye(5, dtype=torch.float64)[:1].expand(7, 5)
    zero = torch.zeros(7, 5, dtype=torch.float64)
    return {
        "random": (pred, target),
        "equal": (pred, pred.clone()),
        "opposite": (pred, -pred),
        "orthogonal": (basis, basis.roll(1, -1)),
        "zero pred": (zero, target),
        "zero target": (pred, zero),
        "both zero": (zero, zero.clone()),
        "tiny": (1e-9 * pred, 1e-9 * target),
        "huge": (1e9 * pred, 1e9 * target),
        "huge against tiny": (1e9 * pred, 1e-9 * target),
    }


PAIRS = pairs()


@pytest.mark.parametrize("values", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize(("objective", "gradient"), WRITTEN_OUT)
def test_a_written_out_gradient_is_that_of_autograd(objective, gradient, values):
    pred, target = values[0].clone().requires_grad_(), values[1]
    expected = torch.autograd.grad(objective(pred, target).sum(), pred)[0]
    torch.testing.assert_close(gradient(pred.detach(), target), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("objective", "gradient"), WRITTEN_OUT)
def test_a_written_out_gradient_differentiates_as_autograds_does(objective, gradient):
    pred, target = torch.randn(2, 3, 4).unbind(0)
    assert torch.autograd.gradcheck(gradient, (pred.requires_grad_(), target.requires_grad_()))
    assert torch.autograd.gradcheck(objective, (pred, target))


@pytest.mark.parametrize("objective", [recall.mse, recall.cosine], ids=["mse", "cosine"])
def test_tokens_do_not_mix(objective):
    pred, target = torch.randn(2, 2, 6, 4).unbind(0)
    whole = objective(pred, target)
    for row in range(2):
        for token in range(6):
            torch.testing.assert_close(objective(pred[row, token], target[row, token]), whole[row, token])


def test_mse_is_half_the_squared_distance():
    loss = recall.mse(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    assert loss.tolist() == [2.5, 12.5]


def test_cosine_is_zero_along_two_against_and_one_across():
    pred = torch.tensor([[2e3, 0.0], [2e3, 0.0], [2e3, 0.0]])
    target = torch.tensor([[5e3, 0.0], [-5e3, 0.0], [0.0, 5e3]])
    torch.testing.assert_close(recall.cosine(pred, target), torch.tensor([0.0, 2.0, 1.0]))


def test_next_token_is_minus_the_log_probability():
    logits, target = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    expected = -torch.log(torch.softmax(logits, -1))
    loss = outer.next_token(logits, target)
    for row in range(2):
        for token in range(3):
            torch.testing.assert_close(loss[row, token], expected[row, token, target[row, token]])


def test_next_token_of_no_knowledge_is_log_of_the_vocabulary_and_of_certainty_is_zero():
    target = torch.tensor([3, 3])
    logits = torch.stack([torch.zeros(256), 1e6 * torch.eye(256)[3]])
    torch.testing.assert_close(outer.next_token(logits, target), torch.tensor([math.log(256), 0.0]))


def test_next_token_is_finite_where_the_truth_was_ruled_out():
    loss = outer.next_token(torch.tensor([[1e6, -1e6]]), torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor([2e6]))
