"""Retention objectives: one loss per matrix, zero where nothing was written; their gradients are in test_losses.py."""

import pytest
import torch
from torch.nn import functional

from losses import retention

pytestmark = pytest.mark.usefixtures("float64")

ALL = {name: (getattr(retention, name), getattr(retention, f"{name}_gradient")) for name in ("l2", "elastic_net", "kl")}
every = pytest.mark.parametrize(("objective", "gradient"), ALL.values(), ids=ALL.keys())


@every
def test_matrices_do_not_mix_and_one_initial_matrix_serves_a_batch(objective, gradient):
    weights, initial = torch.randn(3, 2, 4, 5), torch.randn(2, 4, 5)
    whole, slope = objective(weights, initial), gradient(weights, initial)
    assert whole.shape == (3, 2) and slope.shape == weights.shape
    for row in range(3):
        for head in range(2):
            torch.testing.assert_close(objective(weights[row, head], initial[head]), whole[row, head])
            torch.testing.assert_close(gradient(weights[row, head], initial[head]), slope[row, head])


@every
def test_it_is_zero_with_gradient_zero_at_the_initial_weights_and_positive_elsewhere(objective, gradient):
    weights, initial = torch.randn(2, 6, 4, 5).unbind(0)
    torch.testing.assert_close(objective(initial, initial), torch.zeros(6), rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient(initial, initial), torch.zeros(6, 4, 5), rtol=0, atol=1e-15)
    assert (objective(weights, initial) > 0).all()


@every
def test_a_small_step_down_it_comes_nearer(objective, gradient):
    weights, initial = torch.randn(2, 6, 4, 5).unbind(0)
    stepped = weights - 1e-3 * gradient(weights, initial)
    assert (objective(stepped, initial) < objective(weights, initial)).all()


def test_l2_is_half_the_squared_frobenius_norm_and_its_step_a_forget_gate():
    weights, initial = torch.randn(2, 3, 4, 5).unbind(0)
    expected = 0.5 * torch.linalg.matrix_norm(weights - initial) ** 2
    torch.testing.assert_close(retention.l2(weights, initial), expected)
    stepped = weights - 0.25 * retention.l2_gradient(weights, initial)
    torch.testing.assert_close(stepped, initial + 0.75 * (weights - initial))


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_elastic_net_mixes_absolute_values_and_squares(mix):
    weights, initial = torch.randn(2, 3, 4, 5).unbind(0)
    change = weights - initial
    expected = mix * change.abs().sum((-2, -1)) + (1 - mix) * 0.5 * change.square().sum((-2, -1))
    actual = retention.elastic_net(weights, initial, mix)
    torch.testing.assert_close(actual, expected, rtol=0, atol=mix * 20 * 1e-3)  # √ε per entry, of 20
    weights.requires_grad_()
    slope = torch.autograd.grad(retention.elastic_net(weights, initial, mix).sum(), weights)[0]
    torch.testing.assert_close(retention.elastic_net_gradient(weights, initial, mix), slope)


def test_elastic_net_makes_small_changes_vanish_where_l2_keeps_a_share():
    small, zero = torch.full((1, 1), 0.05), torch.zeros(1, 1)
    sparse = faded = small
    for _ in range(100):
        sparse = sparse - 2e-3 * retention.elastic_net_gradient(sparse, zero)
        faded = faded - 2e-3 * retention.l2_gradient(faded, zero)
    assert sparse.item() < 1e-9 < 0.04 < faded.item()


def test_kl_is_torchs_summed_over_rows_and_blind_to_a_shift_of_a_row():
    weights, initial = torch.randn(2, 3, 4, 5).unbind(0)
    log_p, log_initial = weights.log_softmax(-1), initial.log_softmax(-1)
    expected = functional.kl_div(log_initial, log_p, reduction="none", log_target=True).sum((-2, -1))
    torch.testing.assert_close(retention.kl(weights, initial), expected)
    torch.testing.assert_close(retention.kl(weights + torch.randn(3, 4, 1), initial), expected)
