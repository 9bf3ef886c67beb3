"""The fast-weight memory's own promises: its state, its gates, its positions, and what its errors say."""

import math

import pytest
import torch
from conformance import close, tensors

from losses.recall import cosine, mse
from metamem.memory.fast_weights import FastWeights
from metamem.memory.level import TokenLevel
from metamem.memory.networks import Network
from metamem.state import flatten, load_state, save_state

pytestmark = pytest.mark.usefixtures("float64")

DIM = 8
LEARNED = {"momentum": "learned", "forget": "learned"}


def fast(**settings):
    return TokenLevel("fast", {mse: 1.0}, **settings)


def slow(period=8, **settings):
    return TokenLevel("slow", {mse: 1.0}, period=period, **settings)


def build(levels, **settings):
    torch.manual_seed(0)
    return FastWeights(DIM, levels, **{"heads": 2, "chunk": 4, **settings})


# Errors of the constructor


def squared(pred, target):
    """Twice mse: its gradient is no pred − target."""
    return ((pred - target) ** 2).sum(-1)


@pytest.mark.parametrize(
    ("levels", "settings", "told"),
    [
        ([], {}, "at least one level with clock 'token'"),
        ([fast(), slow(period=6)], {"chunk": 4}, r"'slow'.*period 6 and chunk 4.*set period to 8$"),
        ([fast(), slow(period=3)], {"chunk": 4}, r"'slow'.*period 3 and chunk 4.*set period to 4$"),
        ([fast(), slow(period=100)], {"chunk": 64}, r"period 100 and chunk 64.*set period to 128$"),
        ([fast()], {"signal_at": "token", "hidden": [5], "chunk": 4}, "not linear.*chunk to 1.*'chunk'.*hidden"),
        (
            [TokenLevel("odd", {cosine: 1.0})],
            {"signal_at": "token"},
            r"'odd'.*losses\.recall\.cosine.*losses\.recall\.mse",
        ),
        ([TokenLevel("odd", {mse: 1.0, squared: 0.5})], {"signal_at": "token"}, r"'odd'.*squared"),
        (
            [fast(), slow(signal="hebbian", period=4)],
            {"signal_at": "token"},
            "one kind .*hebbian.*signal_at to 'chunk'",
        ),
        ([fast(signal="hebbian")], {"hidden": [5]}, "'fast'.*hebbian.*'predicted_targets', or hidden to"),
        ([fast()], {"residual_norm": True, "d_key": 3, "d_value": 4}, "d_key 3 and d_value 4 differ"),
        ([fast()], {"residual_norm": True, "signal_at": "token"}, "not linear.*residual_norm to false"),
        ([fast()], {"hidden": [5], "signal_at": "decayed", "chunk": 1}, "'decayed'.*'token' and chunk to 1, or hidden"),
        ([fast()], {"network": "swiglu", "hidden": [5, 5]}, "swiglu.*one hidden width, not 2"),
        ([fast()], {"hidden": [5], "expansion": [2.0]}, "hidden .5. and expansion .2.0. say the same"),
        ([fast(window=5)], {"signal_at": "token"}, "'fast'.*window of 5.*signal_at to 'chunk'"),
        ([slow(window=9)], {"chunk": 4}, "'slow'.*window of 9.*of the chunk, 4, not 8; set period to 4"),
        ([slow(window=4)], {"chunk": 8}, "'slow'.*window of 4.*period of 8; set window to 8, or window to 1"),
        ([fast()], {"signal_at": "token", "compile_chunk": True}, "compile_chunk .*solved for all chunks at once"),
        ([fast()], {"executor": "recurrence", "compile_chunk": True}, "compile_chunk .*token by token"),
        ([fast()], {"writes": "in_turn"}, "'in_turn'.*signal_at to 'token'"),
        ([fast(momentum=0.5)], {"writes": "in_turn", "signal_at": "token"}, "'fast'.*momentum to 0"),
        ([fast(forget=0.5)], {"writes": "in_turn", "signal_at": "token"}, "'fast'.*signal_at to 'decayed'"),
    ],
    ids=lambda value: value[:28] if isinstance(value, str) else "",
)
def test_settings_that_exclude_each_other_are_told_with_the_nearest_that_do_not(levels, settings, told):
    with pytest.raises(ValueError, match=told):
        build(levels, **settings)


