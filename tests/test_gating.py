"""Gating functions: values, straight-through gradients, and these in expectation."""

import itertools

import pytest
import torch

from metamem import gating

pytestmark = pytest.mark.usefixtures("float64")


def multilinear(gates, coefficients):
    """Σ over subsets of choices, one of each group, c · Π m: what a gradient's expectation goes through exactly."""
    total = coefficients
    for of_group in gates:
        total = torch.tensordot(of_group, total, 1)
    return total


def test_in_expectation_a_straight_through_gradient_is_that_of_dense_gates():
    """Of one choice a group, drawn by its softmax: E[ST gradient] = ∂/∂z f(softmax z), f multilinear; all draws."""
    logits, coefficients = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, 4)
    weights = gating.dense(logits)
    (dense,) = torch.autograd.grad(multilinear(weights, coefficients), logits, retain_graph=True)
    mean = torch.zeros_like(logits)
    for drawn in itertools.product(range(4), repeat=3):
        hard = torch.nn.functional.one_hot(torch.tensor(drawn), 4).to(logits)
        gates = gating.straight_through(hard, weights)
        assert torch.equal(gates, hard)
        (slope,) = torch.autograd.grad(multilinear(gates, coefficients), logits, retain_graph=True)
        mean += (hard * weights).sum(-1).prod().detach() * slope
    torch.testing.assert_close(mean, dense)


def test_in_expectation_a_binary_gradient_is_that_of_the_probability_to_be_open():
    """Under noise u, uniform on (−½, ½), a gate is open with probability p = z + ½: E[ST gradient of f(z + u)] =
    ∂/∂z f(p), f multilinear; all draws."""
    logits, coefficients = (torch.rand(3) - 0.5).requires_grad_(), torch.randn(2, 2, 2)

    def function(opened):
        return multilinear(torch.stack([1 - opened, opened], -1), coefficients)

    (dense,) = torch.autograd.grad(function(logits + 0.5), logits)
    mean = torch.zeros_like(logits)
    for drawn in itertools.product([0.0, 1.0], repeat=3):
        hard = torch.tensor(drawn)
        noise = (hard - 0.5) * 1e-3 - logits.detach()  # any that draws these: the gradient sees none of it
        gates = gating.binary(logits + noise)
        assert torch.equal(gates, hard)
        (slope,) = torch.autograd.grad(function(gates), logits)
        chance = torch.where(hard > 0, logits + 0.5, 0.5 - logits).prod().detach()
        mean += chance * slope
    torch.testing.assert_close(mean, dense)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_a_top_1_gate_is_its_softmax_and_not_one(shape):
    """Renormalised it would be constant, and its gradient zero. Of equal logits the first is open."""
    logits = torch.randn(shape, requires_grad=True)
    gates = gating.top_k(logits, 1)
    weights = torch.softmax(logits, -1)
    torch.testing.assert_close(gates.sum(-1), weights.amax(-1))
    assert ((gates > 0).sum(-1) == 1).all()
    assert torch.autograd.grad(gates.square().sum(), logits)[0].abs().max() > 0
    assert torch.equal(gating.top_k(torch.zeros(shape), 2)[..., :2], torch.full((*shape[:-1], 2), 0.25))


def test_a_binary_gate_is_open_at_zero_and_its_gradient_whole_everywhere():
    logits = torch.tensor([-2.0, -1e-9, 0.0, 1e-9, 2.0], requires_grad=True)
    gates = gating.binary(logits)
    assert gates.tolist() == [0, 0, 1, 1, 1]
    assert torch.autograd.grad((gates * torch.arange(5.0)).sum(), logits)[0].tolist() == [0, 1, 2, 3, 4]
