"""Transforms of accumulated matrices: torch's and torchopt's own optimizers, per row, with finite gradients."""

import os
import subprocess
import sys

import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as st

from metamem.memory.newton_schulz import orthogonalize
from metamem.memory.transforms import TRANSFORMS, adam, clip, rmsprop
from metamem.state import align, leaves, tree_map

pytestmark = pytest.mark.usefixtures("float64")

every = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
LAYERS = [(4, 6), (6, 3)]


def layers(batch=3, heads=2, scale=1.0):
    return [scale * torch.randn(batch, heads, *shape) for shape in LAYERS]


def run(transform, sequence):
    """The steps of a sequence of accumulated sums, and the state after it."""
    state, steps = transform.init(sequence[0]), []
    for accumulated in sequence:
        step, state = transform.update(accumulated, state)
        steps.append(step)
    return steps, state


def by_optimizer(make, sequence):
    """The steps that one of torch's optimizers takes at learning rate 1, and so with a minus."""
    parameters = [torch.zeros_like(x, requires_grad=True) for x in sequence[0]]
    optimizer, steps = make(parameters), []
    for accumulated in sequence:
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter, gradient in zip(parameters, accumulated, strict=True):
            parameter.grad = gradient
        optimizer.step()
        steps.append([old - new.detach() for old, new in zip(before, parameters, strict=True)])
    return steps


def by_torchopt(transformation, sequence):
    state, steps = transformation.init(sequence[0]), []
    for accumulated in sequence:
        step, state = transformation.update(accumulated, state, inplace=False)
        steps.append(step)
    return steps


PEERS = {
    "adam as torch.optim": (
        TRANSFORMS["adam"],
        lambda sequence: by_optimizer(lambda p: torch.optim.Adam(p, lr=1.0), sequence),
    ),
    "adam as torchopt": (
        adam(0.7, 0.95, 1e-5),
        lambda sequence: by_torchopt(torchopt.transform.scale_by_adam(0.7, 0.95, 1e-5), sequence),
    ),
    "rmsprop as torch.optim": (
        TRANSFORMS["rmsprop"],
        lambda sequence: by_optimizer(lambda p: torch.optim.RMSprop(p, lr=1.0, alpha=0.9), sequence),
    ),
    "rmsprop as torchopt": (
        rmsprop(0.8, 1e-5),
        lambda sequence: by_torchopt(torchopt.transform.scale_by_rms(0.8, 1e-5), sequence),
    ),
}


