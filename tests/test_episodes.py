"""Inner loops around any module: every engine against a plain loop with torch.autograd.grad, in float64; learned rates,
masks and routers; first order, truncation and implicit gradients against their definitions."""

import copy

import pytest
import torch
from episode_reference import (
    ADAM,
    OBJECTIVES,
    SGD,
    TASKS,
    UNROLLED,
    compare,
    episode,
    mlp,
    outer_gradients,
    outer_loss,
)
from torch.func import functional_call

from losses.recall import mse
from metamem.episodes import (
    EngineError,
    EpisodeLevel,
    RateRouter,
    Rates,
    adapt,
    predict,
)

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("steps", [1, 5, 10])
@pytest.mark.parametrize("optimizer", SGD.values(), ids=SGD)
@pytest.mark.parametrize("engine", UNROLLED)
def test_outer_gradients_of_sgd(engine, optimizer, steps):
    level = EpisodeLevel(OBJECTIVES, steps, optimizer, rates=0.05, engine=engine)
    wanted = compare(mlp(), episode(), level, 1e-10)
    assert min(gradient.abs().max() for gradient in wanted) > 1e-4


@pytest.mark.parametrize("steps", [1, 5, 10])
@pytest.mark.parametrize("optimizer", ADAM.values(), ids=ADAM)
@pytest.mark.parametrize("engine", UNROLLED)
def test_outer_gradients_of_adam(engine, optimizer, steps):
    level = EpisodeLevel(OBJECTIVES, steps, optimizer, rates=0.02, engine=engine)
    if engine == "higher" and optimizer.name == "adamw":
        with pytest.raises(EngineError, match="engine 'higher' has no AdamW; the engine 'functional' has no such"):
            adapt(mlp(), episode().support, level)
        return
    compare(mlp(), episode(), level, 1e-8)


@pytest.mark.parametrize("options", [*SGD.values(), *ADAM.values()], ids=[*SGD, *ADAM])
def test_inner_steps_are_those_of_torch_optim(options):
    module, batch = mlp(), episode()
    adapted = adapt(module, batch.support, EpisodeLevel({mse: 1.0}, 7, options, rates=0.05))
    makers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    keywords = {"lr": 0.05, "weight_decay": options.weight_decay}
    if options.name == "sgd":
        keywords |= {"momentum": options.momentum, "nesterov": options.nesterov}
    else:
        keywords |= {"betas": options.betas, "eps": options.eps}
    for task in range(TASKS):
        copied = copy.deepcopy(module)
        optimizer = makers[options.name](copied.parameters(), **keywords)
        for _ in range(7):
            optimizer.zero_grad()
            mse(copied(batch.support.inputs[task]), batch.support.targets[task]).mean().backward()
            optimizer.step()
        for name, parameter in copied.named_parameters():
            torch.testing.assert_close(adapted.fast[name][task], parameter.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ["functional", "loop", "torchopt", "higher"])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("per", ["level", "group", "tensor", "row", "element"])
def test_learned_rates_learn_by_the_exact_gradient(engine, per, per_step):
    module, batch, steps = mlp(), episode(), 5
    named = dict(module.named_parameters())
    groups = {name: "head" if name.startswith("4") else "body" for name in named}
    rates = Rates(named, 0.05, learned=True, per=per, per_step=per_step, steps=steps, groups=groups)
    for value in rates.parameters():
        value.data += 0.02 * torch.randn_like(value)
    level = EpisodeLevel(OBJECTIVES, steps, SGD["momentum"], rates, engine=engine)
    lead = steps if per_step else 1
    count = {"level": 1, "group": 2, "tensor": 6, "row": 20, "element": sum(p.numel() for p in module.parameters())}
    assert sum(value.numel() for value in rates.parameters()) == lead * count[per]

    def rate(step, loss, gradients):
        row, found, start = rates.rates[step if per_step else 0], {}, 0
        for index, (name, parameter) in enumerate(named.items()):
            if per in ("level", "group", "tensor"):
                found[name] = row[{"level": 0, "group": int(groups[name] == "head"), "tensor": index}[per]]
                continue
            shape = parameter.shape if per == "element" else (len(parameter), *[1] * (parameter.dim() - 1))
            count = torch.Size(shape).numel()
            found[name] = row[start : start + count].view(shape)
            start += count
        return found

    wanted = compare(module, batch, level, 1e-10, rate, rates.parameters())
    assert all(value.abs().max() > 1e-6 for value in wanted[-len(list(rates.parameters())) :])


