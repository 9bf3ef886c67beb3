"""Networks from a config: graphs that meet, states and weights by path, token levels where they belong."""

import itertools
import re

import pytest
import torch
from small_models import (
    GROUPS,
    STEP_LEVEL,
    config_of,
    recurrent,
    shaken,
    small_quickstart,
    streaming_law,
    tiny,
)

from metamem import ConfigError, build
from metamem.network import Gate, Network
from metamem.state import flatten

HIERARCHY = GROUPS % "" + STEP_LEVEL


def graph(modules, connections, hierarchy=HIERARCHY, dims="dim: 6"):
    """The config of a graph after an embedding of 6 features, named `e`."""
    lines = [
        f"    {name}: {options}" for name, options in {"e": "{kind: embedding, size: 7, dim: 6}", **modules}.items()
    ]
    edges = ["    - {from: in, to: e}", *(f"    - {{{edge}}}" for edge in connections)]
    text = ["name: graph", "task: {name: none}", "network:", "  modules:", *lines, "  connections:", *edges]
    return config_of("\n".join(text) + "\n" + hierarchy)


def refused(config):
    with pytest.raises(ConfigError) as error:
        build(config)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


LINEAR = "{kind: linear, dim_in: 6, dim_out: 6}"
TOKENS = torch.tensor([[0, 3, 6, 2], [1, 1, 5, 4]])


# What a graph computes


def test_modules_are_run_along_their_connections_in_whatever_order_these_are_written(float64):
    edges = ["from: [b, c], to: out, by: sum", "from: [e, a], to: c, by: concat", "from: a, to: b", "from: e, to: a"]
    model = build(graph({"a": LINEAR, "b": LINEAR, "c": "{kind: linear, dim_in: 12, dim_out: 6}"}, edges))
    e = model.e(TOKENS)
    expected = model.b(model.a(e)) + model.c(torch.cat([e, model.a(e)], -1))
    torch.testing.assert_close(model(TOKENS).y, expected)
    assert model.dim_out == 6


def test_a_junction_passes_on_what_was_joined_there(float64):
    edges = ["from: [e, e], to: twice, by: sum", "from: [twice, e], to: both, by: concat", "from: both, to: out"]
    model = build(graph({}, edges))
    e = model.e(TOKENS)
    assert torch.equal(model(TOKENS).y, torch.cat([2 * e, e], -1))
    assert model.dim_out == 12


def test_a_gate_weighs_two_sources_by_what_is_in_them(float64):
    model = build(
        graph({"a": LINEAR, "b": LINEAR}, ["from: e, to: a", "from: e, to: b", "from: [a, b], to: out, by: gate"])
    )
    assert [name for name, _ in model.named_parameters() if "gate" in name] == [
        "out_gate.project.weight",
        "out_gate.project.bias",
    ]
    a, b = model.a(model.e(TOKENS)), model.b(model.e(TOKENS))
    torch.testing.assert_close(model(TOKENS).y, (a + b) / 2)  # open halfway before it has learned
    with torch.no_grad():
        for parameter in model.out_gate.parameters():
            parameter.copy_(torch.randn_like(parameter))
    project = model.out_gate.project
    g = (torch.cat([a, b], -1) @ project.weight.T + project.bias).sigmoid()
    torch.testing.assert_close(model(TOKENS).y, g * a + (1 - g) * b)


