"""Inner loops around any module: every engine against a plain loop with torch.autograd.grad, in float64; first order,
truncation and implicit gradients against their definitions; buffers, dropout and ties; refusals by name."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from losses.outer import next_token
from losses.recall import huber, mse
from metamem.episodes import (
    ENGINES,
    Batch,
    EngineError,
    Episode,
    EpisodeLevel,
    InnerOptimizer,
    RateRouter,
    Rates,
    adapt,
    engines,
    predict,
)
from metamem.episodes.batched import has_rule
from metamem.episodes.executors import BATCHED, LOOP, VMAP, fastest
from metamem.episodes.transforms import transform
from metamem.episodes.unroll import unroll

pytestmark = pytest.mark.usefixtures("float64")
TASKS, SHOTS = 3, 6
UNROLLED = [name for name in ENGINES if name != "implicit"]
OBJECTIVES = {mse: 1.5, huber: 0.5}
SGD = {
    "sgd": InnerOptimizer(),
    "momentum": InnerOptimizer(momentum=0.9, weight_decay=0.1),
    "nesterov": InnerOptimizer(momentum=0.7, nesterov=True),
}
ADAM = {
    "adam": InnerOptimizer("adam", weight_decay=0.1),
    "adamw": InnerOptimizer("adamw", betas=(0.8, 0.95), weight_decay=0.1),
}


def mlp():
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 1))


def episode(dim_in=2, dim_out=1):
    support, query = (Batch(torch.randn(TASKS, SHOTS, dim_in), torch.randn(TASKS, SHOTS, dim_out)) for _ in range(2))
    return Episode(support, query)


class Steps:
    """torch.optim's algorithms as they are written down, for one task, differentiable."""

    def __init__(self, options):
        self.options, self.count, self.first, self.second = options, 0, {}, {}

    def direction(self, name, gradient, value):
        o = self.options
        decay = o.weight_decay * value if o.weight_decay else 0.0
        if o.name == "sgd":
            gradient = gradient + decay
            if not o.momentum:
                return gradient
            self.first[name] = o.momentum * self.first[name] + gradient if name in self.first else gradient
            return gradient + o.momentum * self.first[name] if o.nesterov else self.first[name]
        if o.name == "adam":
            gradient = gradient + decay
        beta1, beta2 = o.betas
        self.first[name] = beta1 * self.first.get(name, 0.0) + (1 - beta1) * gradient
        self.second[name] = beta2 * self.second.get(name, 0.0) + (1 - beta2) * gradient**2
        root = (self.second[name] / (1 - beta2**self.count)).sqrt()
        moved = self.first[name] / (1 - beta1**self.count) / (root + o.eps)
        return moved + decay if o.name == "adamw" else moved


def reference(module, batch, level, rate=None):
    """The predictions of each task's adapted module, and the fast parameters: one task after the other."""
    slow = dict(module.named_parameters())
    members = level.members or tuple(slow)
    predictions, fast = [], []
    for inputs, targets, query in zip(*batch.support, batch.query.inputs, strict=True):
        now = {name: slow[name] for name in members}
        now = {name: value if value.requires_grad else value.clone().requires_grad_() for name, value in now.items()}
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        steps = Steps(level.optimizer)
        for step in range(level.steps):
            with sdpa_kernel(SDPBackend.MATH):
                given = {**at_every_place(module, now), **buffers}
                pred = functional_call(module, given, (inputs,), tie_weights=False)
            loss = sum(weight * objective(pred, targets).mean() for objective, weight in level.objectives.items())
            gradients = torch.autograd.grad(loss, list(now.values()), create_graph=True, allow_unused=True)
            steps.count += 1
            rates = rate(step, loss, dict(zip(now, gradients, strict=True))) if rate else None
            moved = {}
            for (name, value), gradient in zip(now.items(), gradients, strict=True):
                gradient = torch.zeros_like(value) if gradient is None else gradient
                if level.unroll is not None and step < level.steps - level.unroll:
                    gradient = gradient.detach()
                gradient = gradient + level.proximal * (value - slow[name])
                lr = rates[name] if rates else level.rates
                moved[name] = value - lr * steps.direction(name, gradient, value)
            now = moved
        given = {**at_every_place(module, now), **buffers}
        predictions.append(functional_call(module, given, (query,), tie_weights=False))
        fast.append(now)
    return torch.stack(predictions), {name: torch.stack([one[name] for one in fast]) for name in members}


