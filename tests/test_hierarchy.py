"""The hierarchy: outer levels are a plain loop, inner levels an unroll written by hand, on exactly their clocks."""

import copy

import higher
import pytest
import torch
from small_models import GROUPS, STEP_LEVEL, TINY, brier, close, config_of, inner_level, named, recurrent, shaken, tiny
from torch import nn
from torch.func import functional_call

from losses.outer import next_token
from metamem import ConfigError, InnerLoop, OuterLevels, UserError, build, inner_levels
from metamem.config import ownership
from metamem.memory.base import Out

pytestmark = pytest.mark.usefixtures("float64")
VOCABULARY, TIME = 7, 9
ADAM = "{name: %s, lr: 0.05, betas: [0.8, 0.9], weight_decay: %s}"


@pytest.fixture
def batch():
    return torch.randint(VOCABULARY, (3, TIME)), torch.randint(VOCABULARY, (3, TIME))


# Inner levels, against an unroll written by hand


def sgd(momentum, decay):
    """θ ← θ − rate S, S ← momentum S + gradient + decay θ."""

    def step(rate, weight, gradient, carried):
        carried = (momentum * carried if carried is not None else 0.0) + gradient + decay * weight
        return weight - rate * carried, carried

    return step


def adam(betas, decay, decoupled):
    """θ ← θ − rate (m̂ / (√v̂ + ε) + decay θ), or with the decay in the gradient; v̂ + 1e-16 keeps the root's slope."""

    def step(rate, weight, gradient, carried):
        m, v, count = carried if carried is not None else (0.0, 0.0, 0)
        if not decoupled:
            gradient = gradient + decay * weight
        m, v, count = betas[0] * m + (1 - betas[0]) * gradient, betas[1] * v + (1 - betas[1]) * gradient**2, count + 1
        direction = m / (1 - betas[0] ** count) / ((v / (1 - betas[1] ** count) + 1e-16).sqrt() + 1e-8)
        if decoupled:
            direction = direction + decay * weight
        return weight - rate * direction, (m, v, count)

    return step


def unrolled(model, inputs, targets, step, period, rates, objective=next_token, cut=None, decay_to="zero"):
    """The outer loss of every token, an inner level written out: pieces of `period` tokens, an update after each."""
    fast = {name: value for name, value in model.named_parameters() if name.startswith(("mlp.", "norm."))}
    home = dict(fast) if decay_to == "init" else dict.fromkeys(fast, 0.0)
    carried, memory, losses = dict.fromkeys(fast), None, []
    for piece, start in enumerate(range(0, inputs.shape[1], period), start=1):
        here = slice(start, start + period)
        out = functional_call(model, fast, (inputs[:, here], memory))
        memory = out.state
        losses.append(next_token(out.y, targets[:, here]))
        if start + period < inputs.shape[1]:
            of_piece = objective(out.y, targets[:, here]).mean()
            gradients = torch.autograd.grad(of_piece, list(fast.values()), create_graph=True)
            for (name, weight), gradient, rate in zip(list(fast.items()), gradients, rates, strict=True):
                away, carried[name] = step(rate, weight - home[name], gradient, carried[name])
                fast[name] = home[name] + away
            if cut and piece % cut == 0:
                fast = {name: weight.detach().requires_grad_() for name, weight in fast.items()}
                carried = {name: detached(value) for name, value in carried.items()}
    return torch.cat(losses, 1)


def detached(carried):
    if isinstance(carried, tuple):
        return tuple(detached(value) for value in carried)
    return carried.detach() if isinstance(carried, torch.Tensor) else carried


def loop_of(config):
    model = shaken(config)
    return model, InnerLoop(model, inner_levels(config, model))


def outer_losses(loop, inputs, targets):
    return next_token(loop.run(inputs, targets).y, targets)


