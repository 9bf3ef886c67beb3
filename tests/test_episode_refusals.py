"""What an engine cannot do, or would get wrong, is refused by name, with an engine that can."""

import copy
import importlib

import pytest
import torch
from episode_reference import (
    OBJECTIVES,
    Tied,
    compare,
    episode,
    mlp,
)
from torch import nn

from losses.recall import mse
from metamem.episodes import (
    ENGINES,
    EngineError,
    EpisodeLevel,
    InnerOptimizer,
    RateRouter,
    Rates,
    adapt,
    engines,
)

pytestmark = pytest.mark.usefixtures("float64")


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
