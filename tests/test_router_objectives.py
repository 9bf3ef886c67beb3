"""Objectives of routers: their formulas, and in the loss of a step level."""

import math

import pytest
import torch
from small_models import TOKEN_LEVEL, recurrent, shaken

from losses.outer import next_token, router_balance, router_z, update_budget
from metamem import OuterLevels

pytestmark = pytest.mark.usefixtures("float64")


def test_objectives_of_routers_are_their_formulas():
    torch.manual_seed(2)
    gates, logits, costs = torch.rand(3, 5, 4, 2), torch.randn(3, 5, 4, 3), torch.rand(4, 2).expand(3, 5, 4, 2)
    importance = [sum(gates[..., level].flatten().tolist()) for level in range(2)]
    mean = sum(importance) / 2
    variation = sum((one - mean) ** 2 for one in importance) / 2 / mean**2
    assert router_balance(gates).item() == pytest.approx(variation)
    shares = [one / sum(importance) for one in importance]
    assert router_balance(gates).item() == pytest.approx(2 * sum(share**2 for share in shares) - 1)
    assert router_balance(torch.ones(7, 4, 3)).item() == pytest.approx(0)
    assert router_balance(torch.eye(3)[:1].expand(7, 4, 3)).item() == pytest.approx(2)
    assert router_balance(torch.zeros(7, 4, 3)).item() == 0
    z = [math.log(sum(math.exp(one) for one in case)) ** 2 for case in logits.flatten(0, 2).tolist()]
    assert router_z(logits).item() == pytest.approx(sum(z) / len(z))
    moved = [
        sum(g * c for g, c in zip(gates[b, t].flatten().tolist(), costs[b, t].flatten().tolist(), strict=True))
        for b in range(3)
        for t in range(5)
    ]
    assert update_budget(gates, costs).item() == pytest.approx(sum(moved) / 15)
    for objective, of in ((router_balance, [gates]), (router_z, [logits]), (update_budget, [gates, costs])):
        assert torch.autograd.gradcheck(objective, [one.clone().requires_grad_() for one in of])


ROUTED = "hierarchy.router={kind: topk, granularity: head}"
SECOND = TOKEN_LEVEL.replace("surprise, clock: token", "second, clock: token, period: 2")
OBJECTIVES = {
    "router_balance": lambda aux: router_balance(aux["gates"]),
    "router_z": lambda aux: router_z(aux["logits"]),
    "update_budget": lambda aux: update_budget(aux["gates"], aux["costs"]),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_level_adds_an_objective_of_routers(name):
    """By its dotted path, with its weight: the loss, and every gradient."""
    key = "hierarchy.levels.task.objective"
    config = recurrent(SECOND, f"{key}={{losses.outer.next_token: 1.0, losses.outer.{name}: 0.3}}", ROUTED)
    model, reference = shaken(config), shaken(config)
    inputs, targets = torch.randint(7, (2, 3, 9))
    out = model(inputs)
    values = OuterLevels(config, model).backward(lambda objectives: next_token(out.y, targets).mean(), out.aux)
    y, _, aux = reference(inputs)
    aux = {name.removeprefix("memory.router."): value for name, value in aux.items()}
    expected = next_token(y, targets).mean() + 0.3 * OBJECTIVES[name](aux)
    assert values == pytest.approx({"task": expected.item()})
    slopes = torch.autograd.grad(expected, list(reference.parameters()), retain_graph=True)
    (without,) = torch.autograd.grad(next_token(y, targets).mean(), [reference.memory.router.bias])
    levels = OuterLevels(config, model)
    levels.backward(lambda objectives: next_token(model(inputs).y, targets).mean(), model(inputs).aux)
    gathered = dict(zip([id(p) for p in levels.parameters["task"]], levels.gathered["task"].sums, strict=True))
    for (key, parameter), slope in zip(model.named_parameters(), slopes, strict=True):
        torch.testing.assert_close(gathered[id(parameter)], slope, msg=lambda text, key=key: f"{key}: {text}")
    assert not torch.allclose(gathered[id(model.memory.router.bias)], without, rtol=1e-9, atol=0)