def at_every_place(module, tensors):
    """A weight that two modules share has two places; a module that is used twice has one, under its first name."""
    names = {id(own): name for name, own in module.named_parameters()}
    for path, part in module.named_modules():
        for name, own in part.named_parameters(path, recurse=False):
            if names[id(own)] in tensors:
                tensors = {**tensors, name: tensors[names[id(own)]]}
    return tensors


def outer_loss(predictions, batch):
    return (predictions - batch.query.targets).square().mean() + predictions.sin().mean()


def outer_gradients(predictions, batch, parameters):
    return torch.autograd.grad(outer_loss(predictions, batch), list(parameters), allow_unused=True)


def compare(module, batch, level, tolerance, rate=None, extra=()):
    """Fast parameters and outer gradients of a level against the reference."""
    slow = [p for p in module.parameters() if p.requires_grad] + list(extra)
    adapted = adapt(module, batch.support, level)
    predictions = predict(module, adapted, batch.query.inputs, level)
    expected, fast = reference(module, batch, level, rate)
    for name, value in fast.items():
        torch.testing.assert_close(adapted.fast[name], value, rtol=0, atol=tolerance)
    found, wanted = (outer_gradients(p, batch, slow) for p in (predictions, expected))
    for one, other in zip(found, wanted, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    return wanted


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


# Modules of all kinds


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Attending(nn.Module):
    """The examples of a task attend to one another."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(x + self.attention(x[None], x[None], x[None], need_weights=False)[0][0])


class Recurrent(nn.Module):
    """A GRU over the examples of a task."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.gru(x[None])[0][0])


def twice():
    layer = nn.Linear(4, 4, bias=False)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 1))


MODULES = {"tied": Tied, "attention": Attending, "layer twice": twice}


@pytest.mark.parametrize("engine", ["functional", "loop", "torchopt", "higher"])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_modules_that_share_and_attend(make, engine):
    compare(make(), episode(4), EpisodeLevel(OBJECTIVES, 3, SGD["momentum"], 0.05, engine=engine), 1e-10)


@pytest.mark.parametrize("engine", ["loop", "higher"])
def test_a_recurrent_module(engine):
    compare(Recurrent(), episode(4), EpisodeLevel(OBJECTIVES, 3, rates=0.05, engine=engine), 1e-10)


@pytest.mark.parametrize("engine", ["functional", "loop", "torchopt", "higher"])
@pytest.mark.parametrize("members", [("4.weight", "4.bias"), ("0.bias",), ("2.weight",)], ids="-".join)
def test_only_members_move_and_the_rest_learns_through_them(members, engine):
    module, batch = mlp(), episode()
    level = EpisodeLevel(OBJECTIVES, 4, SGD["momentum"], 0.05, members, engine=engine)
    assert tuple(adapt(module, batch.support, level).fast) == members
    compare(module, batch, level, 1e-10)


@pytest.mark.parametrize("engine", ["functional", "loop", "torchopt", "higher"])
def test_a_parameter_that_no_outer_level_trains_moves_inside(engine):
    module = mlp()
    module[2].bias.requires_grad_(False)
    compare(module, episode(), EpisodeLevel(OBJECTIVES, 3, rates=0.1, members=("2.bias",), engine=engine), 1e-10)


EXECUTORS = {"batched": BATCHED, "vmap": VMAP, "loop": LOOP}


