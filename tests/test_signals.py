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


def sign_symmetric(network, forward, weights, values):
    """A signal of a user: errors come back through the signs of the weights (Liao et al. 2016)."""
    return network.backward(forward.output - values, [weight.sign() for weight in weights], forward)


OWN = TokenLevel(
    "own", {mse: 1.0}, signal=sign_symmetric, lr_max=0.05, momentum="learned", forget="learned", forget_to="zero"
)


def own_memory(executor="dual", **settings):
    torch.manual_seed(0)
    settings = {"hidden": [6], "chunk": 4, **settings}
    return FastWeights(8, [OWN, TokenLevel("slow", {mse: 1.0}, period=4, lr=0.01)], 2, executor=executor, **settings)


@pytest.mark.parametrize("settings", [{}, {"network": "swiglu", "bias": True}, {"hidden": [], "chunk": 1}], ids=str)
def test_a_signal_of_ones_own_is_the_same_in_every_executor(settings):
    """The engine's dual form, the recurrence, and products by autograd: reads, state, outer gradients."""
    found = []
    for executor in ("dual", "recurrence", "vmap_grad"):
        memory, x = own_memory(executor, **settings), torch.linspace(-1, 1, 176).sin().view(2, 11, 8).requires_grad_()
        out = memory(x)
        slopes = torch.autograd.grad(out.y.square().sum(), [x, *memory.parameters()])
        found.append([out.y, *out.state["levels"]["own"]["delta"].values(), *slopes])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-11)


def test_a_signal_of_ones_own_is_written_as_it_says():
    """One token, by hand: from zero, Δ is −η in ⊗ δ at every layer."""
    memory = FastWeights(8, [TokenLevel("own", {mse: 1.0}, signal=sign_symmetric, lr=0.3)], heads=1, hidden=[6])
    x, (first, second) = torch.randn(1, 1, 8), (weight[0] for weight in memory.init)
    writes = memory.writer(x, x.dtype)
    key, value = writes.keys[0, 0, 0], writes.values[0, 0, 0]
    z = key @ first
    error = torch.nn.functional.silu(z) @ second - value
    gate = torch.sigmoid(z)
    inner = (error @ second.sign().T) * gate * (1 + z * (1 - gate))
    delta = list(memory(x).state["levels"]["own"]["delta"].values())
    torch.testing.assert_close(delta[0][0, 0], -0.3 * key.T @ inner)
    torch.testing.assert_close(delta[1][0, 0], -0.3 * torch.nn.functional.silu(z).T @ error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": [], "signal_at": "token"}, "solve for the signals .* not for test_signals.sign_symmetric"),
        ({"hidden": [], "network": "torch.nn.Linear"}, "test_signals.sign_symmetric needs the layers of a network"),
    ],
)
def test_where_a_signal_of_ones_own_cannot_go_it_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        own_memory(**settings)


def test_a_signal_of_other_shapes_is_refused_with_both():
    level = TokenLevel("own", {mse: 1.0}, signal=lambda network, forward, weights, values: [values])
    with pytest.raises(ValueError, match=r"\[\[1, 3, 5\], \[1, 3, 4\]\], and gives \[\[1, 3, 4\]\]"):
        FastWeights(8, [level], heads=2, hidden=[5])


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
