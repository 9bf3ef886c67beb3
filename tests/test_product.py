"""`product` is `a @ b`, whichever library computes it."""

import pytest
import torch
from torch.func import vmap

from metamem.memory import product as module
from metamem.memory.product import product, product_transposed, transposed_product

here = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN on any processor, for matrices of any size."""
    monkeypatch.setattr(module, "_AVAILABLE", True)
    monkeypatch.setattr(module, "WORTH", 0)


def pair(seed=0, transposed=False):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 8, 16, generator=generator), torch.randn(2, 3, 16, 4, generator=generator)
    if transposed:
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    return a.requires_grad_(), b.requires_grad_()


@here
@pytest.mark.parametrize("transposed", [False, True], ids=["row-major", "transposed"])
def test_values_and_gradients_of_first_and_second_order(onednn, transposed):
    results = []
    for multiply in (product, torch.matmul):
        a, b = pair(transposed=transposed)
        y = multiply(a, b)
        first = torch.autograd.grad(y.square().sum(), (a, b), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))
        results.append([y, *first, *second])
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


@here
def test_under_vmap(onednn):
    a, b = pair()
    torch.testing.assert_close(vmap(product)(a, b), a @ b)


@here
def test_the_fast_library_is_really_used(onednn, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_onednn", lambda a, b: calls.append(a.shape) or a @ b)
    product(*pair())
    assert calls == [(6, 8, 16)]


def test_small_matrices_other_types_and_broadcasts_take_the_plain_way(monkeypatch):
    def refuse(a, b):
        raise AssertionError("not here")

    monkeypatch.setattr(module, "_onednn", refuse)
    a, b = pair()
    large = torch.randn(1, 256, 256), torch.randn(1, 256, 256)
    for x, y in ((a, b), (large[0].double(), large[1].double()), (large[0], large[1][0]), (a, b[0])):
        assert torch.equal(product(x, y), x @ y)


def test_a_processor_of_unknown_make_is_not_an_error(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert module._faster() is False


@pytest.mark.parametrize(
    ("maker", "family", "faster"),
    [("AuthenticAMD", 26, True), ("AuthenticAMD", 25, False), ("GenuineIntel", 26, False), ("GenuineIntel", 6, False)],
    ids=["Zen 5", "Zen 4", "Intel of that number", "Intel"],
)
def test_make_and_family_of_the_processor_decide(maker, family, faster):
    text = f"processor\t: 0\nvendor_id\t: {maker}\ncpu family\t: {family}\nmodel\t\t: 17\n"
    assert module._full_width_amd(text) is faster


def test_a_processor_that_tells_no_family_is_not_an_error():
    assert module._full_width_amd("vendor_id : AuthenticAMD") is False


TRANSPOSED = {
    "second": (product_transposed, lambda a, b: a @ b.mT, (8, 16), (4, 16)),
    "first": (transposed_product, lambda a, b: a.mT @ b, (16, 8), (16, 4)),
}


@pytest.mark.parametrize("which", TRANSPOSED)
def test_a_transposed_product_has_the_gradients_of_first_and_second_order_each_in_its_operands_layout(which):
    generator = torch.Generator().manual_seed(0)
    mine, plain, *shapes = TRANSPOSED[which]
    a, b = (torch.randn(2, 3, *shape, generator=generator, requires_grad=True) for shape in shapes)
    results = []
    for multiply in (mine, plain):
        y = multiply(a, b)
        first = torch.autograd.grad(y.square().sum(), (a, b), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))
        results.append([y, *first, *second])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert all(gradient.is_contiguous() for gradient in results[0][1:3])


def test_a_transposed_product_under_vmap():
    a, b = pair()
    torch.testing.assert_close(vmap(product_transposed)(a, b.mT), a @ b)
    torch.testing.assert_close(vmap(transposed_product)(a.mT, b), a @ b)