def test_positive_rates_are_exponentials_and_updates_beyond_the_last_take_it():
    rates = Rates({"a": torch.zeros(2, 3)}, 0.1, learned=True, per="element", per_step=True, positive=True, steps=3)
    with torch.no_grad():
        rates.rates.add_(torch.randn(3, 6))
    assert all((rates.at(step)["a"] > 0).all() for step in range(3))
    torch.testing.assert_close(rates.at(1)["a"], rates.rates[1].view(2, 3).exp())
    assert rates.at(7)["a"].equal(rates.at(2)["a"]) and rates.negative() == 0.0
    free = Rates({"a": torch.zeros(4)}, 0.1, learned=True, per="element")
    with torch.no_grad():
        free.rates[0, 0] = -1.0
    assert free.negative() == 0.25


@pytest.mark.parametrize("engine", ["functional", "loop", "torchopt", "higher"])
@pytest.mark.parametrize("unrolled", [0, 1, 3])
def test_first_order_and_truncated_take_early_gradients_as_constants(engine, unrolled):
    module, batch = mlp(), episode()
    rates = Rates(dict(module.named_parameters()), 0.1, learned=True)
    level = EpisodeLevel(OBJECTIVES, 4, SGD["momentum"], rates, unroll=unrolled, engine=engine)

    def rate(step, loss, gradients):
        return dict(zip(gradients, rates.rates[0], strict=True))

    compare(module, batch, level, 1e-10, rate, rates.parameters())