def gradients(model, losses):
    of = dict(model.named_parameters())
    found = torch.autograd.grad(losses.square().mean(), list(of.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(of, found, strict=True))


OPTIMIZERS = {
    "{name: sgd, lr: 0.3}": sgd(0.0, 0.0),
    "{name: sgd, lr: 0.2, momentum: 0.7, weight_decay: 0.1}": sgd(0.7, 0.1),
    ADAM % ("adam", 0.0): adam((0.8, 0.9), 0.0, decoupled=False),
    ADAM % ("adam", 0.1): adam((0.8, 0.9), 0.1, decoupled=False),
    ADAM % ("adamw", 0.1): adam((0.8, 0.9), 0.1, decoupled=True),
}


@pytest.mark.parametrize("learned", [False, True], ids=["", "learned"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_inner_loop_is_its_unroll_in_loss_and_outer_gradient(optimizer, learned, batch):
    rate = float(optimizer.split("lr: ")[1].split(",")[0].rstrip("}"))
    config = tiny(inner_level(optimizer=optimizer.replace(f"lr: {rate}", "lr: learned") if learned else optimizer))
    model, loop = loop_of(config)
    rates = model.get_parameter("inner_rates.stream").exp() if learned else [rate] * 3
    expected = unrolled(model, *batch, OPTIMIZERS[optimizer], 2, rates)
    losses = outer_losses(loop, *batch)
    close({"loss": losses}, {"loss": expected})
    mine = gradients(model, losses)
    close(mine, gradients(model, expected))
    assert all(gradient.abs().max() > 0 for gradient in mine.values()), "every slow weight and rate has a gradient"


@pytest.mark.parametrize("cut", [None, 1])
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if "weight_decay: 0.1" in name])
def test_a_decay_to_the_slow_weights_is_a_decay_of_the_distance_from_them(optimizer, cut, batch):
    rate = float(optimizer.split("lr: ")[1].split(",")[0])
    level = inner_level(optimizer=optimizer.replace("}", ", decay_to: init}"), unroll=cut or "null")
    model, loop = loop_of(tiny(level))
    steps = OPTIMIZERS[optimizer]
    expected = unrolled(model, *batch, steps, 2, [rate] * 3, cut=cut, decay_to="init")
    losses = outer_losses(loop, *batch)
    close({"loss": losses}, {"loss": expected})
    close(gradients(model, losses), gradients(model, expected))
    assert (losses - unrolled(model, *batch, steps, 2, [rate] * 3, cut=cut)).abs().max() > 1e-6


def test_a_memory_and_an_attention_carry_through_the_inner_updates(batch):
    model, loop = loop_of(recurrent(inner_level(objective="{small_models.brier: 2.0}")))
    expected = unrolled(model, *batch, sgd(0.0, 0.0), 2, [0.3] * 3, objective=lambda y, t: 2 * brier(y, t))
    losses = outer_losses(loop, *batch)
    close({"loss": losses}, {"loss": expected})
    close(gradients(model, losses), gradients(model, expected))


@pytest.mark.parametrize("optimizer", ["{name: sgd, lr: 0.2, momentum: 0.7}", ADAM % ("adam", 0.1)])
@pytest.mark.parametrize("unroll", [1, 2, 3, 4])
def test_the_outer_gradient_is_cut_every_unroll_updates(unroll, optimizer, batch):
    step, rates = (adam((0.8, 0.9), 0.1, decoupled=False), 0.05) if "adam" in optimizer else (sgd(0.7, 0.0), 0.2)
    model, loop = loop_of(tiny(inner_level(unroll=unroll, optimizer=optimizer)))
    losses = outer_losses(loop, *batch)
    mine = gradients(model, losses)
    cut, whole = (unrolled(model, *batch, step, 2, [rates] * 3, cut=n) for n in (unroll, None))
    close({"loss": losses}, {"loss": whole})
    close(mine, gradients(model, cut))
    assert not torch.allclose(mine["mlp.up.weight"], gradients(model, whole)["mlp.up.weight"])


class Plain(nn.Module):
    """The tiny model without a graph: higher replaces a module's parameters one by one."""

    def __init__(self, model):
        super().__init__()
        self.embed, self.mlp, self.norm, self.head = model.embed, model.mlp, model.norm, model.head

    def forward(self, x):
        e = self.embed(x)
        return self.head(self.norm(e + self.mlp(e)))


def test_the_outer_gradient_is_that_of_higher(batch):
    inner = inner_level(optimizer="{name: sgd, lr: 0.2, momentum: 0.7}", groups="[all]")
    model, loop = loop_of(tiny(inner))
    losses = outer_losses(loop, *batch)
    mine = gradients(model, losses)

    plain = Plain(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.7)
    inputs, targets = batch
    with higher.innerloop_ctx(plain, optimizer, copy_initial_weights=False) as (functional, stepper):
        expected = []
        for start in range(0, TIME, 2):
            here = slice(start, start + 2)
            expected.append(next_token(functional(inputs[:, here]), targets[:, here]))
            stepper.step(expected[-1].mean())
        theirs = gradients(plain, torch.cat(expected, 1))
    close({"loss": losses}, {"loss": torch.cat(expected, 1)})
    close(mine, theirs)


def test_the_second_order_gradient_is_that_of_finite_differences(batch):
    optimizer = "{name: adam, lr: learned, betas: [0.8, 0.9]}"
    model, loop = loop_of(recurrent(inner_level(optimizer=optimizer)))

    def outer():
        return outer_losses(loop, *batch).mean()

    for name in ("inner_rates.stream", "mlp.up.weight", "memory.init.0", "attention.project.weight", "embed.weight"):
        parameter = model.get_parameter(name)
        slope = torch.autograd.grad(outer(), parameter)[0].flatten()
        direction = torch.randn_like(slope)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * direction.view_as(parameter)
            values.append(outer().item())
            with torch.no_grad():
                parameter -= sign * 1e-6 * direction.view_as(parameter)
        difference = (values[0] - values[1]) / 2e-6
        assert (slope @ direction).item() == pytest.approx(difference, rel=1e-5), name


def test_two_inner_levels_move_their_own_weights_on_their_own_clocks(batch):
    config = tiny(
        inner_level("quick", groups="[middle]") + inner_level("slow", period=4, groups="[ends]"),
    )
    model, loop = loop_of(config)
    losses = outer_losses(loop, *batch)

    inputs, targets = batch
    parameters = dict(model.named_parameters())
    quick = {name: parameters[name] for name in ("mlp.up.weight", "mlp.down.weight", "norm.weight")}
    slow, expected, gathered = {"head.weight": parameters["head.weight"]}, [], 0.0
    for start in range(0, TIME, 2):
        here = {"head.weight": slow["head.weight"].clone()}  # a slow level does not learn through the quick one's steps
        out = functional_call(model, {**quick, **here}, (inputs[:, start : start + 2],))
        expected.append(next_token(out.y, targets[:, start : start + 2]))
        steps = torch.autograd.grad(expected[-1].mean(), list(quick.values()), create_graph=True)
        gathered = gathered + torch.autograd.grad(expected[-1].sum(), here["head.weight"], create_graph=True)[0]
        quick = {name: value - 0.3 * step for (name, value), step in zip(quick.items(), steps, strict=True)}
        if (start + 2) % 4 == 0:
            slow, gathered = {"head.weight": slow["head.weight"] - 0.3 * gathered / (3 * 4)}, 0.0
    close({"loss": losses}, {"loss": torch.cat(expected, 1)})
    close(gradients(model, losses), gradients(model, torch.cat(expected, 1)))


def test_updates_happen_at_the_boundaries_of_the_period_and_see_only_the_tokens_in_it(batch):
    inputs, targets = batch
    model, loop = loop_of(tiny(inner_level(period=3, optimizer="{name: sgd, lr: 1.0}")))
    losses = outer_losses(loop, inputs, targets)
    still = next_token(model(inputs).y, targets)
    torch.testing.assert_close(losses[:, :3], still[:, :3])
    assert (losses - still)[:, 3:].abs().amax(0).gt(1e-6).all()
    for t in range(TIME):  # the tiny model has no memory: what a token changes later, it changes by an update
        changed = targets.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCABULARY
        moved = (outer_losses(loop, inputs, changed) - losses).abs().amax(0) > 1e-12
        boundary = 3 * (t // 3 + 1)
        assert moved.tolist() == [i == t or i >= boundary for i in range(TIME)]


def test_a_sequence_of_one_period_learns_nothing_within_it(batch):
    inputs, targets = batch
    model, loop = loop_of(tiny(inner_level(period=TIME)))
    torch.testing.assert_close(outer_losses(loop, inputs, targets), next_token(model(inputs).y, targets))


def test_without_inner_levels_the_loop_is_one_forward(batch):
    model = shaken(recurrent())
    out, whole = InnerLoop(model, []).run(*batch), model(batch[0])
    close(named(out.y, out.state) | out.aux, named(whole.y, whole.state) | whole.aux)


def test_the_loop_gives_the_state_and_the_measures_of_all_its_pieces(batch):
    model, loop = loop_of(recurrent(inner_level(optimizer="{name: sgd, lr: 0.0}")))
    out, whole = loop.run(*batch), model(batch[0])
    close(named(out.y, out.state) | out.aux, named(whole.y, whole.state) | whole.aux)
    assert list(out.aux) == ["memory.surprise"] and out.aux["memory.surprise"].shape == (3, TIME)


def test_any_module_that_gives_an_out_can_learn_inside(batch):
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY))

        def forward(self, x, state=None):
            return Out(self.table[x], {}, {})

    model = Lookup()
    level = inner_levels(tiny(inner_level(groups="[all]")), model)
    losses = outer_losses(InnerLoop(model, level), *batch)
    assert level[0].members == ("table",) and torch.autograd.grad(losses.sum(), model.table)[0].isfinite().all()