@pytest.mark.parametrize(("period", "chunk"), [(1, 4), (2, 4), (4, 4), (8, 4), (4, 1), (3, 1), (64, 1)])
def test_periods_and_chunks_that_divide_one_another_are_accepted(period, chunk):
    build([fast(), slow(period=period)], chunk=chunk)


# State


@pytest.mark.parametrize("signal_at", ["chunk", "token"])
def test_the_state_has_the_keys_and_shapes_of_its_typed_dict(signal_at):
    levels = [
        fast(**LEARNED, forget_to="zero"),
        TokenLevel("plain", {mse: 1.0}),
        slow(momentum=0.5, forget=0.1),
        TokenLevel("slower", {mse: 1.0}, period=16, forget=0.1, forget_to="zero"),
    ]
    hidden = (5,) if signal_at == "chunk" else ()
    memory = build(levels, hidden=hidden, d_key=3, d_value=6, signal_at=signal_at)
    shapes = {str(i): (2, 2, *shape) for i, shape in enumerate(memory.network.shapes)}

    def layers(name):
        return {f"{name}/{layer}": shape for layer, shape in shapes.items()}

    expected = {
        "position": (2,),
        **layers("levels/fast/delta"),
        **layers("levels/fast/momentum"),
        "levels/fast/keep": (2, 2),
        **layers("levels/plain/delta"),
        **layers("levels/slow/delta"),
        **layers("levels/slow/momentum"),
        **layers("levels/slow/pending"),
        **layers("levels/slower/delta"),
        **layers("levels/slower/pending"),
        "levels/slower/keep": (2, 2),
        **(layers("anchor") if signal_at == "chunk" else {}),
    }
    for state in (memory.init_state(2), memory(torch.randn(2, 7, DIM)).state):
        assert {key: tuple(value.shape) for key, value in flatten(state).items()} == expected
        assert state["position"].dtype == torch.int64
    assert [tuple(weight.shape) for weight in memory.init] == [(2, *shape) for shape in memory.network.shapes]


def test_a_fresh_state_holds_zeros_and_reads_w_init():
    memory = build([fast(**LEARNED, forget_to="zero"), slow()], hidden=(5,))
    state = memory.init_state(3)
    for key, value in flatten(state).items():
        assert value.eq(1 if key.endswith("keep") else 0).all(), key
    x = torch.randn(3, 2, DIM)
    queries = memory.reader.query(x, x.dtype)
    recalled = memory.network.forward(queries, lambda layer, a: torch.einsum("bhtri,hio->bhtro", a, memory.init[layer]))
    torch.testing.assert_close(memory.read(x, state)[0], memory.reader(recalled.output))


def test_positions_count_tokens_row_by_row():
    memory = build([fast(), slow()])
    state = memory(torch.randn(3, 5, DIM)).state
    assert state["position"].tolist() == [5, 5, 5]
    state = memory.reset_state(state, torch.tensor([False, True, False]))
    assert state["position"].tolist() == [5, 0, 5]
    state = memory(torch.randn(3, 9, DIM), state).state
    assert state["position"].tolist() == [14, 9, 14]
    assert memory.init_state(2)["position"].tolist() == [0, 0]


def test_positions_beyond_32_bits_go_on():
    """A stream has no end: only the position modulo chunk and period matters."""
    memory = build([fast(), slow()], hidden=(5,))
    x = torch.randn(2, 11, DIM)
    state = memory(torch.randn(2, 6, DIM)).state
    late = {**state, "position": state["position"] + 8 * 2**40}
    one, other = memory(x, state), memory(x, late)
    close({**tensors(one), "state/position": tensors(one)["state/position"] + 8 * 2**40}, tensors(other))


def test_the_anchor_is_the_weights_at_the_start_of_the_chunk():
    memory = build([fast()])
    x = torch.randn(1, 8, DIM)

    def weights(state):
        return memory.init[0] + state["levels"]["fast"]["delta"]["0"]

    at_four = weights(memory(x[:, :4]).state)
    for tokens in (5, 6, 7):
        state = memory(x[:, :tokens]).state
        torch.testing.assert_close(state["anchor"]["0"], at_four)
        assert not torch.allclose(weights(state), at_four)


