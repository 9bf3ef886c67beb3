"""Newton–Schulz: U Vᵀ for any shape, finite everywhere, differentiable twice."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metamem.memory.newton_schulz import orthogonalize

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = [(1, 1), (1, 5), (5, 1), (6, 6), (6, 8), (8, 6), (4, 8), (8, 4), (3, 17), (17, 3)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def conditioned(shape, smallest=0.3, seed=0):
    """A matrix with singular values between `smallest` and 1, and its U Vᵀ."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)
    values = torch.linspace(1.0, smallest, min(shape))
    return (u * values) @ vt, u @ vt


def plain(matrix, steps=5):
    """The iteration as Jordan writes it, of one matrix, without products fused or Gram matrices iterated."""
    x = matrix / matrix.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@shapes
def test_it_is_the_plain_iteration_on_the_shorter_side(shape):
    matrix = torch.randn(shape)
    expected = plain(matrix) if shape[0] <= shape[1] else plain(matrix.T).T
    torch.testing.assert_close(orthogonalize(matrix), expected, rtol=1e-11, atol=1e-11)


@shapes
def test_gradients_are_those_of_the_plain_iteration(shape):
    matrix, direction = torch.randn(2, *shape).unbind(0)
    matrix.requires_grad_()
    gradients = [
        torch.autograd.grad((function(matrix) * direction).sum(), matrix)[0] for function in (orthogonalize, plain)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@shapes
def test_well_conditioned_singular_values_come_near_one_along_the_same_vectors(shape):
    matrix, polar = conditioned(shape)
    result = orthogonalize(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() >= 0.65 and values.max() <= 1.25
    # U^T O V is diagonal with these values, so its share along U V^T is their mean.
    torch.testing.assert_close((result * polar).sum(), values.sum())


@given(st.integers(1, 9), st.integers(1, 9), st.floats(-9, 9), st.integers(0, 1000))
def test_the_scale_of_a_matrix_does_not_matter(d_in, d_out, exponent, seed):
    matrix, _ = conditioned((d_in, d_out), seed=seed)
    torch.testing.assert_close(orthogonalize(10**exponent * matrix), orthogonalize(matrix), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(orthogonalize(-matrix), -orthogonalize(matrix))


@pytest.mark.parametrize("shape", [(3, 3), (2, 3), (3, 2), (2, 4), (4, 2)], ids=lambda shape: "x".join(map(str, shape)))
def test_it_is_differentiable_twice(shape):
    matrix = torch.randn(2, *shape, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: orthogonalize(x, steps=3), matrix)
    assert torch.autograd.gradgradcheck(lambda x: orthogonalize(x, steps=3), matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-14])
def test_what_was_never_written_gives_zero_with_gradients_zero(scale, dtype):
    for shape in [(3, 4), (3, 8)]:
        matrix = (scale * torch.randn(shape)).to(dtype).requires_grad_()
        result = orthogonalize(matrix)
        assert torch.equal(result, torch.zeros_like(result)) and result.dtype == dtype
        first = torch.autograd.grad(result.sum(), matrix, create_graph=True)[0]
        second = torch.autograd.grad((first * torch.randn_like(first)).sum(), matrix)[0]
        assert torch.equal(first, torch.zeros_like(first)) and torch.equal(second, torch.zeros_like(second))


def test_a_zero_row_of_a_batch_leaves_the_others_and_their_gradients_alone():
    matrix = torch.randn(3, 4, 5)
    matrix[1] = 0
    matrix.requires_grad_()
    gradient = torch.autograd.grad(orthogonalize(matrix)[:, 0].sum(), matrix)[0]
    alone = torch.autograd.grad(orthogonalize(matrix[2])[0].sum(), matrix)[0][2]
    torch.testing.assert_close(gradient[2], alone)
    assert not gradient[1].any() and gradient[0].any()


@shapes
def test_batched_equals_looped(shape):
    matrices = torch.randn(2, 3, *shape)
    batched = orthogonalize(matrices)
    for row in range(2):
        for head in range(3):
            torch.testing.assert_close(batched[row, head], orthogonalize(matrices[row, head]))
    torch.testing.assert_close(torch.vmap(orthogonalize)(matrices), batched)
    assert orthogonalize(matrices[:0]).shape == (0, 3, *shape)


@shapes
def test_float32_is_close_to_float64_where_the_rank_is_not_full(shape):
    matrix = torch.randn(shape[0], 1) @ torch.randn(1, shape[1])
    torch.testing.assert_close(orthogonalize(matrix.float()).double(), orthogonalize(matrix), rtol=0, atol=1e-4)


def test_autocast_and_narrow_inputs_compute_in_float32():
    for shape in [(8, 8), (8, 32)]:
        matrix = torch.randn(shape).bfloat16()
        wide = orthogonalize(matrix.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(orthogonalize(matrix.float()), wide, rtol=0, atol=0)
        narrow = orthogonalize(matrix)
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow, wide.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1, not {steps}"):
        orthogonalize(torch.eye(2), steps)