@pytest.mark.parametrize("members", [None, ("0.weight", "3.bias", "2.weight")], ids=["all", "some"])
def test_executors_agree(members):
    module = nn.Sequential(
        nn.Linear(2, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 3), nn.Dropout(0.0), nn.Sigmoid(), nn.Linear(3, 3)
    )
    support = Batch(torch.randn(TASKS, SHOTS, 2), torch.randint(3, (TASKS, SHOTS)))
    level = EpisodeLevel({next_token: 1.0}, 3, SGD["momentum"], 0.3, members)
    found = {}
    for name, executor in EXECUTORS.items():
        adapted = unroll(module, support, level, executor, transform(level.optimizer))
        predictions = executor.predict(module, adapted.fast, adapted.buffers, support.inputs)
        found[name] = (adapted.losses, predictions, *torch.autograd.grad(predictions.sin().sum(), module.parameters()))
    for name in ("batched", "vmap"):
        torch.testing.assert_close(found[name], found["loop"], rtol=0, atol=1e-12)


def test_inputs_of_several_axes_are_batched_too():
    module = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    support = Batch(torch.randn(TASKS, SHOTS, 2, 3), torch.randn(TASKS, SHOTS, 2))
    level = EpisodeLevel({mse: 1.0}, 2, rates=0.1)
    one, other = (unroll(module, support, level, e, transform(level.optimizer)) for e in (BATCHED, LOOP))
    torch.testing.assert_close(one.fast, other.fast, rtol=0, atol=1e-13)


def test_a_batched_rule_is_of_the_exact_type_without_hooks():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = nn.Sequential(nn.Linear(2, 1))
    hooked[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert has_rule(mlp()) and fastest(mlp()) is BATCHED
    for module in (nn.Sequential(Doubled(2, 1)), hooked, nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))):
        assert not has_rule(module) and fastest(module) is VMAP
    level = EpisodeLevel(OBJECTIVES, 2, rates=0.1)
    compare(nn.Sequential(Doubled(2, 1)), episode(), level, 1e-10)


LAYERS = {
    "layer norm": lambda: nn.LayerNorm((2, 8)),
    "rms norm": lambda: nn.RMSNorm((2, 8)),
    "batch norm": lambda: nn.BatchNorm1d(2),
    "batch norm, no statistics": lambda: nn.BatchNorm1d(2, track_running_stats=False),
    "group norm": lambda: nn.GroupNorm(2, 2),
    "instance norm": lambda: nn.InstanceNorm1d(2, affine=True),
    "convolution": lambda: nn.Conv1d(2, 2, 3, padding=1),
    "strided convolution": lambda: nn.Sequential(nn.Conv1d(2, 2, 2, stride=2), nn.Upsample(scale_factor=2)),
    "transposed convolution": lambda: nn.ConvTranspose1d(2, 2, 3, padding=1),
    "max pool": lambda: nn.Sequential(nn.Conv1d(2, 2, 1), nn.MaxPool1d(2), nn.Upsample(scale_factor=2)),
    "mean pool": lambda: nn.Sequential(nn.Conv1d(2, 2, 1), nn.AvgPool1d(3, 1, 1)),
    "prelu": lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(2)),
    "glu": lambda: nn.Sequential(nn.Linear(8, 16), nn.GLU()),
    "softmax": lambda: nn.Sequential(nn.Linear(8, 8), nn.LogSoftmax(-1), nn.Softmax(1)),
    "bilinear": lambda: Pairs(nn.Bilinear(8, 8, 8)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 6, 0.0, "gelu", batch_first=True),
    "attention, norm first": lambda: nn.TransformerEncoderLayer(8, 2, 6, 0.0, batch_first=True, norm_first=True),
}