def test_first_order_is_the_query_gradient_at_the_fast_weights():
    module, batch = mlp(), episode()
    level = EpisodeLevel({mse: 1.0}, 3, rates=0.1, unroll=0)
    adapted = adapt(module, batch.support, level)
    found = outer_gradients(predict(module, adapted, batch.query.inputs, level), batch, module.parameters())
    leaves = {name: value.detach().requires_grad_() for name, value in adapted.fast.items()}
    predictions = predict(module, adapted._replace(fast=leaves), batch.query.inputs, level)
    at_fast = torch.autograd.grad(outer_loss(predictions, batch), list(leaves.values()))
    for one, other in zip(found, at_fast, strict=True):
        torch.testing.assert_close(one, other.sum(0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("unrolled", [4, 9, None])
def test_an_unroll_of_all_steps_is_no_truncation(unrolled):
    compare(mlp(), episode(), EpisodeLevel(OBJECTIVES, 4, rates=0.1, unroll=unrolled), 1e-10)


@pytest.mark.parametrize("engine", UNROLLED)
def test_the_proximal_term_holds_fast_weights_to_slow_ones(engine):
    compare(mlp(), episode(), EpisodeLevel(OBJECTIVES, 5, SGD["momentum"], 0.05, engine=engine, proximal=2.0), 1e-10)


# Implicit gradients


def solved(members=None, steps=400, strength=2.0):
    return EpisodeLevel({mse: 1.0}, steps, rates=0.2, members=members, engine="implicit", proximal=strength)


@pytest.mark.parametrize("members", [None, ("2.weight", "2.bias", "4.bias")], ids=["all", "some"])
def test_an_implicit_gradient_solves_the_regularised_system(members):
    """dφ*/dθ = λ (H + λ)⁻¹, and of what does not move −(H + λ)⁻¹ ∂²L/∂φ∂ψ, by dense matrices."""
    module, batch = mlp(), episode()
    level = solved(members)
    level = EpisodeLevel(**{**level.__dict__, "solver_steps": 200, "solver_tolerance": 1e-13})
    adapted = adapt(module, batch.support, level)
    predictions = predict(module, adapted, batch.query.inputs, level)
    gradients = outer_gradients(predictions, batch, module.parameters())
    found = dict(zip(dict(module.named_parameters()), gradients, strict=True))
    slow = {name: p.detach() for name, p in module.named_parameters()}
    names = members or tuple(slow)
    rest = [name for name in slow if name not in names]
    wanted = {name: torch.zeros_like(value) for name, value in slow.items()}

    def flat(tensors):
        return torch.cat([tensor.flatten() for tensor in tensors])

    def unflat(vector, of):
        parts = vector.split([slow[name].numel() for name in of])
        return {name: part.view_as(slow[name]) for name, part in zip(of, parts, strict=True)}

    for task in range(TASKS):
        phi = flat([adapted.fast[name][task].detach() for name in names])
        psi = flat([slow[name] for name in rest]) if rest else torch.zeros(0)

        def support_loss(phi, psi, task=task):
            parameters = {**unflat(phi, names), **unflat(psi, rest)}
            pred = functional_call(module, parameters, (batch.support.inputs[task],))
            return mse(pred, batch.support.targets[task]).mean()

        def query_loss(phi, psi, task=task):
            parameters = {**unflat(phi, names), **unflat(psi, rest)}
            pred = functional_call(module, parameters, (batch.query.inputs[task],))
            return ((pred - batch.query.targets[task]).square() / TASKS + pred.sin() / TASKS).mean()

        theta = flat([slow[name] for name in names])
        residual = torch.func.grad(support_loss)(phi, psi) + level.proximal * (phi - theta)
        assert residual.abs().max() < 1e-12
        hessian, mixed = torch.func.jacrev(torch.func.grad(support_loss), (0, 1))(phi, psi)
        g_phi, g_psi = torch.func.grad(query_loss, (0, 1))(phi, psi)
        v = torch.linalg.solve(hessian + level.proximal * torch.eye(len(phi)), g_phi)
        for name, value in unflat(level.proximal * v, names).items():
            wanted[name] += value
        for name, value in unflat(g_psi - mixed.T @ v, rest).items():
            wanted[name] += value
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)


def test_the_implicit_gradient_is_that_of_an_inner_loop_unrolled_to_the_end():
    module, batch = mlp(), episode()
    implicit = EpisodeLevel(**{**solved().__dict__, "solver_steps": 200, "solver_tolerance": 1e-13})
    unrolled = EpisodeLevel(**{**implicit.__dict__, "engine": "functional"})
    gradients = []
    for level in (implicit, unrolled):
        adapted = adapt(module, batch.support, level)
        predictions = predict(module, adapted, batch.query.inputs, level)
        gradients.append(outer_gradients(predictions, batch, module.parameters()))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_an_implicit_gradient_cannot_be_differentiated_again():
    module, batch = mlp(), episode()
    level = solved(steps=3)
    predictions = predict(module, adapt(module, batch.support, level), batch.query.inputs, level)
    with pytest.raises(EngineError, match="engine 'implicit' gives an outer gradient that cannot be differentiated"):
        torch.autograd.grad(outer_loss(predictions, batch), module[0].weight, create_graph=True)


# Masks and routers over rates


def routed(module, **options):
    return RateRouter(dict(module.named_parameters()), **options)


def scrambled(router):
    with torch.no_grad():
        for value in router.parameters():
            value.add_(torch.randn_like(value))
    return router


@pytest.mark.parametrize("engine", ["functional", "loop", "torchopt", "higher"])
@pytest.mark.parametrize("kind", ["dense", "topk", "binary"])
def test_gated_rates_are_the_mixture_of_their_experts(kind, engine):
    module, batch = mlp(), episode()
    experts = (0.5, 2.0, 5.0)
    router = scrambled(routed(module, kind=kind, experts=experts, k=2))
    rates = Rates(dict(module.named_parameters()), 0.05, multiplier=router)

    def rate(step, loss, gradients):
        found = {}
        for name, logits in zip(gradients, router.logits, strict=True):
            soft = torch.softmax(logits, 0)
            if kind == "binary":
                gates = (logits >= 0).double() + logits - logits.detach()
            else:
                kept = soft >= soft.sort().values[-2] if kind == "topk" else torch.ones(4)
                gates = (soft * kept).detach() + soft - soft.detach()
            found[name] = 0.05 * sum(gate * expert for gate, expert in zip(gates, experts, strict=False))  # hold is 0
        return found

    level = EpisodeLevel(OBJECTIVES, 3, rates=rates, engine=engine)
    compare(module, batch, level, 1e-10, rate, router.parameters())


@pytest.mark.parametrize("per", ["level", "tensor"])
@pytest.mark.parametrize("engine", ["functional", "loop", "torchopt"])
def test_a_router_reads_the_losses_and_gradients_of_the_task(per, engine):
    module, batch = mlp(), episode()
    router = routed(module, kind="dense", experts=(0.5, 2.0), input="task", per=per)
    with torch.no_grad():
        for value in router.parameters():
            value.add_(0.3 * torch.randn_like(value))
    rates = Rates(dict(module.named_parameters()), 0.05, multiplier=router)

    def rate(step, loss, gradients):
        logs = [0.5 * (loss**2 + 1e-12).log(), *(0.5 * (g.square().sum() + 1e-12).log() for g in gradients.values())]
        features = torch.stack(logs)
        found = {}
        for index, name in enumerate(gradients):
            unit = 0 if per == "level" else index
            gates = torch.softmax(router.logits[unit] + features @ router.weights[:, unit], 0)
            found[name] = 0.05 * (0.5 * gates[0] + 2.0 * gates[1])
        return found

    level = EpisodeLevel(OBJECTIVES, 3, rates=rates, engine=engine)
    wanted = compare(module, batch, level, 1e-10, rate, router.parameters())
    assert wanted[-1].abs().max() > 1e-8


def test_a_mask_starts_open_with_the_full_gradient():
    """At zero all elements move, and a mask's gradient is that of a rate's factor at 1."""
    module, batch = mlp(), episode()
    named = dict(module.named_parameters())
    router = routed(module, kind="binary", per="element")
    factors = Rates(named, 0.1, learned=True, per="element")
    masked = EpisodeLevel(OBJECTIVES, 3, rates=Rates(named, 0.1, multiplier=router))
    plain = EpisodeLevel(OBJECTIVES, 3, rates=factors)
    one, other = (
        outer_gradients(predict(module, adapt(module, batch.support, level), batch.query.inputs, level), batch, of)
        for level, of in ((masked, router.parameters()), (plain, factors.parameters()))
    )
    torch.testing.assert_close(one[0].squeeze(-1), 0.1 * other[0].squeeze(0), rtol=0, atol=1e-12)
    start = module[0].weight.numel() + module[0].bias.numel() + 5
    with torch.no_grad():
        router.logits[start : start + 5] = -0.1  # the second row of 2.weight
    adapted = adapt(module, batch.support, masked)
    assert adapted.fast["2.weight"][:, 1].equal(module[2].weight[1].expand(TASKS, -1))
    assert not adapted.fast["2.weight"][:, 0].equal(module[2].weight[0].expand(TASKS, -1))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"kind": "dense", "hold": False}, "a softmax over one choice is always 1"),
        ({"kind": "topk", "k": 2}, "the 2 largest of 2 choices are all of them"),
        ({"kind": "binary", "per": "element", "input": "task"}, "gates of the task are per level, group or tensor"),
        ({"kind": "binary", "per": "group"}, "numbers per group need the group of every parameter"),
    ],
)
def test_routers_that_could_not_work_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        routed(mlp(), **options)
