"""Inner loops around modules of all kinds: ties, attention, recurrence, normalisation, buffers, dropout; every executor
against the others, and against the plain loop of episode_reference."""

import copy

import pytest
import torch
from episode_reference import (
    OBJECTIVES,
    SGD,
    SHOTS,
    TASKS,
    UNROLLED,
    Tied,
    compare,
    episode,
    mlp,
    outer_loss,
)
from torch import nn

from losses.outer import next_token
from losses.recall import huber, mse
from metamem.episodes import (
    ENGINES,
    Batch,
    EpisodeLevel,
    InnerOptimizer,
    adapt,
    predict,
)
from metamem.episodes.batched import has_rule
from metamem.episodes.executors import BATCHED, LOOP, VMAP, fastest
from metamem.episodes.transforms import transform
from metamem.episodes.unroll import unroll

pytestmark = pytest.mark.usefixtures("float64")


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