class Pairs(nn.Module):
    """A layer of two inputs that gets the same twice."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_second_derivatives_of_layers_under_vmap(make):
    """vmap against task by task: torch's own batching rules of norms are wrong here (metamem.episodes.exact_norms)."""
    module = nn.Sequential(nn.Linear(8, 8), make(), nn.Tanh(), nn.Linear(8, 3))
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    support = Batch(torch.randn(TASKS, SHOTS, 2, 8), torch.randn(TASKS, SHOTS, 2, 3))
    level, found = EpisodeLevel({mse: 1.0}, 2, rates=0.1), []
    for executor in (VMAP, LOOP):
        adapted = unroll(module, support, level, executor, transform(level.optimizer))
        predictions = executor.predict(module, adapted.fast, adapted.buffers, support.inputs)
        gradients = torch.autograd.grad(predictions.sin().sum(), module.parameters())
        found.append((predictions, adapted.buffers, *gradients))
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


# Buffers and randomness


@pytest.mark.parametrize("engine", ["functional", "loop", "torchopt", "higher"])
def test_running_statistics_are_each_tasks_own(engine):
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    batch, level = episode(), EpisodeLevel(OBJECTIVES, 3, rates=0.1, engine=engine)
    before = copy.deepcopy(dict(module.named_buffers()))
    compare(module, batch, level, 1e-10)
    adapted = adapt(module, batch.support, level)
    for name, buffer in module.named_buffers():
        assert buffer.equal(before[name])
    for task in range(TASKS):
        alone = copy.deepcopy(module)
        optimizer = torch.optim.SGD(alone.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            pred, target = alone(batch.support.inputs[task]), batch.support.targets[task]
            (1.5 * mse(pred, target) + 0.5 * huber(pred, target)).mean().backward()
            optimizer.step()
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(adapted.buffers[name][task], buffer, rtol=0, atol=1e-12)
        module.eval()
        alone.eval()
        predictions = predict(module, adapted, batch.query.inputs, level)[task]
        torch.testing.assert_close(predictions, alone(batch.query.inputs[task]), rtol=0, atol=1e-12)
        module.train()


@pytest.mark.parametrize("engine", UNROLLED)
def test_every_task_draws_its_own_dropout(engine):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 400)

        def forward(self, x):
            return nn.functional.dropout(self.layer(x), 0.5, self.training).mean(-1, keepdim=True)

    module = nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5)) if engine == "functional" else Dropping()
    one = torch.randn(1, SHOTS, 2)
    support = Batch(one.expand(TASKS, -1, -1), torch.zeros(TASKS, SHOTS, 64 if engine == "functional" else 1))
    level = EpisodeLevel({mse: 1.0}, 1, rates=0.1, engine=engine)

    def fast(seed):
        torch.manual_seed(seed)
        return next(iter(adapt(module, support, level).fast.values())).detach()

    found = fast(1)
    assert not found[0].equal(found[1]) and found.equal(fast(1)) and not found.equal(fast(2))
    module.eval()
    found = fast(1)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-14)


