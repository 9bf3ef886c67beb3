"""The written-out gradient of LayerNorm, and the gradients of that."""

import pytest
import torch

from metamem.memory.layer_norm import EPSILON, normalise, normalise_backward

pytestmark = pytest.mark.usefixtures("float64")


def plain(z):
    centred = z - z.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + EPSILON)


def test_it_is_the_equation():
    z = torch.randn(3, 5, 7)
    torch.testing.assert_close(normalise(z).unit, plain(z))


def test_its_gradient_is_that_of_autograd_and_so_are_the_gradients_of_that():
    z, g = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7, requires_grad=True)
    got = normalise_backward(g, z, normalise(z))
    expected = torch.autograd.grad(plain(z), z, g, create_graph=True)[0]
    torch.testing.assert_close(got, expected)
    weight = torch.randn(3, 5, 7)
    for one, other in zip(
        torch.autograd.grad((got * weight).sum(), (g, z), create_graph=True),
        torch.autograd.grad((expected * weight).sum(), (g, z), create_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
        again = {"retain_graph": True, "materialize_grads": True}
        third = [torch.autograd.grad(x.square().sum(), (g, z), **again) for x in (one, other)]
        torch.testing.assert_close(*third)


def test_it_maps_over_batches():
    z, g = torch.randn(4, 3, 7), torch.randn(4, 3, 7)
    mapped = torch.func.vmap(lambda g, z: normalise_backward(g, z, normalise(z)))(g, z)
    torch.testing.assert_close(mapped, normalise_backward(g, z, normalise(z)))


def test_a_constant_vector_has_finite_gradients():
    z, g = torch.full((2, 5), 3.0, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    for gradient in torch.autograd.grad(normalise_backward(g, z, normalise(z)).sum(), (g, z)):
        assert gradient.isfinite().all()


def test_parts_of_larger_tensors_are_read_as_what_they_are():
    z, g = torch.randn(3, 6, 7), torch.randn(3, 6, 7)
    whole = normalise(z)
    part = type(whole)(*(x[:, :2] for x in whole))
    got = normalise_backward(g[:, :2], z[:, :2], part)
    torch.testing.assert_close(got, normalise_backward(g, z, whole)[:, :2])
