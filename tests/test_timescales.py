"""The memory spectrum against known half-lives and full Jacobians; traces of levels and gates against plain loops."""

import math

import numpy as np
import pytest
import torch
from small_models import with_memory
from torch import Tensor

from losses.recall import mse
from metamem import FastWeights, TokenLevel, build
from metamem.analysis.spectrum import fit_half_life, fit_half_lives, isolate, lags_up_to, memory_inputs, memory_spectrum
from metamem.analysis.trace import trace_levels
from metamem.memory.base import Out
from metamem.state import State, Stateful


class Linear(Stateful):
    """y_t = Σ_l Δ^l_t W_l,  Δ^l_t = ½^(1 / h_l) Δ^l_{t−1} + x_t."""

    def __init__(self, half_lives: dict[str, float], weights: dict[str, Tensor]):
        super().__init__()
        self.keep = {name: 0.5 ** (1 / life) for name, life in half_lives.items()}
        self.weights = weights

    def init_state(self, batch: int) -> State:
        width = next(iter(self.weights.values())).shape[0]
        return {"levels": {name: {"delta": {"0": torch.zeros(batch, width)}} for name in self.weights}}

    def forward(self, x, state=None):
        state = self.init_state(len(x)) if state is None else state
        deltas, outputs = {name: level["delta"]["0"] for name, level in state["levels"].items()}, []
        for token in x.unbind(1):
            deltas = {name: self.keep[name] * delta + token for name, delta in deltas.items()}
            outputs.append(sum(delta @ self.weights[name] for name, delta in deltas.items()))
        levels = {name: {"delta": {"0": delta}} for name, delta in deltas.items()}
        return Out(torch.stack(outputs, 1), {"levels": levels}, {})


# Half-lives


@pytest.mark.parametrize("lives", [{"one": 9.0}, {"fast": 4.0, "slow": 60.0}], ids=["one level", "two levels"])
def test_the_spectrum_of_a_linear_memory_recovers_its_half_lives(lives, float64):
    memory = Linear(lives, {name: torch.randn(5, 3) for name in lives})
    lags = lags_up_to(90)
    found = memory_spectrum(memory, torch.randn(2, 120, 5), lags, targets=8, probes=4)
    for name, life in lives.items():
        fit = fit_half_life(lags, found[name].tolist())
        assert fit.half_life == pytest.approx(life, rel=0.05) and fit.explained > 0.99
    if len(lives) == 1:
        torch.testing.assert_close(found["all"], found["one"])


def test_two_half_lives_are_told_apart_in_the_sum(float64):
    weight = torch.randn(5, 3)
    memory = Linear({"fast": 4.0, "slow": 60.0}, {"fast": weight, "slow": 0.2 * weight})
    lags = lags_up_to(200)
    found = memory_spectrum(memory, torch.randn(1, 240, 5), lags, targets=4, probes=2)
    fast, slow = fit_half_lives(lags, found["all"].tolist(), 2)
    assert (fast.half_life, slow.half_life) == (pytest.approx(4, rel=0.05), pytest.approx(60, rel=0.05))
    assert slow.amplitude / fast.amplitude == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("lives", [(2.0,), (3.0, 80.0), (2.0, 20.0, 300.0)])
def test_sums_of_exponentials_are_fitted_under_noise(lives):
    lags = lags_up_to(500, 60)
    noise = np.random.default_rng(0).normal(size=len(lags))
    shares = [0.3**index for index in range(len(lives))]
    values = [sum(a * 2 ** (-lag / life) for a, life in zip(shares, lives, strict=True)) for lag in lags]
    if len(lives) == 1:
        lags, values, noise = lags[:25], values[:25], noise[:25]
    fits = fit_half_lives(lags, (np.array(values) * np.exp(0.003 * noise)).tolist(), len(lives))
    assert [fit.half_life for fit in fits] == [pytest.approx(life, rel=0.05) for life in lives]
    assert fits[0].explained > 0.999


def fast_weights(forget: dict[str, float], period: dict[str, int] | None = None, **settings) -> FastWeights:
    """A memory with a Hebbian level for each constant forgetting."""
    levels = [
        TokenLevel(name, {mse: 1.0}, (period or {}).get(name, 1), lr=1.0, forget=share, signal="hebbian")
        for name, share in forget.items()
    ]
    return FastWeights(8, levels, heads=2, chunk=16, signal_at="token", **settings)


@pytest.mark.parametrize("lives", [(12.0,), (5.0, 25.0)], ids=["one level", "two levels"])
def test_a_fast_weight_memory_that_forgets_has_the_half_lives_of_its_forgetting(lives):
    forget = {f"level{index}": 1 - 0.5 ** (1 / life) for index, life in enumerate(lives)}
    lags = lags_up_to(90)
    found = memory_spectrum(fast_weights(forget), torch.randn(64, 112, 8), lags, targets=12, probes=1)
    for name, life in zip(forget, lives, strict=True):
        assert fit_half_life(lags, found[name].tolist()).half_life == pytest.approx(life, rel=0.05)


def test_a_level_of_a_period_is_seen_from_the_next_period_on():
    memory = fast_weights({"quick": 0.5, "slow": 0.0}, {"slow": 8})
    lags = list(range(1, 32))
    slow = memory_spectrum(memory, torch.randn(8, 64, 8), lags, targets=24, probes=2)["slow"]
    rising = [slow[: 8 + 1][index] for index in range(8)]
    assert rising == sorted(rising), "the longer ago, the more tokens stand behind a boundary"
    fit = fit_half_life(lags, slow.tolist(), first=8)
    assert fit.half_life > 150, "nothing is forgotten"


