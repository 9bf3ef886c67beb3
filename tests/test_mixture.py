"""`by: moe`: a mixture of what several modules of a network make, soft or top-k, to any depth."""

import json

import pytest
import torch
from config_example import error_of
from small_models import close, config_of, named, shaken, streaming_law

from losses.outer import next_token, router_balance
from metamem import OuterLevels, build, train
from metamem.routing import Mixture

pytestmark = pytest.mark.usefixtures("float64")

HIERARCHY = """
hierarchy:
  groups:
    all: {match: "**"}
    memory: {match: "**.memory.init.**", scope: sample}
  levels:
    - {name: surprise, clock: token, objective: {losses.recall.mse: 1.0}, rule: {lr_max: 0.5}, groups: [memory]}
    - {name: task, clock: step, objective: {losses.outer.next_token: 1.0, losses.outer.router_balance: 0.1},
       optimizer: {name: sgd, lr: 0.1}, groups: [all]}
"""
EXPERTS = """
name: experts
task: {name: none}
network:
  modules:
    embed: {kind: embedding, size: 7, dim: 6}
    one: {kind: linear, dim_in: 6, dim_out: 6}
    two:
      kind: network
      modules:
        memory: {kind: fast_weights, dim: 6, heads: 2, signal_at: token, chunk: 4}
        near: {kind: short_convolution, dim: 6}
      connections:
        - {from: in, to: memory}
        - {from: in, to: near}
        - {from: [memory, near, in], to: out, by: moe, input: in}
    head: {kind: linear, dim_in: 6, dim_out: 7}
  connections:
    - {from: in, to: embed}
    - {from: embed, to: one}
    - {from: embed, to: two}
    - {from: [one, two], to: mixed, by: moe, input: embed, k: 1}
    - {from: mixed, to: head}
    - {from: head, to: out}
"""
BY = "network.connections.one, two -> mixed"


def experts(*overrides, text=EXPERTS):
    return config_of(text + HIERARCHY, *overrides)


@pytest.mark.parametrize("k", [None, 1, 2])
def test_a_mixture_is_its_formula(k):
    """Σ m_i y_i, one token at a time; of the top k the weights of the softmax, and its gradient."""
    mixture = Mixture(4, ["a", "b", "c"], k)
    x, sources = torch.randn(2, 5, 4, requires_grad=True), torch.randn(3, 2, 5, 6, requires_grad=True)
    y, aux = mixture(x, list(sources))
    shares = torch.softmax(x @ mixture.weight.T + mixture.bias, -1)
    expected, surrogate = torch.zeros(2, 5, 6), torch.zeros(())
    (slope,) = torch.autograd.grad((y * torch.arange(6.0)).sum(), mixture.weight, retain_graph=True)
    for row in range(2):
        for t in range(5):
            ranked = sorted(range(3), key=lambda i: -shares[row, t, i].item())[: k or 3]
            expected[row, t] = sum(shares[row, t, i] * sources[i, row, t] for i in ranked)
            for i in range(3):
                surrogate = surrogate + shares[row, t, i] * (sources[i, row, t].detach() * torch.arange(6.0)).sum()
                opened = float(i in ranked)
                assert aux["load." + "abc"[i]][row, t].item() == opened
                torch.testing.assert_close(aux["gates"][row, t, 0, i], opened * shares[row, t, i])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(surrogate, mixture.weight, retain_graph=True)[0])
    torch.testing.assert_close(aux["entropy"], -(shares * shares.log()).sum(-1))


def test_without_an_input_a_mixture_is_gated_by_its_sources():
    text = EXPERTS.replace("by: moe, input: embed, k: 1", "by: moe")
    network = shaken(experts(text=text))
    assert network.mixed_router.weight.shape == (2, 12)
    tokens = torch.randint(7, (2, 5))
    a = network.embed(tokens)
    one, two = network.one(a), network.two(a).y
    gates = torch.softmax(torch.cat([one, two], -1) @ network.mixed_router.weight.T + network.mixed_router.bias, -1)
    torch.testing.assert_close(network(tokens).y, network.head(gates[..., :1] * one + gates[..., 1:] * two))


def test_mixtures_nest():
    """A hierarchy of experts: the outer one mixes what the inner one mixed, with states and measures of their own."""
    network = shaken(experts())
    tokens = torch.randint(7, (2, 9))
    y, state, aux = network(tokens)
    a = network.embed(tokens)
    inner = network.two
    p = torch.softmax(a @ inner.out_router.weight.T + inner.out_router.bias, -1).unbind(-1)
    parts = [inner.memory(a).y, inner.near(a)[0], a]
    two = sum(m.unsqueeze(-1) * part for m, part in zip(p, parts, strict=True))
    q = torch.softmax(a @ network.mixed_router.weight.T + network.mixed_router.bias, -1)
    q = q * (q == q.amax(-1, keepdim=True))
    torch.testing.assert_close(y, network.head(q[..., :1] * network.one(a) + q[..., 1:] * two))
    assert set(state["two"]) == {"memory", "near"}
    for name, measured in (("mixed_router", q), ("two.out_router", torch.stack(p, -1))):
        torch.testing.assert_close(aux[f"{name}.gates"], measured.unsqueeze(2))
        assert aux[f"{name}.entropy"].shape == (2, 9)
    assert aux["two.out_router.gates.near"].shape == (2, 9, 1)


