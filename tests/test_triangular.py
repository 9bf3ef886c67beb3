"""Triangular systems by blocks against torch's own solve, in values and gradients, first and second."""

from __future__ import annotations

import pytest
import torch

from metamem.memory.triangular import solve


def system(size, batch=(2, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    lower = torch.randn(*batch, size, size, dtype=torch.float64, generator=generator).tril(-1)
    rights = [torch.randn(*batch, size, width, dtype=torch.float64, generator=generator) for width in (4, 7)]
    return lower, rights


def reference(lower, *rights):
    unit = torch.eye(lower.shape[-1], dtype=lower.dtype) + lower.tril(-1)
    return [torch.linalg.solve_triangular(unit, right, upper=False) for right in rights]


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 23, 64, 100])
def test_values_and_gradients_are_those_of_torch(size):
    lower, rights = system(size)
    lower = 0.3 * lower
    found = []
    for function in (solve, reference):
        leaves = [x.clone().requires_grad_() for x in (lower, *rights)]
        solved = function(*leaves)
        gradients = torch.autograd.grad(torch.cat(solved, -1).sin().sum(), leaves)
        found.append([*solved, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_second_derivatives():
    lower, rights = system(5, (2,))

    def function(lower, *rights):
        return tuple(solve(lower.tril(-1), *rights))

    leaves = [x.requires_grad_() for x in (lower, *rights)]
    assert torch.autograd.gradgradcheck(function, leaves)


def test_one_right_hand_side_without_gradient():
    lower, (right, _) = system(9)
    leaves = [x.clone().requires_grad_() for x in (lower, right)]
    torch.autograd.grad(solve(lower, leaves[1])[0].sum(), leaves[1])
    (of_lower,) = torch.autograd.grad(solve(leaves[0], right, right)[1].sum(), leaves[0])
    (expected,) = torch.autograd.grad(reference(leaves[0], right)[0].sum(), leaves[0])
    torch.testing.assert_close(of_lower, expected, rtol=1e-9, atol=1e-9)


def test_reflections_do_not_overflow():
    """Every key the same at a rate of 2: I + Λ has 2 everywhere below its diagonal, its inverse ±2, powers 1e30."""
    lower = torch.full((64, 64), 2.0).tril(-1)
    (inverse,) = solve(lower, torch.eye(64))
    (expected,) = reference(lower.double(), torch.eye(64, dtype=torch.float64))
    assert expected.abs().max() == 2
    torch.testing.assert_close(inverse.double(), expected, rtol=1e-5, atol=1e-4)


def test_under_vmap_and_its_gradient():
    lower, rights = system(16, (5,))
    (expected,) = reference(lower, rights[0])
    torch.testing.assert_close(torch.vmap(lambda a, b: solve(a, b)[0])(lower, rights[0]), expected)
    of_one = torch.func.grad(lambda a, b: solve(a, b)[0].square().sum())
    leaf = lower.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(leaf, rights[0])[0].square().sum(), leaf)
    torch.testing.assert_close(torch.vmap(of_one)(lower, rights[0]), wanted)
