"""Step rules: an implicit step solves its proximal objective, a normalised one at rate 1 recalls what it wrote."""

import pytest
import torch
from conformance import close, stream, tensors

from losses.recall import cosine, mse
from metamem.memory.fast_weights import FastWeights
from metamem.memory.level import TokenLevel

pytestmark = pytest.mark.usefixtures("float64")
DIM, TIME = 6, 11


def build(step_rule, lr=3.0, weight=1.0, level=None, **settings):
    torch.manual_seed(0)
    level = TokenLevel("only", {mse: weight}, lr=lr, step_rule=step_rule, **(level or {}))
    memory = {"heads": 2, "chunk": 4, "signal_at": "token", "feature_map": "identity", **settings}
    return FastWeights(DIM, [level], **memory)


def proximal(start, key, value, rate):
    """argmin_W ½ ‖W − start‖² + rate ½ ‖key W − value‖²: its gradient is zero where (I + rate key keyᵀ) W = …"""
    system = torch.eye(len(key)) + rate * torch.outer(key, key)
    return torch.linalg.solve(system, start + rate * torch.outer(key, value))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_an_implicit_step_is_the_argmin_of_the_proximal_objective(weight, bias):
    memory, x = build("implicit", weight=weight, bias=bias), torch.randn(2, TIME, DIM)
    writes, out = memory.writer(x, x.dtype), memory(x)
    for row in range(2):
        for head in range(2):
            weights = memory.init[0][head]
            for t in range(TIME):
                key = writes.keys[row, head, t, 0]
                key = torch.cat([key, torch.ones(1)]) if bias else key
                weights = proximal(weights, key, writes.values[row, head, t, 0], 3.0 * weight)
            delta = out.state["levels"]["only"]["delta"]["0"][row, head]
            torch.testing.assert_close(memory.init[0][head] + delta, weights)


def test_the_argmin_is_one():
    """No step from it, in any direction, lowers the objective that it is the solution of."""
    start, key, value = torch.randn(3, 2), torch.randn(3), torch.randn(2)

    def objective(weights):
        return 0.5 * (weights - start).square().sum() + 3.0 * mse(key @ weights, value)

    least = objective(proximal(start, key, value, 3.0))
    for _ in range(20):
        assert objective(proximal(start, key, value, 3.0) + 1e-3 * torch.randn(3, 2)) > least


@pytest.mark.parametrize("writes", [{}, {"writers": 2, "writes": "in_turn"}])
def test_a_normalised_step_at_rate_one_recalls_what_it_wrote(writes):
    memory, x = build("normalized", lr=1.0, weight=0.5, **writes), torch.randn(1, TIME, DIM)
    out, written = memory(x), memory.writer(x, x.dtype)
    weights = memory.init[0] + out.state["levels"]["only"]["delta"]["0"]
    last = written.keys[:, :, -1, -1:], written.values[:, :, -1, -1:]
    torch.testing.assert_close(last[0] @ weights, last[1], rtol=1e-3, atol=1e-3)


def test_an_implicit_step_of_a_large_rate_is_the_normalised_one():
    x = torch.randn(2, TIME, DIM)
    large, one = build("implicit", lr=1e9)(x), build("normalized", lr=1.0)(x)
    torch.testing.assert_close(large.y, one.y, rtol=1e-4, atol=1e-4)


def test_of_unit_keys_it_is_a_delta_rule_of_another_rate():
    x = torch.randn(2, TIME, DIM)
    implicit = build("implicit", lr=0.5, feature_map="unit")(x)
    close(tensors(implicit), tensors(build("explicit", lr=1 / 3, feature_map="unit")(x)))


@pytest.mark.parametrize("level", [{}, {"period": 4, "momentum": 0.5}, {"period": 8, "reduction": "mean"}])
@pytest.mark.parametrize("rule", ["implicit", "normalized"])
def test_any_split_and_executor_gives_the_same(rule, level):
    memory, x = build(rule, 0.3, level={"forget": 0.1, **level}), torch.randn(2, TIME, DIM)
    whole = tensors(memory(x))
    close(tensors(stream(memory, x, [3, 7])), whole)
    for executor in ("recurrence", "vmap_grad"):
        memory.executor = executor
        close(tensors(memory(x)), whole)


@pytest.mark.parametrize(
    ("objective", "level", "settings", "told"),
    [
        (mse, {}, {"hidden": [5]}, "for linear memories; set step_rule to 'explicit', or hidden to"),
        (cosine, {}, {}, "for squared errors; set step_rule to 'explicit', or objective to"),
        (mse, {"signal": "hebbian"}, {}, "a hebbian signal is none; set step_rule to 'explicit', or signal to"),
    ],
)
def test_where_the_closed_form_is_none_it_is_refused(objective, level, settings, told):
    level = TokenLevel("odd", {objective: 1.0}, step_rule="implicit", **level)
    with pytest.raises(ValueError, match=f"level 'odd': the closed form of implicit steps is .*{told}"):
        FastWeights(DIM, [level], heads=2, **settings)