def test_adam_has_a_gradient_where_units_are_dead():
    """The masked root against central differences, which see that a dead unit stays where it is."""
    module, batch = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), episode()
    with torch.no_grad():
        module[0].bias[1] = -50.0
    for engine in ("functional", "loop", "higher"):
        level = EpisodeLevel({mse: 1.0}, 3, InnerOptimizer("adam"), 0.01, engine=engine)

        def loss(level=level):
            return outer_loss(predict(module, adapt(module, batch.support, level), batch.query.inputs, level), batch)

        found = torch.autograd.grad(loss(), list(module.parameters()))
        assert found[0][1].eq(0).all() and found[0].abs().max() > 1e-3
        for parameter, gradient in zip(module.parameters(), found, strict=True):
            flat = parameter.data.view(-1)
            for index in range(len(flat)):
                values = []
                for step in (1e-6, -2e-6):
                    flat[index] += step
                    with torch.no_grad():
                        values.append(float(loss()))
                flat[index] += 1e-6
                assert gradient.view(-1)[index].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_gradients_the_result_is_detached_and_the_same(engine):
    module, batch = mlp(), episode()
    level = EpisodeLevel(OBJECTIVES, 3, rates=0.05, engine=engine, proximal=1.0)
    with_graph = adapt(module, batch.support, level)
    with torch.no_grad():
        without = adapt(module, batch.support, level)
        predictions = predict(module, without, batch.query.inputs, level)
    assert not any(value.requires_grad for value in (*without.fast.values(), without.losses, predictions))
    torch.testing.assert_close(without.fast, {k: v.detach() for k, v in with_graph.fast.items()}, rtol=0, atol=1e-13)
    assert without.losses.shape == (3, TASKS) and (without.losses[-1] < without.losses[0]).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_of_the_module_changes(engine):
    module, batch = mlp(), episode()
    before, parameters = copy.deepcopy(module), list(module.parameters())
    adapt(module, batch.support, EpisodeLevel(OBJECTIVES, 2, rates=0.05, engine=engine, proximal=1.0))
    assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))
    assert all(one.equal(other) for one, other in zip(module.parameters(), before.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in parameters)


# Refusals


class InPlace(nn.Module):
    """Writes into a tensor that has no task axis."""

    def forward(self, x):
        total = torch.zeros(x.shape[-1])
        for row in x.detach():
            total += row
        return x - total / len(x)


class Decides(nn.Module):
    """What it computes depends on the values that it sees."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) if x.mean() > 0 else -self.layer(x)


class Asks(nn.Module):
    """Takes a number out of a tensor."""

    def forward(self, x):
        return x * x.abs().max().item()


@pytest.mark.parametrize("part", [InPlace, Decides, Asks])
def test_what_vmap_cannot_run_is_named_with_an_engine_that_can(part):
    module, batch = nn.Sequential(nn.Linear(2, 2), part(), nn.Linear(2, 1)), episode()
    for engine in ("functional", "torchopt", "implicit"):
        level = EpisodeLevel(OBJECTIVES, 2, rates=0.05, engine=engine, proximal=0.1)
        with pytest.raises(EngineError) as raised:
            adapt(module, batch.support, level)
        text = str(raised.value)
        assert text.startswith(f"module '1' ({part.__name__}): ") and "take the engine 'loop', or 'higher'" in text
    for engine in ("loop", "higher", "torchopt_meta"):
        compare(module, batch, EpisodeLevel(OBJECTIVES, 2, rates=0.05, engine=engine), 1e-10)


def test_an_error_of_the_modules_own_stays_what_it_is():
    with pytest.raises(RuntimeError, match=r"mat2|batch2") as raised:
        adapt(nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)), episode().support, EpisodeLevel(OBJECTIVES))
    assert not isinstance(raised.value, EngineError)


NAMED = {name: torch.zeros(p.shape) for name, p in mlp().named_parameters()}
REFUSED = {
    "engine 'higher' has no AdamW": {"engine": "higher", "optimizer": InnerOptimizer("adamw")},
    "engine 'higher' takes rates before it takes gradients": {
        "engine": "higher",
        "rates": Rates(NAMED, 0.1, multiplier=RateRouter(NAMED, "dense", experts=(1.0, 2.0), input="task")),
    },
    "engine 'torchopt_meta' has no first-order or truncated mode (unroll 1 of 3 steps)": {
        "engine": "torchopt_meta",
        "unroll": 1,
    },
    "engine 'torchopt_meta' has one rate for all": {"engine": "torchopt_meta", "rates": Rates(NAMED, 0.1)},
    "engine 'torchopt_meta' moves all parameters": {"engine": "torchopt_meta", "members": ("0.bias",)},
    "engine 'implicit' needs a `proximal` above 0": {"engine": "implicit"},
    "engine 'implicit' gives rates, gates and routers no gradient": {
        "engine": "implicit",
        "proximal": 1.0,
        "rates": Rates(NAMED, 0.1, learned=True),
    },
    "engine 'implicit' has no `unroll`": {"engine": "implicit", "proximal": 1.0, "unroll": 2},
    "engine 'implicit' solves for its objective without weight decay": {
        "engine": "implicit",
        "proximal": 1.0,
        "optimizer": InnerOptimizer(weight_decay=0.1),
    },
    "there is no engine 'funktional'; did you mean 'functional'?": {"engine": "funktional"},
    "Sequential has no parameter '0.bais'; did you mean '0.bias'?": {"members": ("0.bais",)},
    "nesterov needs a momentum above 0": {"optimizer": InnerOptimizer(nesterov=True)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_an_engine_cannot_do_is_refused_by_name(reason):
    with pytest.raises(ValueError) as raised:
        adapt(mlp(), episode().support, EpisodeLevel(OBJECTIVES, 3, **REFUSED[reason]))
    assert str(raised.value).startswith(reason)


def test_torchopts_meta_optimizers_refuse_ties_and_fixed_parameters():
    level = EpisodeLevel(OBJECTIVES, 2, engine="torchopt_meta")
    with pytest.raises(EngineError, match=r"unties the tied weight 'second.weight' after a step"):
        adapt(Tied(), episode(4).support, level)
    module = mlp()
    module[0].bias.requires_grad_(False)
    with pytest.raises(EngineError, match=r"cannot move '0.bias', which does not require a gradient"):
        adapt(module, episode().support, level)


@pytest.mark.parametrize("engine", ["torchopt", "torchopt_meta"])
def test_torchopts_adam_refuses_a_gradient_that_is_zero(engine):
    module, batch = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), episode()
    with torch.no_grad():
        module[0].bias[1] = -50.0
    level = EpisodeLevel({mse: 1.0}, 2, InnerOptimizer("adam"), 0.01, engine=engine)
    with pytest.raises(EngineError, match=r"torchopt's Adam has no outer gradient .* as one of '0.weight' is"):
        adapt(module, batch.support, level)
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())
    if engine == "torchopt":  # where none goes through it, there is nothing to refuse
        level = EpisodeLevel({mse: 1.0}, 2, InnerOptimizer("adam"), 0.01, engine=engine, unroll=0)
        found = adapt(module, batch.support, level)
        other = adapt(module, batch.support, EpisodeLevel(**{**level.__dict__, "engine": "functional"}))
        torch.testing.assert_close(found.fast, other.fast, rtol=0, atol=1e-10)


def test_the_module_is_restored_after_an_exception_inside_torchopts_meta_optimizer():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.calls = nn.Linear(2, 1), nn.BatchNorm1d(1), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 3:
                raise ValueError("on purpose")
            return self.norm(self.layer(x))

    module = Fails()
    before = copy.deepcopy(module)
    with pytest.raises(ValueError, match="on purpose"):
        adapt(module, episode().support, EpisodeLevel(OBJECTIVES, 4, engine="torchopt_meta"))
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())
    for one, other in zip(module.state_dict().values(), before.state_dict().values(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("package", ["higher", "torchopt"])
def test_an_engine_that_is_not_installed_says_so(package, monkeypatch):
    real = importlib.import_module

    def missing(name, *rest):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(engines.importlib, "import_module", missing)
    names = [name for name, engine in ENGINES.items() if package in engine.packages]
    assert names
    for name in names:
        with pytest.raises(EngineError, match=f"engine '{name}' needs {package} .*engines without it: 'functional'"):
            adapt(mlp(), episode().support, EpisodeLevel(OBJECTIVES, 1, engine=name, proximal=1.0))


def test_the_innermost_module_is_found_below_a_module_of_its_own():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleDict({"gate": Decides()})
            self.head = nn.Linear(2, 1)

        def forward(self, x):
            return self.head(self.body["gate"](x))

    with pytest.raises(EngineError, match=r"module 'body.gate' \(Decides\): engine 'functional' cannot batch"):
        adapt(Outer(), episode().support, EpisodeLevel(OBJECTIVES))


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
