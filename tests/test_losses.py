"""Objectives: each gradient that is written out is autograd's, also at extreme values."""

import importlib
import inspect
import math
import pkgutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

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


@pytest.mark.parametrize("values", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize(("objective", "gradient"), WRITTEN_OUT)
def test_the_outer_gradient_is_finite_and_autograds_at_any_pair(objective, gradient, values):
    """Through the written-out gradient, as the outer loop has it, and through autograd's own, differentiated again."""
    inputs = [value.clone().requires_grad_() for value in values]
    direction = torch.randn_like(inputs[0])
    signals = [
        gradient(*inputs),
        torch.autograd.grad(objective(*inputs).sum(), inputs[0], create_graph=True)[0],
    ]
    written, derived = (
        torch.autograd.grad((signal * direction).sum(), inputs, materialize_grads=True) for signal in signals
    )
    assert all(x.isfinite().all() for x in written)
    scale = max(1.0, *(x.abs().max().item() for x in derived))
    torch.testing.assert_close(written, derived, rtol=1e-9, atol=1e-9 * scale)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.floats(-8, 8), st.floats(-8, 8), st.integers(0, 10**6))
@pytest.mark.parametrize(("objective", "gradient"), WRITTEN_OUT)
def test_at_any_shape_and_scale_the_gradient_is_autograds(objective, gradient, shape, exponent, other, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = shape if objective.__module__ == "losses.recall" else [*shape, 3]  # a matrix has two axes
    pred, target = torch.randn(2, *shape, generator=generator)
    pred, target = (10**exponent * pred).requires_grad_(), 10**other * target
    expected = torch.autograd.grad(objective(pred, target).sum(), pred)[0]
    written = gradient(pred.detach(), target)
    assert written.shape == pred.shape and written.isfinite().all()
    torch.testing.assert_close(written, expected, rtol=1e-7, atol=1e-7 * expected.abs().max().item() + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("objective", "gradient"), WRITTEN_OUT)
def test_types_stay_what_they_are(objective, gradient, dtype):
    pred, target = torch.randn(2, 3, 4).to(dtype).unbind(0)
    assert objective(pred, target).dtype == gradient(pred, target).dtype == dtype


RECALL = [parameter for parameter in WRITTEN_OUT if str(parameter.id).startswith("recall")]


@pytest.mark.parametrize(("objective", "_"), RECALL)
def test_tokens_do_not_mix(objective, _):
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


def test_lp_is_a_sum_of_powers_over_p_and_mse_at_two():
    pred, target = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 0.0]])
    assert recall.lp(pred, target).tolist() == [9 / 3]
    assert recall.lp(pred, target, p=4.0).tolist() == [17 / 4]
    pred, target = torch.randn(2, 6, 3).unbind(0)
    torch.testing.assert_close(recall.lp(pred, target, p=2.0), recall.mse(pred, target))
    torch.testing.assert_close(recall.lp_gradient(pred, target, p=2.0), recall.mse_gradient(pred, target))


@pytest.mark.parametrize("p", [2.0, 2.5, 3.0, 4.0])
def test_lp_of_any_p_has_autograds_gradient_and_a_finite_slope_at_zero(p):
    pred, target = torch.randn(2, 6, 3, requires_grad=True)
    expected = torch.autograd.grad(recall.lp(pred, target, p).sum(), pred)[0]
    torch.testing.assert_close(recall.lp_gradient(pred, target, p), expected)
    assert torch.autograd.gradcheck(lambda a, b: recall.lp_gradient(a, b, p), (pred, target))
    slope = torch.autograd.grad(recall.lp_gradient(pred, pred.detach(), p).sum(), pred)[0]
    assert torch.equal(slope, torch.full_like(slope, float(p == 2)))


@pytest.mark.parametrize("function", [recall.lp, recall.lp_gradient])
def test_lp_below_two_is_refused(function):
    with pytest.raises(ValueError, match=r"lp needs p of at least 2, not 1\.5; below it use l1 or huber"):
        function(torch.zeros(1, 2), torch.zeros(1, 2), p=1.5)


def test_l1_is_the_sum_of_absolute_errors_and_exactly_zero_at_zero():
    pred, target = torch.randn(2, 50, 3).unbind(0)
    torch.testing.assert_close(recall.l1(pred, target), (pred - target).abs().sum(-1), rtol=0, atol=3e-3)
    assert not recall.l1(pred, pred).any()
    far = torch.tensor([[30.0, -40.0, 0.0]])
    torch.testing.assert_close(recall.l1_gradient(far, torch.zeros(1, 3)), far.sign(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("delta", [0.1, 1.0, 3.0])
def test_huber_is_torchs(delta):
    pred, target = (3 * torch.randn(2, 50, 4)).unbind(0)
    expected = functional.huber_loss(pred, target, reduction="none", delta=delta).sum(-1)
    torch.testing.assert_close(recall.huber(pred, target, delta), expected)


def test_huber_takes_a_delta_per_token_and_gives_its_gradient():
    pred, target = (3 * torch.randn(2, 5, 4)).unbind(0)
    delta = (0.5 + torch.rand(5, 1)).requires_grad_()
    losses = recall.huber(pred, target, delta)
    for token in range(5):
        torch.testing.assert_close(losses[token], recall.huber(pred[token], target[token], delta[token].item()))
    assert torch.autograd.gradcheck(lambda d: recall.huber(pred, target, d), delta)
    assert torch.autograd.gradcheck(lambda d: recall.huber_gradient(pred, target, d), delta)


def test_a_step_on_the_dot_product_adds_key_times_value_as_linear_attention_does():
    key, value, weights = torch.randn(3), torch.randn(4), torch.randn(3, 4, requires_grad=True)
    step = -torch.autograd.grad(recall.dot_product(key @ weights, value), weights)[0]
    torch.testing.assert_close(step, torch.outer(key, value))


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