@pytest.mark.parametrize(("transform", "peer"), PEERS.values(), ids=PEERS.keys())
def test_steps_are_those_of_the_peer(transform, peer):
    sequence = [layers(scale=scale) for scale in (1.0, 1e-3, 0.0, 10.0, 1.0)]
    steps, _ = run(transform, sequence)
    torch.testing.assert_close(steps, peer(sequence), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_outer_gradients_through_several_steps_are_torchopts(name):
    peer = {"adam": torchopt.transform.scale_by_adam(), "rmsprop": torchopt.transform.scale_by_rms()}[name]
    sequence = [layers() for _ in range(3)]
    inputs = [x.requires_grad_() for accumulated in sequence for x in accumulated]
    gradients = []
    for steps in (run(TRANSFORMS[name], sequence)[0], by_torchopt(peer, sequence)):
        loss = sum((x**3).sum() for x in steps[-1]) + sum(x.sin().sum() for x in steps[1])
        gradients.append(torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_none_sign_and_muon_are_what_they_are_called():
    accumulated = layers()
    expected = {"none": lambda x: x, "sign": torch.sign, "muon": orthogonalize}
    for name, function in expected.items():
        step, state = TRANSFORMS[name].update(accumulated, TRANSFORMS[name].init(accumulated))
        assert state == {}
        for x, y in zip(step, accumulated, strict=True):
            assert torch.equal(x, function(y))


@given(st.floats(-12, 12), st.floats(0.1, 10))
def test_clip_keeps_the_direction_and_bounds_the_frobenius_norm_of_each_matrix(exponent, bound):
    matrices = 10**exponent * torch.randn(2, 3, 4, 5) * torch.logspace(-2, 2, 3)[:, None, None]
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    expected = torch.where(norms > bound, bound * matrices / norms, matrices)
    torch.testing.assert_close(clip(matrices, bound), expected, rtol=1e-12, atol=0)
    inside = (norms < 0.999 * bound).flatten()
    assert torch.equal(clip(matrices, bound).flatten(0, 1)[inside], matrices.flatten(0, 1)[inside])


def test_sign_passes_its_gradient_straight_through():
    x = torch.randn(2, 3, 4, requires_grad=True)
    weight = torch.randn(2, 3, 4)
    (step,), _ = TRANSFORMS["sign"].update([x], {})
    assert torch.equal(torch.autograd.grad((weight * step).sum(), x)[0], weight)


@pytest.mark.parametrize("name", ["none", "clip", "rmsprop", "adam", "muon"])
def test_transforms_are_differentiable_twice(name):
    sequence = [[torch.randn(2, 3, 4)] for _ in range(2)]

    def last(*flat):
        return run(TRANSFORMS[name], [[x] for x in flat])[0][-1][0]

    inputs = [x.requires_grad_() for (x,) in sequence]
    assert torch.autograd.gradcheck(last, inputs)
    if name != "muon":  # its own test has the second derivative
        assert torch.autograd.gradgradcheck(last, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every
def test_where_nothing_was_written_nothing_moves_and_every_gradient_is_finite(transform, dtype):
    def accumulated():
        full, empty = torch.randn(2, 2, 4, 5).unbind(0)
        empty[0, 0] = 1.0  # one entry of a matrix, so that adam meets zeros beside others
        empty[1] = 0.0
        return [torch.stack([full, torch.zeros_like(full), empty]).to(dtype).requires_grad_()]

    sequence = [accumulated() for _ in range(3)]
    steps, state = run(transform, sequence)
    for (step,) in steps:
        assert step.dtype == dtype and not step[1].any()
    inputs = [x for (x,) in sequence]
    loss = sum((step.double() ** 2).sum() + step.double().sum() for (step,) in steps)
    loss = loss + sum(leaf.double().square().sum() for leaf in leaves(state))
    first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
    assert all(x.isfinite().all() for x in first)
    assert any(x.any() for x in first)
    twice = sum((x.double() * torch.randn_like(x).double()).sum() for x in first)
    if twice.requires_grad:
        second = torch.autograd.grad(twice, inputs, materialize_grads=True)
        assert all(x.isfinite().all() for x in second)


@pytest.mark.parametrize("name", ["adam", "rmsprop", "muon"])
def test_an_entry_that_was_never_written_has_gradient_zero_and_not_one_over_epsilon(name):
    x = torch.zeros(1, 3, 4, requires_grad=True)
    steps, _ = run(TRANSFORMS[name], [[x], [x]])
    assert not torch.autograd.grad(sum(step.sum() for (step,) in steps), x)[0].any()


@every
def test_rows_and_layers_do_not_mix(transform):
    sequence = [layers() for _ in range(3)]
    steps, _ = run(transform, sequence)
    for row in range(3):
        for layer in range(len(LAYERS)):
            alone, _ = run(transform, [[x[layer][row : row + 1]] for x in sequence])
            for mine, whole in zip(alone, steps, strict=True):
                torch.testing.assert_close(mine[0], whole[layer][row : row + 1])


@every
def test_a_row_that_is_reset_in_mid_stream_starts_anew_and_the_others_go_on(transform):
    sequence = [layers() for _ in range(4)]
    rows = torch.tensor([False, True, False])
    _, state = run(transform, sequence[:2])
    state = tree_map(lambda new, old: torch.where(align(rows, old), new, old), transform.init(sequence[0]), state)
    untouched, fresh = run(transform, sequence)[0][2:], run(transform, sequence[2:])[0]
    for index, accumulated in enumerate(sequence[2:]):
        steps, state = transform.update(accumulated, state)
        for layer, step in enumerate(steps):
            expected = torch.where(align(rows, step), fresh[index][layer], untouched[index][layer])
            torch.testing.assert_close(step, expected)


@every
def test_state_is_batch_first_keyed_by_layer_and_neither_it_nor_the_sum_is_changed(transform):
    accumulated = layers(batch=5)
    state = transform.init(accumulated)
    before, sums = tree_map(torch.clone, state), [x.clone() for x in accumulated]
    _, after = transform.update(accumulated, state)
    for name, by_layer in before.items():
        assert list(by_layer) == list(after[name]) == ["0", "1"]
        for layer, tensor in by_layer.items():
            assert tensor.shape == after[name][layer].shape and tensor.shape[0] == 5
            assert torch.equal(tensor, state[name][layer])
    assert after.keys() == before.keys()
    assert all(torch.equal(x, y) for x, y in zip(sums, accumulated, strict=True))
    storage = [leaf.data_ptr() for leaf in leaves(state)]
    assert len(set(storage)) == len(storage)


def test_running_means_of_a_narrow_memory_are_float32():
    accumulated = [x.bfloat16() for x in layers()]
    steps, state = run(TRANSFORMS["adam"], [accumulated] * 3)
    assert {leaf.dtype for leaf in leaves(state)} == {torch.float32}
    assert {x.dtype for x in steps[-1]} == {torch.bfloat16}


COMPILED = """
import torch
from metamem.memory.transforms import TRANSFORMS
for name, transform in TRANSFORMS.items():
    x = torch.randn(2, 3, 4, 6)
    state = transform.init([x])
    eager, compiled = (f([x], state) for f in (transform.update, torch.compile(transform.update, fullgraph=True,
                                                                               backend="aot_eager")))
    torch.testing.assert_close(compiled, eager)
"""


@pytest.mark.slow
def test_all_compile_into_one_graph():
    environment = {**os.environ, "JAXTYPING_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