def test_a_slow_level_moves_at_its_boundary_only():
    memory = build([fast(), slow(period=8)])
    x = torch.randn(1, 17, DIM)
    deltas, totals = [], []
    for tokens in range(1, 18):
        level = memory(x[:, :tokens]).state["levels"]["slow"]
        deltas.append(level["delta"]["0"])
        totals.append(level["pending"]["0"].abs().sum())
    moved = [t + 1 for t in range(1, 17) if not torch.equal(deltas[t], deltas[t - 1])]
    assert moved == [8, 16]
    assert [t + 1 for t in range(17) if totals[t] == 0] == [8, 16]
    torch.testing.assert_close(
        deltas[7], memory(x[:, :7]).state["levels"]["slow"]["pending"]["0"] + _last_write(memory, x)
    )


def _last_write(memory, x):
    """What the token 7 adds to the slow level: −η k ⊗ δ, at the anchor of its chunk."""
    writes = memory.writer(x, x.dtype)
    key, value = writes.keys[:, :, 7], writes.values[:, :, 7]
    error = key @ memory(x[:, :7]).state["anchor"]["0"] - value
    return -(writes.gates["slow"].lr[:, :, 7].unsqueeze(-1) * key).mT @ error


def test_a_slow_level_is_read_from_the_token_after_its_boundary():
    """The read of the boundary token itself does not see the move; the next one does."""
    memory = build([slow(period=4, lr=0.5)])
    x = torch.randn(1, 9, DIM)
    still = build([slow(period=4, lr=0.0)])
    difference = (memory(x).y - still(x).y).abs().amax((0, 2))
    assert difference[:4].eq(0).all()
    assert difference[4:].gt(1e-6).all()


def test_a_deep_state_survives_a_file(tmp_path):
    """Layers go by number: a file lists 10 before 2."""
    memory = build([fast(lr=1e-3), slow()], hidden=(4,) * 11)
    x = torch.randn(2, 9, DIM)
    state = memory.detach_state(memory(x).state)
    save_state(state, tmp_path / "state")
    loaded, _ = load_state(tmp_path / "state")
    close(tensors(memory(x, loaded)), tensors(memory(x, state)))


def test_a_state_of_another_batch_is_refused():
    memory = build([fast()])
    for rows in (1, 3):
        with pytest.raises(ValueError, match=f"{rows} rows, the input 2"):
            memory(torch.randn(2, 5, DIM), memory.init_state(rows))


def test_switched_off_it_reads_and_writes_nothing():
    memory = build([fast(**LEARNED), slow()], hidden=(5,))
    x = torch.randn(2, 9, DIM)
    state = memory(x).state
    memory.writing = False
    y, after, aux = memory(x, state)
    assert after is state
    assert aux == {}
    torch.testing.assert_close(y, memory.read(x, state)[0])
    torch.testing.assert_close(memory(x).y, memory.read(x, memory.init_state(2))[0])


# Gates


def gates_of(level, x):
    memory = build([level])
    with torch.no_grad():
        for parameter in memory.writer.gates.parameters():
            parameter.add_(torch.randn_like(parameter))
    return memory.writer(x, x.dtype).gates[level.name]


def test_constant_gates_are_what_the_config_says():
    gates = gates_of(fast(lr=0.3, momentum=0.9, forget=0.01), torch.randn(2, 5, DIM))
    assert gates.lr.eq(0.3).all()
    torch.testing.assert_close(gates.log_momentum.exp(), torch.full((2, 2, 5), 0.9))
    torch.testing.assert_close(gates.log_keep.exp(), torch.full((2, 2, 5), 0.99))
    assert not list(build([fast(lr=0.3, momentum=0.9, forget=0.01)]).writer.gates.parameters())


def test_gates_that_a_level_has_not_are_none():
    gates = gates_of(fast(), torch.randn(2, 5, DIM))
    assert gates.log_momentum is None
    assert gates.log_keep is None


def test_learned_gates_vary_by_token_and_head_within_their_bounds():
    gates = gates_of(fast(lr_max=0.25, **LEARNED), 20 * torch.randn(4, 50, DIM))
    assert gates.lr.min() >= 0
    assert gates.lr.max() <= 0.25
    for log in (gates.log_keep, gates.log_momentum):
        assert log.isfinite().all()
        assert log.max() <= 0
    for gate in (gates.lr, gates.log_keep, gates.log_momentum):
        assert gate.std(2).min() > 0
        assert not torch.allclose(gate[:, 0], gate[:, 1])


