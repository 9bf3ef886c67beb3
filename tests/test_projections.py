"""A memory without projections regresses online, on the input as it is; static gates are numbers that it learns."""

import pytest
import torch
from conformance import close, gradients, stream, tensors

from losses.recall import mse
from metamem.memory.fast_weights import FastWeights
from metamem.memory.level import TokenLevel

pytestmark = pytest.mark.usefixtures("float64")
FEATURES, ROWS, TIME = 3, 4, 11
DIM = 2 * FEATURES + ROWS
LEARNED = {"gates": "static", "momentum": "learned", "forget": "learned"}


def build(heads=1, **level):
    level = TokenLevel("only", {mse: 1.0}, **{"lr_max": 0.2, **level})
    return FastWeights(
        DIM,
        [level],
        heads,
        FEATURES,
        ROWS // heads,
        projections="none",
        feature_map="identity",
        signal_at="token",
        chunk=4,
    )


def test_it_regresses_the_values_on_the_keys_and_reads_at_the_query():
    memory, x = build(lr=0.2, forget=0.1), torch.randn(2, TIME, DIM)
    out = memory(x)
    assert memory.dim_in == DIM and memory.dim_out == ROWS and out.y.shape == (2, TIME, ROWS)
    for row in range(2):
        initial = weights = memory.init[0][0]
        for t in range(TIME):
            query, key, value = x[row, t].split([FEATURES, FEATURES, ROWS])
            step = 0.2 * torch.outer(key, key @ weights - value)
            weights = initial + 0.9 * (weights - initial) - step
            torch.testing.assert_close(out.y[row, t], query @ weights)


def test_heads_split_the_rows_and_share_keys_and_queries():
    x = torch.randn(2, TIME, DIM)
    whole, split = build(1, lr=0.2, forget=0.1), build(2, lr=0.2, forget=0.1)
    with torch.no_grad():
        split.init[0].copy_(torch.stack(whole.init[0][0].chunk(2, -1)))
    torch.testing.assert_close(split(x).y, whole(x).y)


@pytest.mark.parametrize("period", [1, 8])
def test_any_split_and_executor_gives_the_same(period):
    memory, x = build(2, period=period, **LEARNED), torch.randn(2, TIME, DIM, requires_grad=True)
    out = memory(x)
    expected = {**tensors(out), **{f"d {name}": slope for name, slope in gradients(memory, x, out).items()}}
    for executor, cuts in (("dual", [3, 7]), ("recurrence", []), ("vmap_grad", [])):
        memory.executor = executor
        out = stream(memory, x, cuts)
        close({**tensors(out), **{f"d {name}": s for name, s in gradients(memory, x, out).items()}}, expected)


def test_nothing_is_learned_but_gates_and_w_init():
    names = {name for name, _ in build(**LEARNED).named_parameters()}
    gates = {f"writer.gates.only.{gate}.bias" for gate in ("lr", "momentum", "forget")}
    assert names == gates | {"init.0"}


def test_static_gates_are_one_number_a_head_whatever_the_token():
    memory = build(2, forget_start=0.2, **LEARNED)
    gates = memory.writer(torch.randn(2, TIME, DIM), torch.float64).gates["only"]
    torch.testing.assert_close(gates.lr, torch.full((2, 2, TIME, 1), 0.1))
    torch.testing.assert_close(gates.log_keep.exp(), torch.full((2, 2, TIME), 0.8))
    with torch.no_grad():
        memory.writer.gates["only"]["forget"].bias.copy_(torch.tensor([0.0, -2.0]))
    keep = memory.writer(torch.randn(2, TIME, DIM), torch.float64).gates["only"].log_keep.exp()
    torch.testing.assert_close(keep, torch.tensor([0.5, 1 - 1 / (1 + torch.e**2)])[:, None].expand(2, 2, TIME))


def test_a_gate_of_tokens_that_start_where_static_ones_do_is_the_same_memory():
    x = torch.randn(2, TIME, DIM)
    static, by_token = build(**LEARNED), build(momentum="learned", forget="learned")
    by_token.load_state_dict(static.state_dict(), strict=False)
    close(tensors(static(x)), tensors(by_token(x)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dim": 9}, r"3 \+ 3 \+ 2 × 2 features, not 9; set projections to 'learned', or make it 10"),
        ({"readers": 2}, "one key and one query a token, not 1 and 2; set writers to 1 and readers to 1"),
    ],
)
def test_an_input_that_is_not_query_key_and_value_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        FastWeights(
            **{"dim": DIM, "levels": [TokenLevel("only", {mse: 1.0})], "heads": 2, "d_key": 3, "d_value": 2}
            | {"projections": "none"}
            | settings
        )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"gates": "static", "lr": 0.1}, "this level learns none; set gates to 'token', or lr to 'learned'"),
        ({"forget": 0.1, "forget_start": 0.3}, "set forget to 'learned', or forget_start to 0.01"),
        ({"forget": "learned", "forget_start": 1.0}, r"forget_start must be in \(0, 1\), not 1.0"),
    ],
)
def test_settings_of_learned_gates_that_would_do_nothing_are_refused(settings, told):
    with pytest.raises(ValueError, match=f"level 'odd': .*{told}"):
        TokenLevel("odd", {mse: 1.0}, **settings)
