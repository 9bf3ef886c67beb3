"""Norms of one factor a vector: the written-out gradients are autograd's, to the second order."""

import pytest
import torch
from torch.nn import functional

from metamem.memory.norms import FLOOR, rms, unit

pytestmark = pytest.mark.usefixtures("float64")


def plain_rms(x):
    return functional.rms_norm(x, x.shape[-1:])


def plain_unit(x):
    return functional.normalize(x, dim=-1, eps=FLOOR)


@pytest.mark.parametrize(("ours", "plain"), [(unit, plain_unit), (rms, plain_rms)], ids=["unit", "rms"])
@pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
def test_values_and_gradients_are_those_of_torch(ours, plain, size):
    x = (size * torch.randn(4, 3, 6)).requires_grad_()
    weight = torch.randn(4, 3, 6)
    torch.testing.assert_close(ours(x), plain(x))
    first = torch.autograd.grad((ours(x) * weight).sum(), x)[0]
    expected = torch.autograd.grad((plain(x) * weight).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(first, expected.detach())
    again = torch.autograd.grad((ours(x) * weight).sum(), x, create_graph=True)[0]
    second = [torch.autograd.grad(one.square().sum(), x)[0] for one in (again, expected)]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("ours", [unit, rms])
def test_zeros_have_finite_gradients(ours):
    x = torch.zeros(2, 5, requires_grad=True)
    assert torch.autograd.grad(ours(x).sum(), x)[0].isfinite().all()