def test_learned_gates_start_where_they_are_documented_to():
    gates = build([fast(lr_max=0.5, **LEARNED)]).writer(torch.randn(2, 5, DIM), torch.float64).gates["fast"]
    torch.testing.assert_close(gates.lr, torch.full((2, 2, 5, 1), 0.25))
    torch.testing.assert_close(gates.log_keep.exp(), torch.full((2, 2, 5), 0.99))
    torch.testing.assert_close(gates.log_momentum.exp(), torch.full((2, 2, 5), 0.5))


def test_a_mean_over_the_period_is_a_sum_at_a_rate_smaller_by_the_period():
    x = torch.randn(2, 19, DIM)
    mean, total = build([slow(period=8, lr=0.8, reduction="mean")]), build([slow(period=8, lr=0.1)])
    close(tensors(mean(x)), tensors(total(x)))


def test_an_objectives_weight_scales_the_rate():
    x = torch.randn(2, 11, DIM)
    for settings in ({"hidden": (5,)}, {"signal_at": "token"}):
        half = build([TokenLevel("fast", {mse: 0.5}, lr=0.4)], **settings)(x)
        whole = build([TokenLevel("fast", {mse: 1.0}, lr=0.2)], **settings)(x)
        torch.testing.assert_close(half.y, whole.y)
        torch.testing.assert_close(2 * half.aux["surprise"], whole.aux["surprise"])


def test_a_rate_of_zero_writes_nothing():
    memory = build([fast(lr=0.0, **LEARNED), slow(lr=0.0)], hidden=(5,))
    x = torch.randn(2, 20, DIM)
    torch.testing.assert_close(memory(x).y, memory.read(x, memory.init_state(2))[0])


def test_constants_and_learned_gates_of_equal_value_are_one():
    x = torch.randn(2, 20, DIM)
    learned = build([fast(lr_max=0.5, **LEARNED, forget_to="zero")])
    constant = build([fast(lr=0.25, momentum=0.5, forget=0.01, forget_to="zero")])
    constant.load_state_dict(learned.state_dict(), strict=False)
    close(tensors(learned(x)), tensors(constant(x)))


# Keys, writers, readers


def test_keys_and_queries_have_unit_length():
    memory = build([fast()], writers=2, readers=3)
    x = 50 * torch.randn(2, 5, DIM)
    torch.testing.assert_close(memory.writer(x, x.dtype).keys.norm(dim=-1), torch.ones(2, 2, 5, 2))
    torch.testing.assert_close(memory.reader.query(x, x.dtype).norm(dim=-1), torch.ones(2, 2, 5, 3))


def test_equal_writers_write_as_one_of_twice_the_rate():
    """The writes of one token happen at once: none sees what the other wrote."""
    x = torch.randn(2, 11, DIM)
    for settings in ({"hidden": (5,)}, {"signal_at": "token"}, {}):
        one, two = build([fast(lr=0.4)], **settings), build([fast(lr=0.2)], writers=2, **settings)
        with torch.no_grad():
            for projection in ("keys", "values"):
                weight = getattr(one.writer, projection).weight.unflatten(0, (2, -1))
                getattr(two.writer, projection).weight.copy_(torch.cat([weight, weight], 1).flatten(0, 1))
            two.init.load_state_dict(one.init.state_dict())
            two.reader.load_state_dict(one.reader.state_dict())
        torch.testing.assert_close(one(x).y, two(x).y)
        torch.testing.assert_close(one(x).aux["surprise"], two(x).aux["surprise"])


def test_every_reader_asks_for_itself():
    """With one reader's output cut off, the rest read as a memory that has only them."""
    memory, fewer = build([fast()], readers=3, hidden=(5,)), build([fast()], readers=1, hidden=(5,))
    x = torch.randn(2, 11, DIM)
    with torch.no_grad():
        fewer.load_state_dict(memory.state_dict() | {key: value for key, value in fewer.state_dict().items()})
        fewer.writer.load_state_dict(memory.writer.state_dict())
        fewer.init.load_state_dict(memory.init.state_dict())
        asked = memory.reader.queries.weight.unflatten(0, (2, 3, -1))
        fewer.reader.queries.weight.copy_(asked[:, 1].flatten(0, 1))
        output = memory.reader.output.weight.unflatten(1, (2, 3, -1))
        fewer.reader.output.weight.copy_(output[:, :, 1].flatten(1))
        output[:, :, [0, 2]] = 0
        torch.testing.assert_close(memory(x).y, fewer(x).y)