def test_learned_rates_are_slow_weights_with_an_owner():
    config = tiny(inner_level(optimizer="{name: sgd, lr: learned}"))
    model = build(config)
    assert model.get_parameter("inner_rates.stream").shape == (3,)  # one for each tensor that the level moves
    assert "inner_rates.stream" in ownership([n for n, _ in model.named_parameters()], config.hierarchy)["task"]
    outer = OuterLevels(config, model)
    assert any(parameter is model.get_parameter("inner_rates.stream") for parameter in outer.parameters["task"])
    text = TINY + GROUPS % "" + inner_level(optimizer="{name: sgd, lr: learned}") + STEP_LEVEL
    orphan = config_of(text.replace('match: "**"', "match: [embed.**, mlp.**, norm.**, head.**]"))
    with pytest.raises(ConfigError, match=r"the parameter 'inner_rates.stream' belongs to no outer level"):
        OuterLevels(orphan, build(orphan))


def test_a_group_of_all_parameters_does_not_move_the_rates_themselves():
    config = tiny(inner_level(groups="[all]", optimizer="{name: sgd, lr: learned}"))
    model = build(config)
    assert inner_levels(config, model)[0].members == (
        "embed.weight",
        *(f"mlp.{n}.weight" for n in ("up", "down")),
        "norm.weight",
        "head.weight",
    )
    assert len(model.get_parameter("inner_rates.stream")) == 5