def test_the_same_seed_builds_the_same_weights():
    first, same, other = (dict(build(tiny("", f"seed={seed}")).named_parameters()) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


# Nested graphs

NESTED = "{kind: network, %smodules: {a: %s, m: {kind: mlp, dim: 6}}, connections: %s}"
SHORT = "{kind: network, %smodules: {m: %s}, connections: [{from: in, to: m}, {from: m, to: out}]}"
INNER_EDGES = "[{from: in, to: a}, {from: a, to: m}, {from: [in, m], to: out, by: sum}]"


def test_a_nested_graph_has_its_name_before_its_parameters(float64):
    model = build(graph({"body": NESTED % ("", LINEAR, INNER_EDGES)}, ["from: e, to: body", "from: body, to: out"]))
    names = [name for name, _ in model.named_parameters()]
    assert names == ["e.weight", "body.a.weight", "body.m.up.weight", "body.m.down.weight"]
    e, body = model.e(TOKENS), model.body
    torch.testing.assert_close(model(TOKENS).y, e + body.m(body.a(e)))


def test_a_repeated_graph_numbers_its_copies_and_they_differ(float64):
    model = build(
        graph({"body": NESTED % ("repeat: 2, ", LINEAR, INNER_EDGES)}, ["from: e, to: body", "from: body, to: out"])
    )
    names = [name for name, _ in model.named_parameters()]
    assert names[1:] == [f"body.{i}.{part}.weight" for i in (0, 1) for part in ("a", "m.up", "m.down")]
    first, second = model.body.get_submodule("0"), model.body.get_submodule("1")
    assert not torch.equal(first.a.weight, second.a.weight)
    x = model.e(TOKENS)
    for block in (first, second):
        x = x + block.m(block.a(x))
    torch.testing.assert_close(model(TOKENS).y, x)


def test_a_graph_repeated_once_is_numbered_too():
    model = build(
        graph({"body": NESTED % ("repeat: 1, ", LINEAR, INNER_EDGES)}, ["from: e, to: body", "from: body, to: out"])
    )
    assert "body.0.a.weight" in dict(model.named_parameters())


# Graphs that are refused


def test_a_cycle_is_printed():
    edges = ["from: [e, c], to: a, by: sum", "from: a, to: b", "from: b, to: c", "from: c, to: out"]
    text = refused(graph({"a": LINEAR, "b": LINEAR, "c": LINEAR}, edges))
    assert "the connections form a cycle: " in text
    cycle = text.split("cycle: ")[1].split(" -> ")
    assert cycle[0] == cycle[-1] and sorted(cycle[1:]) == ["a", "b", "c"]
    assert set(itertools.pairwise(cycle)) == {("a", "b"), ("b", "c"), ("c", "a")}


def test_a_module_that_feeds_itself_is_a_cycle():
    assert "cycle: a -> a" in refused(graph({"a": LINEAR}, ["from: [e, a], to: a, by: sum", "from: a, to: out"]))


@pytest.mark.parametrize(
    ("modules", "edges", "message"),
    [
        (
            {"a": "{kind: linear, dim_in: 5, dim_out: 6}"},
            ["from: e, to: a", "from: a, to: out"],
            "network.connections[1] (e -> a).to: e (6) has dim 6, and 'a' takes 5",
        ),
        (
            {"a": LINEAR},
            ["from: [e, e], to: a, by: concat", "from: a, to: out"],
            "network.connections[1] (e, e -> a).to: e (6) + e (6) has dim 12, and 'a' takes 6",
        ),
        (
            {"a": "{kind: linear, dim_in: 6, dim_out: 5}"},
            ["from: e, to: a", "from: [e, a], to: out, by: sum"],
            "network.connections[2] (e, a -> out).from: cannot sum e (6) + a (5): the dims differ",
        ),
        (
            {"a": "{kind: linear, dim_in: 6, dim_out: 5}"},
            ["from: e, to: a", "from: [e, a], to: out, by: gate"],
            "network.connections[2] (e, a -> out).from: cannot gate e (6) + a (5): the dims differ",
        ),
        (
            {"a": LINEAR},
            ["from: e, to: a", "from: [e, a, e], to: out, by: gate"],
            "network.connections[2] (e, a, e -> out).by: gate takes two sources of a known dim, not e (6) + a (6) + e",
        ),
        (
            {"body": NESTED % ("", "{kind: linear, dim_in: 5, dim_out: 6}", INNER_EDGES)},
            ["from: e, to: body", "from: body, to: out"],
            "network.modules.body.connections[2] (in, m -> out).from: cannot sum in (5) + m (6): the dims differ",
        ),
        (
            {"body": SHORT % ("", "{kind: mlp, dim: 5}")},
            ["from: e, to: body", "from: body, to: out"],
            "network.connections[1] (e -> body).to: e (6) has dim 6, and 'body' takes 5",
        ),
        (
            {"body": SHORT % ("repeat: 2, ", "{kind: linear, dim_in: 6, dim_out: 5}")},
            ["from: e, to: body", "from: body, to: out"],
            "network.modules.body.repeat: a copy gives dim 5, and the next takes 6",
        ),
        (
            {"a": "{kind: linaer, dim_in: 6, dim_out: 6}"},
            ["from: e, to: a", "from: a, to: out"],
            "network.modules.a.kind: there is no module kind 'linaer'; did you mean 'linear'?",
        ),
        (
            {"a": "{kind: linear, dim_in: 6, dim_uot: 6}"},
            ["from: e, to: a", "from: a, to: out"],
            "network.modules.a.dim_uot: module kind 'linear' has no such option; did you mean 'dim_out'?",
        ),
        (
            {"a": "{kind: attention, dim: 6, heads: 2}"},
            ["from: e, to: a", "from: a, to: out"],
            "network.modules.a: dim 6 over 2 heads",
        ),
        (
            {"body": NESTED % ("repeat: 0, ", LINEAR, INNER_EDGES)},
            ["from: e, to: body", "from: body, to: out"],
            "network.modules.body.repeat: must be at least 1 and at most 1000, not 0",
        ),
        *(
            ({name: LINEAR}, [f"from: e, to: {name}", f"from: {name}, to: out"], f"{name!r} is a name that ")
            for name in ("forward", "training", "steps", "names", "dim_in", "inner_rates")
        ),
        (
            {"mixed_gate": LINEAR},
            ["from: e, to: mixed_gate", "from: [e, mixed_gate], to: mixed, by: gate", "from: mixed, to: out"],
            "network.connections[2] (e, mixed_gate -> mixed).to: the gate of 'mixed' is called 'mixed_gate', and ",
        ),
    ],
)
def test_a_graph_that_does_not_meet_is_one_line_with_its_place(modules, edges, message):
    text = refused(graph(modules, edges))
    assert message in text and "small.yaml:" in text


def test_the_dim_of_in_is_not_taken_for_nothing_where_it_is_not_known(float64):
    wide = "{kind: network, modules: {a: {kind: linear, dim_in: 12, dim_out: 6}}, connections: %s}"
    edges = "[{from: [in, %s], to: wide, by: concat}, {from: wide, to: a}, {from: a, to: out}]"
    twice = wide % (edges % "in")
    beside = (wide % (edges % "m").replace("[{", "[{from: in, to: m}, {", 1)).replace(
        "{a:", "{m: {kind: mlp, dim: 6}, a:"
    )
    for body in (twice, beside):
        model = build(graph({"body": body}, ["from: e, to: body", "from: body, to: out"]))
        assert model(TOKENS).y.shape == (2, 4, 6)


# State, streams, what is measured


@pytest.fixture(scope="module")
def quickstart():
    """The quickstart's model, small, in float64 with random weights."""
    return shaken(small_quickstart("vars.blocks=2")).double()


def test_the_quickstart_model_keeps_the_streaming_law(quickstart):
    streaming_law(quickstart, torch.randint(256, (3, 11)), examples=5)


def test_the_quickstart_model_is_causal(quickstart):
    tokens = torch.randint(256, (1, 10))
    changed = tokens.repeat(10, 1)
    changed[range(10), range(10)] += 1
    changed %= 256
    with torch.no_grad():
        before, after = quickstart(tokens).y, quickstart(changed).y
    for t in range(10):
        torch.testing.assert_close(after[t, :t], before[0, :t], rtol=0, atol=1e-13)
        assert (after[t, t:] - before[0, t:]).abs().amax(-1).gt(1e-9).all()  # through the memory, for ever


def test_rows_of_a_batch_do_not_see_each_other(quickstart):
    tokens = torch.randint(256, (3, 9))
    with torch.no_grad():
        whole = quickstart(tokens).y
        for row in range(3):
            torch.testing.assert_close(quickstart(tokens[row : row + 1]).y[0], whole[row], rtol=1e-10, atol=1e-12)


def test_states_and_measures_are_found_by_the_path_of_their_module(quickstart):
    out = quickstart(torch.randint(256, (2, 5)))
    assert list(out.aux) == ["blocks.0.memory.surprise", "blocks.1.memory.surprise"]
    assert all(value.shape == (2, 5) for value in out.aux.values())
    assert set(out.state) == {"blocks"} and set(out.state["blocks"]) == {"0", "1"}
    assert set(out.state["blocks"]["1"]) == {"convolution", "attention", "memory"}
    assert list(flatten(out.state)) == list(flatten(quickstart.init_state(2)))


def test_a_model_without_a_stateful_part_carries_nothing():
    model = build(tiny())
    out = model(TOKENS)
    assert out.state == {} == model.init_state(2) and out.aux == {}
    assert model.reset_state({}, torch.tensor([True, False])) == {}


def test_a_state_goes_in_and_is_not_changed(quickstart):
    tokens = torch.randint(256, (2, 7))
    with torch.no_grad():
        state = quickstart(tokens).state
        before = {key: value.clone() for key, value in flatten(state).items()}
        quickstart(tokens, state)
        quickstart.reset_state(state, torch.tensor([True, False]))
    assert all(torch.equal(value, before[key]) for key, value in flatten(state).items())


# Token levels

TWO_MEMORIES = """
name: two
task: {name: none}
network:
  modules:
    e: {kind: embedding, size: 7, dim: 6}
    early: {kind: fast_weights, dim: 6, heads: 1, chunk: 4}
    late: {kind: fast_weights, dim: 6, heads: 1, chunk: 4}
  connections: [{from: in, to: e}, {from: e, to: early}, {from: early, to: late}, {from: late, to: out}]
hierarchy:
  groups:
    all: {match: "**"}
    early: {match: "early.init.**", scope: sample}
    late: {match: "late.init.*", scope: sample}
    memories: {match: ["early.init.*", "late.**"], scope: sample}
    writers: {match: "late.writer.**", scope: sample}
  levels:
    - {name: quick, clock: token, objective: {losses.recall.mse: 1.0}, rule: {lr: learned}, groups: %s}
    - {name: slow, clock: token, period: 8, objective: {losses.recall.cosine: 2.0}, rule: {lr: 0.1}, groups: %s}
    - {name: task, clock: step, objective: {losses.outer.next_token: 1.0},
       optimizer: {name: sgd, lr: 0.1}, groups: [all]}
"""


@pytest.mark.parametrize(
    ("quick", "slow", "early", "late"),
    [
        ("[early]", "[late]", ["quick"], ["slow"]),
        ("[memories]", "[memories]", ["quick", "slow"], ["quick", "slow"]),
        ("[early, late]", "[late]", ["quick"], ["quick", "slow"]),
    ],
)
def test_a_memory_has_the_levels_whose_groups_match_its_initial_weights(quick, slow, early, late, float64):
    model = build(config_of(TWO_MEMORIES % (quick, slow)))
    assert [level.name for level in model.early.levels] == early
    assert [level.name for level in model.late.levels] == late
    state = model(TOKENS).state
    assert list(state["early"]["levels"]) == early and list(state["late"]["levels"]) == late
    shaken_model = shaken(config_of(TWO_MEMORIES % (quick, slow)))
    streaming_law(shaken_model, torch.randint(7, (2, 17)), examples=3)


def test_a_levels_settings_reach_the_memory():
    level = build(config_of(TWO_MEMORIES % ("[early, late]", "[late]"))).late.levels[1]
    assert (level.period, level.lr, list(level.objectives.values())) == (8, 0.1, [2.0])
    assert [objective.__name__ for objective in level.objectives] == ["cosine"]


def test_a_memory_that_no_level_addresses_is_refused():
    text = refused(config_of(TWO_MEMORIES % ("[early]", "[early]")))
    assert "network.modules.late: no token level names the weights of this memory, late.init.*; the globs" in text
    assert text.endswith("are early.init.**")


def test_a_token_level_that_no_memory_has_is_refused():
    text = refused(config_of(TWO_MEMORIES % ("[early, late]", "[writers]")))
    assert "hierarchy.levels[1] (slow).groups: no memory's weights are in the groups of the token level 'slow'" in text


def test_a_period_that_no_chunk_divides_is_refused():
    text = refused(config_of(TWO_MEMORIES % ("[early, late]", "[late]"), "hierarchy.levels.slow.period=6"))
    assert "network.modules.late: level 'slow': period 6 and chunk 4 do not divide one another" in text


def test_levels_reach_memories_in_nested_graphs_by_their_full_path():
    model = build(small_quickstart("vars.blocks=2", "hierarchy.groups.memory.match=blocks.*.memory.init.**"))
    assert [level.name for level in model.blocks.get_submodule("1").memory.levels] == ["surprise"]
    text = refused(small_quickstart("vars.blocks=2", "hierarchy.groups.memory.match=blocks.0.memory.init.**"))
    assert "network.modules.blocks.modules.memory: no token level names the weights of this memory, blocks.1." in text


def test_a_network_can_be_built_in_python(float64):
    config = tiny()
    modules = {"embed": build(config).embed, "norm": build(config).norm}
    steps = [step for step in config.network.connections if step.to == "embed"]
    late = type(steps[0])(["embed"], "norm"), type(steps[0])(["norm"], "out")
    network = Network(modules, [*steps, *late])
    torch.testing.assert_close(network(TOKENS).y, modules["norm"](modules["embed"](TOKENS)))


def test_a_gate_is_a_gated_mean(float64):
    gate, a, b = Gate(3), torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    assert torch.equal(gate(a, b), gate(b, a))
    torch.testing.assert_close(gate(a, b), (a + b) / 2)


def test_a_sequence_of_attention_and_memory_keeps_the_streaming_law(float64):
    model = shaken(recurrent())
    streaming_law(model, torch.randint(7, (3, 11)), examples=5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["vars.memory.signal_at=chunk", "vars.memory.chunk=24"],
            "training.length: a sequence of 16 tokens is shorter than the chunk of blocks.0.memory, 24",
        ),
        (
            ["hierarchy.levels.surprise.period=64"],
            "training.length: a sequence of 16 tokens is shorter than the period of level 'surprise', 64",
        ),
    ],
    ids=["chunk", "period"],
)
def test_a_training_sequence_that_ends_before_a_chunk_or_period_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(small_quickstart("training.length=16", *overrides))