def test_a_mixture_streams():
    """Any split, and rows that are reset: modules that are closed for a token have read it all the same."""
    network = shaken(experts())
    streaming_law(network, torch.randint(7, (2, 11)), examples=5)


def test_a_closed_gate_learns_what_its_module_would_have_made():
    """Of a token for which `one` is closed, another `one` changes no output, but where the gates go from there."""
    network = shaken(experts())
    tokens = torch.randint(7, (4, 12))
    closed = network(tokens).aux["mixed_router.gates"][:, :, 0, 0] == 0
    assert 0 < closed.double().mean() < 1
    found = []
    for scale in (1.0, 3.0):
        with torch.no_grad():
            network.one.weight.mul_(scale)
        y = network(tokens).y[closed]
        found.append((y, torch.autograd.grad(y.sum(), network.mixed_router.bias, retain_graph=True)[0]))
        (nothing,) = torch.autograd.grad(y.sum(), network.one.weight, allow_unused=True, materialize_grads=True)
        assert nothing.eq(0).all()
    torch.testing.assert_close(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).abs().max() > 1e-6


def test_the_balance_of_mixtures_is_in_the_loss_and_the_logs(tmp_path):
    class Task:
        def sample(self, generator, batch, length):
            return torch.randint(7, (2, batch, length), generator=generator).unbind()

    config = experts("training={steps: 2, batch: 2, length: 8, warmup: 0, log_every: 1}")
    model = shaken(config)
    inputs, targets = torch.randint(7, (2, 2, 8))
    y, _, aux = model(inputs)
    values = OuterLevels(config, model).backward(lambda objectives: next_token(y, targets).mean(), aux)
    balance = [router_balance(aux[f"{name}.gates"]) for name in ("mixed_router", "two.out_router")]
    expected = next_token(y, targets).mean() + 0.1 * sum(balance) / 2
    assert values == {"task": pytest.approx(expected.item())}
    folder = train(config, tmp_path, task=Task()).folder
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    shares = [row[f"two.out_router.gates.{name}.0"] for name in ("memory", "near", "in")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert row["mixed_router.load.one"] + row["mixed_router.load.two"] == pytest.approx(1)
    assert not any(key.endswith(("router.gates", "router.logits")) for key in row)


def test_the_same_seed_gives_the_same_mixture():
    one, other = build(experts()), build(experts())
    tokens = torch.randint(7, (2, 6))
    close(named(*one(tokens)[:2]), named(*other(tokens)[:2]))


REFUSED = {
    "an input of no mixture": ("by: sum, input: embed", "is for a mixture of experts: set by to moe, or input to null"),
    "k of no mixture": ("by: concat, k: 1", "is for a mixture of experts: set by to moe, or k to null"),
    "all of the sources": ("by: moe, k: 2", "2 of 2 sources are all: set k to 1, or k to null"),
    "an input that is not there": (
        "by: moe, input: embd",
        "there is no module or junction 'embd'; did you mean 'embed'?",
    ),
    "an input after it": ("by: moe, input: head", "the connections form a cycle: "),
    "an input of no dim": ("by: moe, input: in", "moe takes sources and an input of known dims"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_mixture_can_be_is_refused(case):
    settings, why = REFUSED[case]
    text = EXPERTS.replace("by: moe, input: embed, k: 1", settings)
    message = error_of(lambda: build(experts(text=text)))
    assert why in message, message


def test_a_mixture_of_one_and_a_taken_name_are_refused():
    alone = EXPERTS.replace("from: [one, two], to: mixed, by: moe, input: embed, k: 1", "from: one, to: mixed, by: moe")
    alone = alone.replace("from: mixed", "from: [mixed, two]").replace("to: head}", "to: head, by: sum}")
    assert "moe mixes two sources or more" in error_of(lambda: experts(text=alone))
    taken = EXPERTS.replace("one:", "mixed_router:").replace("to: one", "to: mixed_router")
    taken = taken.replace("[one, two]", "[mixed_router, two]")
    assert "the router of 'mixed' is called 'mixed_router', and so is a module" in error_of(
        lambda: build(experts(text=taken))
    )
    other = EXPERTS.replace("one: {kind: linear, dim_in: 6, dim_out: 6}", "one: {kind: linear, dim_in: 6, dim_out: 5}")
    assert "cannot moe one (5) + two (6): the dims differ" in error_of(lambda: build(experts(text=other)))