@pytest.mark.parametrize("unroll", [0, 1])
def test_a_learned_rate_that_no_gradient_reaches_is_refused(unroll):
    with pytest.raises(ConfigError, match=rf"nothing learns this rate: with unroll {unroll} no outer gradient reaches"):
        tiny(inner_level(unroll=unroll, optimizer="{name: sgd, lr: learned}"))
    tiny(inner_level(unroll=2, optimizer="{name: sgd, lr: learned}"))


def test_an_inner_level_that_matches_no_parameter_is_refused():
    config = tiny(inner_level(), "hierarchy.groups.middle.match=tail.**")
    with pytest.raises(ConfigError, match=r"levels\[0\] \(stream\).groups: no parameter is in the groups of the inner"):
        build(config)


def test_periods_that_do_not_divide_one_another_are_refused():
    config = tiny(
        inner_level("quick", groups="[middle]") + inner_level("slow", period=3, groups="[ends]"),
    )
    with pytest.raises(UserError, match=r"the periods of inner levels must be multiples of the fastest: \[2, 3\]"):
        loop_of(config)


# Step levels, against a plain loop

OUTER = f"""{TINY}
hierarchy:
  groups:
    body: {{match: ["embed.**", "mlp.**", "norm.**"]}}
    head: {{match: "head.**"}}
  levels:
    - {{name: quick, clock: step, objective: {{losses.outer.next_token: 1.0}},
       optimizer: {{name: adamw, lr: 0.02, weight_decay: 0.5}}, groups: [body]}}
    - {{name: slow, clock: step, period: 4, objective: {{small_models.brier: 2.0}},
       optimizer: {{name: sgd, lr: 0.3, momentum: 0.9}}, groups: [head]}}
"""


