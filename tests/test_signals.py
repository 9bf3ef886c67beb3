"""Signals: the written-out backpropagation is autograd's; objectives without a gradient get one."""

import pytest
import torch

from losses.recall import cosine, mse
from metamem.memory import signals
from metamem.memory.activations import ACTIVATIONS
from metamem.memory.fast_weights import FastWeights
from metamem.memory.level import TokenLevel
from metamem.memory.networks import Network

pytestmark = pytest.mark.usefixtures("float64")


def log_cosh(pred, target):
    """An objective of a user: no gradient beside it."""
    return (torch.logaddexp(pred - target, target - pred)).sum(-1)


def unwritten_mse(pred, target):
    return 0.5 * ((pred - target) ** 2).sum(-1)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_error_behind_an_activation_is_autograds(name):
    activation = ACTIVATIONS[name]
    extremes = [0.0, -0.0, 1e-12, -1e-12, 1.0, -1.0, 20.0, -20.0, 800.0, -800.0, 1e8, -1e8]
    z = torch.cat([torch.linspace(-9, 9, 181), torch.tensor(extremes)]).requires_grad_()
    error = torch.randn_like(z)
    expected = torch.autograd.grad(activation.function(z), z, error)[0]
    torch.testing.assert_close(activation.backward(error, z.detach()), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_error_behind_an_activation_is_differentiable_twice_and_under_vmap(name):
    backward = ACTIVATIONS[name].backward
    error, z = (torch.randn(2, 9).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(backward, (error, z))
    assert torch.autograd.gradgradcheck(backward, (error, z))

    def slope(error, z):
        return torch.func.grad(lambda z: backward(error, z).square().sum())(z)

    torch.testing.assert_close(torch.func.vmap(slope)(error, z), slope(error, z))


@pytest.mark.parametrize("objective", [mse, cosine, log_cosh], ids=["mse", "cosine", "log_cosh"])
@pytest.mark.parametrize("hidden", [(), (7,), (7, 5), (3, 6, 4)], ids=["depth1", "depth2", "depth3", "depth4"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_inputs_times_signals_are_the_gradients_of_the_weights(name, hidden, objective):
    network = Network((4, *hidden, 3), name)
    weights = [weight.unsqueeze(0).requires_grad_() for weight in network.initial_weights(heads=2)]
    key, value = torch.randn(5, 2, 6, 4), torch.randn(5, 2, 6, 3)
    forward = network.forward(key, lambda layer, a: a @ weights[layer])
    expected = torch.autograd.grad(objective(forward.output, value).sum(), weights, retain_graph=True)
    error = signals.output_error({objective: 1.0}, forward.output, value)
    deltas = network.backward(error, weights, forward)
    for inputs, delta, gradient in zip(forward.inputs, deltas, expected, strict=True):
        torch.testing.assert_close((inputs.mT @ delta).sum(0, keepdim=True), gradient, rtol=1e-9, atol=1e-11)


def test_objectives_add_up_by_weight():
    pred, target = torch.randn(2, 3, 5, 4).unbind(0)
    objectives = {mse: 0.5, cosine: -2.0, log_cosh: 0.1}
    pred.requires_grad_()
    value = signals.value(objectives, pred, target)
    torch.testing.assert_close(value, 0.5 * mse(pred, target) - 2 * cosine(pred, target) + 0.1 * log_cosh(pred, target))
    expected = torch.autograd.grad(value.sum(), pred)[0]
    torch.testing.assert_close(signals.output_error(objectives, pred.detach(), target), expected)


def test_what_is_written_out_is_found_by_its_name_and_nothing_else_is():
    assert signals.objective_gradient(mse) is not None
    assert signals.objective_gradient(mse).__name__ == "mse_gradient"
    assert signals.objective_gradient(log_cosh) is None
    assert signals.objective_gradient(lambda pred, target: mse(pred, target)) is None


@pytest.mark.parametrize("settings", [{}, {"hidden": (5,)}, {"signal_at": "token"}], ids=["chunk", "mlp", "token"])
def test_an_objective_without_a_gradient_gives_the_memory_the_same_numbers(settings):
    results = []
    for objective in (mse, unwritten_mse):
        torch.manual_seed(1)
        memory = FastWeights(8, [TokenLevel("fast", {objective: 0.7}, lr_max=0.5)], heads=2, chunk=4, **settings)
        x = torch.randn(2, 10, 8, requires_grad=True)
        y, _, aux = memory(x)
        gradients = torch.autograd.grad(y.square().sum() + aux["surprise"].sum(), [x, *memory.parameters()])
        results.append([y, aux["surprise"], *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_the_executors_agree_on_an_objective_without_a_gradient():
    results = []
    for executor in ("dual", "recurrence", "vmap_grad"):
        torch.manual_seed(1)
        level = TokenLevel("fast", {log_cosh: 1.0}, lr_max=0.3, momentum="learned")
        memory = FastWeights(8, [level], heads=2, chunk=4, hidden=(5,), executor=executor)
        x = torch.randn(2, 10, 8, requires_grad=True)
        y = memory(x).y
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *memory.parameters()])])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