def test_heads_do_not_see_each_other():
    """A memory of two heads is two memories of one, their outputs added."""
    memory = build([fast(**LEARNED, forget_to="zero"), slow(**LEARNED)], hidden=(5,))
    x = torch.randn(2, 19, DIM)
    parts = []
    for head in range(2):
        one = FastWeights(DIM, memory.levels, heads=1, d_key=4, d_value=4, hidden=(5,), chunk=4)
        own = dict(one.named_parameters())
        with torch.no_grad():
            for name, parameter in memory.named_parameters():
                if name.startswith("init"):
                    own[name].copy_(parameter[head : head + 1])
                elif name == "reader.output.weight":
                    own[name].copy_(parameter.unflatten(1, (2, -1))[:, head])
                elif name == "reader.norm.weight":
                    own[name].copy_(parameter)
                else:
                    own[name].copy_(parameter.unflatten(0, (2, -1))[head])
        parts.append(one(x))
    out = memory(x)
    torch.testing.assert_close(parts[0].y + parts[1].y, out.y)
    torch.testing.assert_close((parts[0].aux["surprise"] + parts[1].aux["surprise"]) / 2, out.aux["surprise"])


def test_surprise_is_the_fastest_levels_objective_before_the_write():
    memory = build([TokenLevel("fast", {mse: 1.0, cosine: 0.5}), slow()], chunk=1, writers=2)
    x = torch.randn(2, 6, DIM)
    writes = memory.writer(x, x.dtype)
    surprises, state = [], memory.init_state(2)
    for t in range(6):
        weights = memory.init[0] + sum(level["delta"]["0"] for level in state["levels"].values())
        recalled = writes.keys[:, :, t] @ weights
        objective = mse(recalled, writes.values[:, :, t]) + 0.5 * cosine(recalled, writes.values[:, :, t])
        surprises.append(objective.mean((1, 2)))
        state = memory.write(x[:, t : t + 1], state)
    torch.testing.assert_close(memory(x).aux["surprise"], torch.stack(surprises, 1))


@pytest.mark.parametrize("dims", [(8, 3), (4, 16, 4)], ids=["linear", "mlp"])
def test_w_init_recalls_at_the_scale_of_a_key(dims):
    weights = Network(dims).initial_weights(heads=200)
    for weight, (d_in, d_out) in zip(weights, Network(dims).shapes, strict=True):
        assert weight.shape == (200, d_in, d_out)
        assert math.isclose(weight.std().item(), d_in**-0.5, rel_tol=0.1)


def test_precision_of_the_fast_weights_is_at_least_float32():
    for dtype, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        memory = build([fast(**LEARNED, forget_to="zero"), slow()]).to(dtype)
        state = memory(torch.randn(1, 5, DIM).to(dtype)).state
        assert {value.dtype for key, value in flatten(state).items() if key != "position"} == {kept}


# Levels


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"transform": "muon"}, "transform acts on whole matrices.*period to the memory's chunk"),
        ({"weight_norm": True}, "weight_norm acts on whole matrices"),
        ({"retention": {mse: 0.1}}, "retention acts on whole matrices"),
        ({"period": 4, "step": 0.1}, "step is the size of a transformed step.*set step to 1"),
        ({"period": 4, "transform": "muon", "lr": 0.02}, "set step to 0.02 and lr to 1"),
        ({"period": 4, "transform": "adam", "momentum": 0.5}, "adam has a momentum of its own; set momentum to 0"),
        ({"window": 0}, "window must be at least 1, not 0"),
    ],
    ids=lambda value: value[:28] if isinstance(value, str) else "",
)
def test_settings_of_a_level_that_would_do_nothing_are_refused(settings, told):
    with pytest.raises(ValueError, match=f"level 'odd': .*{told}"):
        TokenLevel("odd", {mse: 1.0}, **settings)