@pytest.mark.parametrize("clip", [None, 0.3])
def test_step_levels_are_a_plain_loop(clip):
    config = config_of(OUTER)
    model = build(config)
    reference = copy.deepcopy(model)
    levels = OuterLevels(config, model)
    body = [reference.embed.weight, reference.mlp.up.weight, reference.mlp.down.weight]
    quick = torch.optim.AdamW(
        [{"params": body}, {"params": [reference.norm.weight], "weight_decay": 0.0}],
        lr=0.02,
        weight_decay=0.5,
        betas=(0.9, 0.95),
    )
    slow = torch.optim.SGD([reference.head.weight], lr=0.3, momentum=0.9)
    gathered = []
    for step in range(1, 17):
        inputs, targets = torch.randint(VOCABULARY, (2, 5)), torch.randint(VOCABULARY, (2, 5))
        scale = step / 16

        y = reference(inputs).y
        tokens, scores = next_token(y, targets).mean(), 2 * brier(y, targets).mean()
        mine = [*body, reference.norm.weight]
        found = torch.autograd.grad(tokens, mine, retain_graph=True)
        gathered.append(torch.autograd.grad(scores, reference.head.weight)[0])
        norms = {"quick": clipped(mine, found, clip)}
        quick.param_groups[0]["lr"] = quick.param_groups[1]["lr"] = 0.02 * scale
        quick.step()
        if step % 4 == 0:
            norms["slow"] = clipped([reference.head.weight], [torch.stack(gathered).mean(0)], clip)
            slow.param_groups[0]["lr"] = 0.3 * scale
            slow.step()
            gathered = []

        def loss(objectives, inputs=inputs, targets=targets):
            y = model(inputs).y
            return sum(weight * objective(y, targets).mean() for objective, weight in objectives.items())

        values = levels.backward(loss)
        assert values == pytest.approx({"quick": tokens.item(), "slow": scores.item()})
        assert levels.step(step, scale, clip) == pytest.approx(norms)
        close(dict(model.named_parameters()), dict(reference.named_parameters()))
    for mine, theirs in ((levels.optimizers["quick"], quick), (levels.optimizers["slow"], slow)):
        states, expected = ([state for state in o.state.values()] for o in (mine, theirs))
        assert len(states) == len(expected) > 0
        for one, other in zip(states, expected, strict=True):
            close(one, other)


def clipped(parameters, found, clip):
    """Sets the gradients, scaled down to a norm of `clip` all together; gives the norm that they had."""
    norm = torch.cat([gradient.flatten() for gradient in found]).norm()
    share = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient * share
    return norm.item()


def test_levels_of_one_objective_share_its_loss():
    config = config_of(OUTER.replace("small_models.brier: 2.0", "losses.outer.next_token: 1.0"))
    model, calls = build(config), []
    levels = OuterLevels(config, model)
    tokens = torch.randint(VOCABULARY, (2, 5))

    def loss(objectives):
        calls.append(list(objectives))
        return next_token(model(tokens).y, tokens).mean()

    values = levels.backward(loss)
    assert calls == [[next_token]] and values["quick"] == values["slow"]
    gathered = [total for own in levels.gathered.values() for total in own.sums]
    assert len(gathered) == len(list(model.parameters())) and all(total is not None for total in gathered)


def test_a_slow_weight_that_is_frozen_stays():
    config = config_of(OUTER)
    model = build(config)
    model.embed.weight.requires_grad_(False)
    before = model.embed.weight.clone()
    levels, tokens = OuterLevels(config, model), torch.randint(VOCABULARY, (2, 5))
    levels.backward(lambda objectives: next_token(model(tokens).y, tokens).mean())
    levels.step(1, 1.0, 1.0)
    assert torch.equal(model.embed.weight, before) and model.mlp.up.weight.grad is None
