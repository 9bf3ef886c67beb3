"""Metalearned Neural Memory against the paper's equations, written plainly with torch.autograd.grad inside."""

import dataclasses
from functools import partial

import pytest
import torch
from conformance import tensors
from small_models import config_of
from torch import Tensor

from losses.recall import cosine, mse
from metamem import Network, TokenLevel, build
from metamem.memory import mnm_gradient
from metamem.memory.base import writing
from metamem.memory.mnm import MNM

DIM, HIDDEN, WIDTH, TIME = 5, 6, 4, 7
SIGNALS = ["backprop", "predicted_targets"]


def memory_of(signal="backprop", objectives=None, heads=2, layers=3, seed=0, **settings):
    """A memory with random slow weights and a high rate: what is small could be wrong unseen."""
    level = TokenLevel("write", objectives or {mse: 1.0}, signal=signal, **{"lr_max": 0.5, **settings})
    torch.manual_seed(seed)
    memory = MNM(DIM, [level], hidden=HIDDEN, width=WIDTH, heads=heads, layers=layers).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def plain(memory: MNM, x: Tensor) -> dict[str, Tensor]:
    """The equations for one sequence, head by head and layer by layer; the gradient of MNM-g by autograd."""
    level, heads, width = memory.level, memory.heads, memory.width

    def f(weights, key):
        outputs = [key]
        for weight in weights[:-1]:
            outputs.append(torch.tanh(outputs[-1] @ weight))
        return [*outputs, outputs[-1] @ weights[-1]]

    def loss(weights, keys, values):
        """Mean over heads."""
        of_head = [
            sum(c * objective(f(weights, keys[i])[-1], values[i]) for objective, c in level.objectives.items())
            for i in range(heads)
        ]
        return sum(of_head) / heads

    weights, found = list(memory.init), []
    h = c = x.new_zeros(memory.hidden)
    r = x.new_zeros(width)
    w_hh, w_rh = memory.recurrent.weight.split([memory.hidden, width], 1)
    for x_t in x:
        gates = memory.input.weight @ x_t + memory.input.bias + w_hh @ h + w_rh @ r
        i, keep, g, o = gates.chunk(4)
        c = torch.sigmoid(keep) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        vectors = torch.tanh(memory.interface.weight @ h + memory.interface.bias).split(width)
        k_w, k_r, v_w = vectors[:heads], vectors[heads : 2 * heads], vectors[2 * heads : 3 * heads]
        eta = level.lr
        if memory.rate is not None:
            eta = level.lr_max * torch.sigmoid(memory.rate.weight[0] @ vectors[3 * heads] + memory.rate.bias[0])
        here = [weight.clone() for weight in weights]  # keys too depend on the weights, through r: not on these
        before = loss(here, k_w, v_w)
        if level.signal == "backprop":
            steps = torch.autograd.grad(before, here, create_graph=True)
        else:
            steps = [torch.zeros_like(weight) for weight in weights]
            for head in range(heads):
                z = f(weights, k_w[head])
                targets = (memory.targets.weight @ v_w[head] + memory.targets.bias).split(width)
                for layer in range(memory.layers):
                    delta = z[layer + 1] - targets[layer]
                    steps[layer] = steps[layer] + torch.outer(z[layer], delta) / heads
        weights = [weight - eta * step for weight, step in zip(weights, steps, strict=True)]
        r = sum(f(weights, key)[-1] for key in k_r) / heads
        y = memory.output.weight @ torch.cat([h, r]) + memory.output.bias
        norm = sum(value.norm() for value in v_w) / heads
        found.append((y, before, loss(weights, k_w, v_w), norm))
    y, surprise, reconstruction, norm = (torch.stack(column) for column in zip(*found, strict=True))
    aux = {"aux/surprise": surprise, "aux/reconstruction": reconstruction, "aux/value_norm": norm}
    state = {"state/hidden": h, "state/cell": c, "state/read": r}
    moved = [weight - init for weight, init in zip(weights, memory.init, strict=True)]
    delta = {f"state/levels/write/delta/{layer}": move for layer, move in enumerate(moved)}
    return {"y": y, **aux, **state, **delta}