def test_what_a_spectrum_cannot_say():
    assert fit_half_life([1, 2, 4], [0.5, 0.5, 0.5]).half_life == math.inf
    assert fit_half_life([1, 2, 4], [0.5, 0.6, 0.7]).half_life == math.inf
    assert math.isnan(fit_half_life([1, 2, 4], [0.0, 0.0, 0.0]).half_life)
    assert math.isnan(fit_half_life([1, 2, 4], [1.0, 1e-9, 0.0]).half_life)
    with pytest.raises(ValueError, match="a lag of 9 needs more than 9 tokens"):
        memory_spectrum(Linear({"a": 1.0}, {"a": torch.eye(2)}), torch.randn(1, 9, 2), [9])


# Jacobians


def test_the_spectrum_is_that_of_the_full_jacobian(float64):
    memory, x = fast_weights({"quick": 0.3, "slow": 0.02}), torch.randn(2, 14, 8)
    lags = [1, 3, 7]
    exact = memory_spectrum(memory, x, lags, targets=100, probes=None)
    jacobian = torch.autograd.functional.jacobian(lambda given: memory(given).y, x)
    plain = [
        torch.stack([jacobian[row, t, :, row, t - lag].square().sum() for row in range(2) for t in range(7, 14)]).mean()
        for lag in lags
    ]
    torch.testing.assert_close(exact["all"], torch.stack(plain).sqrt())


def test_probes_are_unbiased(float64):
    memory, x = fast_weights({"quick": 0.3, "slow": 0.02}), torch.randn(2, 14, 8)
    exact = memory_spectrum(memory, x, [1, 4], targets=2, probes=None)
    sampled = memory_spectrum(memory, x, [1, 4], targets=2, probes=100)
    for name in exact:
        torch.testing.assert_close(sampled[name], exact[name], rtol=0.1, atol=0)


def test_the_paths_through_the_levels_add_up_to_all_of_a_linear_memory(float64):
    """J = Σ_levels J_level, where no level's signal depends on another's weights."""
    memory, x = fast_weights({"quick": 0.3, "slow": 0.02}), torch.randn(1, 9, 8, requires_grad=True)
    state = memory(x[:, :8]).state
    y = memory(x[:, 8:], state).y
    parts = [memory(x[:, 8:], isolate(state, name)).y for name in ("quick", "slow")]
    for part in parts:
        torch.testing.assert_close(part, y)
    probe = torch.randn_like(y)
    whole, *paths = (torch.autograd.grad((probe * each).sum(), x, retain_graph=True)[0][:, :8] for each in (y, *parts))
    torch.testing.assert_close(sum(paths), whole)
    assert all(path.abs().max() > 1e-3 for path in paths)


# What a model reads, and what its levels do


LEVELS = "{kind: fast_weights, dim: 6, heads: 2, signal_at: token, chunk: 4}"


@pytest.fixture
def model():
    network = build(with_memory(LEVELS, "memory.init.**"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def test_the_inputs_of_a_models_memories_are_found(model):
    tokens = torch.randint(7, (2, 9))
    ((path, (memory, x)),) = memory_inputs(model, tokens).items()
    assert path == "memory" and isinstance(memory, FastWeights) and x.shape == (2, 9, 6)
    assert not memory._forward_pre_hooks
    attended = model.attention(model.embed(tokens))[0]
    torch.testing.assert_close(x, model.embed(tokens) + model.mlp(attended))


def test_norms_of_levels_along_a_sequence_are_those_of_a_plain_loop(model):
    tokens = torch.randint(7, (2, 10))
    traced = trace_levels(model, tokens, points=4)  # pieces of 3
    assert traced["delta/memory/surprise"]["x"] == [3, 6, 9, 10]
    state, before = None, torch.zeros(2, 2, 3, 3)
    for index, (start, end) in enumerate(((0, 3), (3, 6), (6, 9), (9, 10))):
        state = model(tokens[:, start:end], state).state
        (delta,) = state["memory"]["levels"]["surprise"]["delta"].values()
        norms = (
            [delta[row].norm().item() for row in range(2)],
            [(delta - before)[row].norm().item() for row in range(2)],
        )
        for kind, norm in zip(("delta", "update"), norms, strict=True):
            assert traced[f"{kind}/memory/surprise"]["y"][index] == pytest.approx(sum(norm) / 2, rel=1e-5)
        before = delta


class Routed(Stateful):
    """Gates that are open as long ago as their group is."""

    def forward(self, x, state=None):
        open_until = torch.arange(x.shape[1])[:, None] < torch.tensor([2, 4])
        gates = open_until.double().expand(len(x), -1, -1)
        return Out(x, {}, {"memory.router.gates.quick": gates, "mix.gates.a": gates, "memory.router.gates": gates})


def test_gates_are_traced_by_level_and_group():
    traced = trace_levels(Routed(), torch.zeros(3, 8), points=1)
    assert traced == {
        "gates/memory/quick": {"x": [8], "y": [[0.25, 0.5]]},
        "gates/mix/a": {"x": [8], "y": [[0.25, 0.5]]},
    }
