"""Plain layers: each computes its equation; a short convolution goes on where a stream was cut."""

import pytest
import torch
from small_models import streaming_law
from torch.nn import functional

from metamem.layers import MLP, Embedding, Linear, RMSNorm, ShortConvolution

pytestmark = pytest.mark.usefixtures("float64")


def naive_convolution(weight, x):
    """x_t + Σ_i w_i ⊙ x_{t−i}, w_0 the last column, token by token."""
    outputs = []
    for t in range(x.shape[1]):
        y = x[:, t]
        for i in range(min(weight.shape[2], t + 1)):
            y = y + weight[:, 0, -1 - i] * x[:, t - i]
        outputs.append(y)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("width, tokens", [(4, 11), (4, 2), (1, 5), (3, 1)])
def test_short_convolution_is_its_equation_in_values_and_gradients(width, tokens):
    layer, x = ShortConvolution(6, width), torch.randn(2, tokens, 6, requires_grad=True)
    y, state = layer(x)
    expected = naive_convolution(layer.weight, x)
    torch.testing.assert_close(y, expected)
    assert state["past"].shape == (2, width - 1, 6)
    weights = torch.randn_like(y)
    mine = torch.autograd.grad((weights * y).sum(), [x, layer.weight])
    plain = torch.autograd.grad((weights * expected).sum(), [x, layer.weight])
    torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("width", [1, 4])
def test_short_convolution_keeps_the_streaming_law(width):
    streaming_law(ShortConvolution(6, width), torch.randn(3, 9, 6, requires_grad=True))


def test_short_convolution_is_causal():
    layer, x = ShortConvolution(6, 3), torch.randn(1, 8, 6)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x).abs().amax((0, 2, 3, 5))
    steps = torch.arange(8)
    assert torch.equal(jacobian > 0, (steps[None] <= steps[:, None]) & (steps[None] > steps[:, None] - 3))


@pytest.mark.parametrize("activation", ["silu", "gelu", "tanh", "relu"])
def test_mlp_is_its_equation(activation):
    layer, x = MLP(6, expansion=1.5, activation=activation), torch.randn(2, 3, 6)
    assert layer.up.weight.shape == (9, 6)
    function = torch.tanh if activation == "tanh" else getattr(functional, activation)
    torch.testing.assert_close(layer(x), function(x @ layer.up.weight.T) @ layer.down.weight.T)


def test_rms_norm_is_its_equation():
    layer, x = RMSNorm(6), torch.randn(2, 3, 6)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6))
    torch.testing.assert_close(layer(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight)


def test_embedding_gives_a_row_for_each_token():
    layer, x = Embedding(5, 6), torch.tensor([[0, 4, 4]])
    assert torch.equal(layer(x)[0], layer.weight[[0, 4, 4]])


def test_layers_say_their_dims():
    dims = [(layer.dim_in, layer.dim_out) for layer in (Embedding(5, 6), Linear(6, 7), MLP(6), RMSNorm(6))]
    assert dims == [(None, 6), (6, 7), (6, 6), (6, 6)]