def by_hand(memory: MNM, x: Tensor) -> dict[str, Tensor]:
    """`plain` for each row of a batch."""
    rows = [plain(memory, row) for row in x]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def slopes(outputs: dict[str, Tensor], of: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """The gradient of a scalar in which every output counts, each number in its own way."""
    generator = torch.Generator().manual_seed(7)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    total = sum((draw(outputs[name].shape) * outputs[name]).sum() for name in sorted(outputs))
    return list(torch.autograd.grad(total, of, create_graph=create_graph, allow_unused=True, materialize_grads=True))


def delta(state) -> Tensor:
    """How far the first layer's weights are from their initial ones."""
    return state["levels"]["write"]["delta"]["0"]


CASES = {
    "heads-2-layers-3": {},
    "heads-1-layers-1": {"heads": 1, "layers": 1},
    "heads-3-layers-2-constant-rate": {"heads": 3, "layers": 2, "lr": 0.4},
    "cosine": {"objectives": {cosine: 1.0}},
    "two-objectives": {"objectives": {mse: 0.5, cosine: 2.0}},
    "weighted": {"objectives": {mse: 2.0}},
}


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("case", CASES)
def test_values_state_and_outer_gradients_are_the_papers(signal, case):
    memory = memory_of(signal, **CASES[case])
    x = torch.randn(3, TIME, DIM, dtype=torch.float64, requires_grad=True)
    found, expected = tensors(memory(x)), by_hand(memory, x)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12, msg=name)
    of = [x, *memory.parameters()]
    for one, other in zip(slopes(found, of), slopes(expected, of), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_gradient_of_the_outer_gradient_is_that_of_the_equations(signal):
    """An inner level that moves slow weights through the memory needs it."""
    memory = memory_of(signal)
    x = torch.randn(2, 4, DIM, dtype=torch.float64, requires_grad=True)
    of = [x, *memory.parameters()]
    twice = []
    for outputs in (tensors(memory(x)), by_hand(memory, x)):
        first = {str(i): slope for i, slope in enumerate(slopes(outputs, of, create_graph=True))}
        twice.append(slopes(first, of))
    for one, other in zip(*twice, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_written_out_gradient_is_autograds_also_where_nothing_is_written(signal, monkeypatch):
    memory = memory_of(signal)
    x = torch.randn(3, TIME, DIM, dtype=torch.float64, requires_grad=True)
    of, found = [x, *memory.parameters()], []
    memory.writing = False
    for run in (mnm_gradient.run, mnm_gradient.plain):
        monkeypatch.setattr("metamem.memory.mnm.run", run)
        found.append(slopes(tensors(memory(x)), of))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert found[0][0].abs().amax(-1).gt(0).all()


def test_a_second_backward_gives_the_first_ones_gradient():
    memory = memory_of()
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    total = memory(x).y.square().sum()
    first, second = (torch.autograd.grad(total, list(memory.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_torch_func_differentiates_it():
    memory = memory_of()
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    parameters = dict(memory.named_parameters())

    def total(parameters):
        return torch.func.functional_call(memory, parameters, (x,)).y.square().sum()

    found = torch.func.grad(total)(parameters)
    expected = torch.autograd.grad(total(parameters), list(parameters.values()))
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_backprop_write_of_a_small_rate_lowers_what_it_is_written_for():
    memory = memory_of(lr_max=0.02)
    aux = memory(torch.randn(64, 1, DIM, dtype=torch.float64)).aux
    assert (aux["reconstruction"] < aux["surprise"]).all()


@pytest.mark.parametrize("signal", SIGNALS)
def test_reading_moves_the_controller_and_writes_nothing(signal):
    memory = memory_of(signal)
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    state = memory(x).state
    y, after = memory.read(x, state)
    memory.writing = False
    quiet = memory(x, state)
    assert torch.equal(quiet.y, y) and quiet.aux == {}
    assert after["levels"] is state["levels"]
    assert not torch.allclose(after["hidden"], state["hidden"])
    memory.writing = True
    written, out = memory.write(x, state), memory(x, state)
    assert torch.equal(delta(written), delta(out.state)) and not torch.equal(delta(written), delta(state))
    assert not torch.allclose(memory(x, state).y, y)


def test_memories_of_a_batch_are_apart_and_a_state_of_another_batch_is_refused():
    memory = memory_of()
    x = torch.randn(3, TIME, DIM, dtype=torch.float64)
    weights = delta(memory(x).state)
    assert weights.shape == (3, WIDTH, WIDTH) and not torch.allclose(weights[0], weights[1])
    with pytest.raises(ValueError, match="the state has 3 rows, the input 2"):
        memory(x[:2], memory(x).state)


def level(**settings) -> TokenLevel:
    return TokenLevel("write", {mse: 1.0}, **settings)


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        ([], "name one token level for it, not none$"),
        ([level(), dataclasses.replace(level(), name="slow")], "not write, slow$"),
        ([level(signal="hebbian")], "'write'.*'backprop'.*'predicted_targets'.*not 'hebbian'.*fast_weights"),
        ([level(period=4)], "'write'.*has no period 4; leave it at 1$"),
        ([level(momentum="learned")], "has no momentum 'learned'; leave it at 0.0$"),
        ([level(forget=0.1)], "has no forget 0.1; leave it at 0.0$"),
        ([level(reduction="mean")], "has no reduction 'mean'; leave it at 'sum'$"),
    ],
    ids=["no level", "two levels", "hebbian", "period", "momentum", "forget", "reduction"],
)
def test_a_level_that_it_does_not_have_is_refused_with_the_nearest_that_it_has(levels, told):
    with pytest.raises(ValueError, match=told):
        MNM(DIM, levels)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match=r"must be at least 1, not 5, 5, 5, 0, 3$"):
        MNM(DIM, [level()], heads=0)


def test_keys_start_as_different_maps_or_as_the_same_and_as_large_as_asked():
    memories = {}
    for start in ("apart", "alike"):
        torch.manual_seed(0)
        memories[start] = MNM(DIM, [level(lr=0.3)], width=WIDTH, heads=2, initial_keys=start, initial_gain=3.0).double()
    weights = {start: memory.interface.weight.split(2 * WIDTH) for start, memory in memories.items()}
    assert torch.equal(weights["alike"][0], weights["alike"][1])
    assert not torch.allclose(weights["apart"][0], weights["apart"][1])
    assert torch.equal(weights["alike"][0], weights["apart"][0]) and torch.equal(
        weights["alike"][2], weights["apart"][2]
    )
    bound = 3 * DIM**-0.5  # of torch.nn.Linear's weights, times the gain
    assert 0.8 * bound < weights["apart"][0].abs().max() <= bound


def test_a_start_at_zero_is_refused():
    with pytest.raises(ValueError, match=r"initial_gain must be above 0, not 0.0$"):
        MNM(DIM, [level()], initial_gain=0.0)


CONFIG = """
name: tiny
task: {name: none}
network:
  modules:
    embed: {kind: embedding, size: 7, dim: 6}
    memory: {kind: mnm, dim: 6, hidden: 8, width: 4, heads: 2, layers: 2}
    head: {kind: linear, dim_in: 6, dim_out: 7}
  connections: [{from: in, to: embed}, {from: embed, to: memory}, {from: memory, to: head}, {from: head, to: out}]
hierarchy:
  groups:
    memory: {match: "memory.init.*", scope: sample}
    all: {match: "**"}
  levels:
    write: {clock: token, objective: {losses.recall.mse: 1.0}, groups: [memory],
            rule: {signal: predicted_targets, lr_max: 0.25}}
    task: {clock: step, objective: {losses.outer.next_token: 1.0}, groups: [all], optimizer: {name: sgd, lr: 0.1}}
"""


def test_a_config_builds_it_with_the_level_that_addresses_its_initial_weights():
    model = build(config_of(CONFIG))
    assert isinstance(model, Network) and isinstance(model.memory, MNM)
    assert (model.memory.level.signal, model.memory.level.lr_max) == ("predicted_targets", 0.25)
    tokens = torch.randint(7, (2, TIME))
    before = model(tokens)
    assert set(before.aux) == {"memory.surprise", "memory.reconstruction", "memory.value_norm"}
    with writing(model, False):
        assert model(tokens).aux == {}
    assert model(tokens).aux.keys() == before.aux.keys()


def test_a_config_without_a_level_for_it_and_one_with_a_level_that_it_has_not_are_refused():
    with pytest.raises(ValueError, match=r"network.modules.memory: no token level names .* memory.init.\*"):
        build(config_of(CONFIG.replace("memory.init.*", "head.*")))
    with pytest.raises(ValueError, match=r"network.modules.memory: level 'write': .* no forget 0.5"):
        build(config_of(CONFIG.replace("lr_max: 0.25", "forget: 0.5")))
