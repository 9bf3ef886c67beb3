"""The router: gates on the writes of a memory, learned through the inner updates."""

import functools
import itertools

import pytest
import torch
from conformance import close, gradients, tensors
from torch.func import functional_call

from losses.recall import cosine, mse
from metamem.config import RouterConfig
from metamem.memory.fast_weights import FastWeights
from metamem.memory.level import TokenLevel
from metamem.state import tree_map

pytestmark = pytest.mark.usefixtures("float64")

DIM, TIME = 6, 11
Level = functools.partial(TokenLevel, objectives={mse: 1.0}, lr_max=0.4)
LEARNED = {"momentum": "learned", "forget": "learned"}
FAST, SLOW = Level("fast", **LEARNED, forget_to="zero"), Level("slow", period=4, **LEARNED)
KINDS = {
    "dense": {"kind": "dense"},
    "dense-no-hold": {"kind": "dense", "hold": False},
    "topk": {"kind": "topk"},
    "top2": {"kind": "topk", "k": 2},
    "binary": {"kind": "binary"},
    "static": {"kind": "static"},
    "topk-static": {"kind": "topk", "input": "static"},
    "chunk": {"kind": "dense", "input": "chunk"},
    "binary-chunk": {"kind": "binary", "input": "chunk"},
    "fixed": {"kind": "fixed", "table": {"fast": 0.3, "slow": 1.5}},
}
GRANULARITIES = {
    "layer": {"granularity": "layer"},
    "head": {"granularity": "head"},
    "block": {"granularity": "block", "blocks": 3},
}
MEMORIES = {
    "delta": {"signal_at": "token"},
    "linear": {"writers": 2},
    "mlp": {"hidden": (3,), "readers": 2},
    "swiglu": {"network": "swiglu", "hidden": (3,), "bias": True, "writers": 2},
}


def build(router, levels=(FAST, SLOW), **settings):
    """With random slow weights, far enough from zero that top-k and binary choose differently from token to token."""
    torch.manual_seed(0)
    router = RouterConfig(**router) if router else None
    memory = FastWeights(DIM, levels, **{"heads": 2, "d_value": 3, "chunk": 4, "router": router, **settings})
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            parameter.add_((1.0 if name.startswith("router") else 0.3) * torch.randn_like(parameter))
    return memory


def inputs(batch=2, time=TIME):
    torch.manual_seed(1)
    return torch.randn(batch, time, DIM, requires_grad=True)


def measure(memory, executor, x, state=None):
    memory.executor = executor
    out = memory(x, state)
    return {**tensors(out), **{f"d {name}": value for name, value in gradients(memory, x, out).items()}}


def executors_agree(memory, x, state=None):
    expected = measure(memory, "recurrence", x, state)
    for executor in ("dual", "vmap_grad"):
        close(measure(memory, executor, x, state), expected)


# The executors


@pytest.mark.parametrize(
    ("kind", "granularity", "memory"),
    [
        *itertools.product(KINDS, GRANULARITIES, ("delta", "mlp")),
        *itertools.product(("topk", "chunk"), ("layer", "block"), ("linear", "swiglu")),
    ],
)
def test_gated_writes_are_the_recurrence(kind, granularity, memory):
    """Values, state and gradients: products of matrices, the equations token by token, and autograd of the loss."""
    executors_agree(build(KINDS[kind] | GRANULARITIES[granularity], **MEMORIES[memory]), inputs())


BLOCKS = {"kind": "topk", **GRANULARITIES["block"]}
OTHER = {
    "blocks-muon": (
        BLOCKS,
        [Level("slow", period=4, transform="muon", step=0.3, momentum=0.5)],
        {"signal_at": "token"},
    ),
    "blocks-weight-norm": (BLOCKS, [FAST, Level("slow", period=8, weight_norm=True)], {"signal_at": "decayed"}),
    "blocks-in-turn": (BLOCKS, [Level("fast"), Level("slow", period=4)], {"signal_at": "token", "writes": "in_turn"}),
    "blocks-predicted": (BLOCKS, [Level("fast", signal="predicted_targets", **LEARNED)], {"signal_at": "token"}),
    "blocks-hebbian": (BLOCKS, [Level("fast", signal="hebbian", forget=0.1)], {"signal_at": "token"}),
    "blocks-cosine": (BLOCKS, [Level("fast", objectives={cosine: 1.0}), SLOW], {}),
    "blocks-implicit": (BLOCKS, [Level("fast", step_rule="implicit"), SLOW], {"signal_at": "token"}),
    "window": (BLOCKS, [Level("fast", window=3, lr=0.05, **LEARNED), SLOW], {"hidden": (3,), "writers": 2}),
    "window-beyond-the-chunk": (
        {"kind": "dense", "granularity": "layer"},
        [Level("fast", window=6, lr=0.03), Level("slow", window=7, period=4, lr=0.03, **LEARNED)],
        {"hidden": (3,)},
    ),
    "deep-token": (BLOCKS, [FAST, SLOW], {"hidden": (3,), "signal_at": "token", "chunk": 1}),
    "lagging": ({"kind": "dense"}, [SLOW], {"hidden": (3,), "residual_norm": True, "d_value": 3, "d_key": 3}),
}


@pytest.mark.parametrize("case", OTHER)
def test_gated_writes_of_every_kind_of_level_are_the_recurrence(case):
    router, levels, settings = OTHER[case]
    writers = {"writers": 2} if "writes" in settings else {}
    memory = build(router, levels, **settings, **writers)
    expected = measure(memory, "recurrence", inputs())
    for executor in ("dual", "vmap_grad"):
        muon = 1000 if "muon" in case else 1  # it divides by small singular values
        close(measure(memory, executor, inputs()), expected, rounding=muon)


class Tanh(torch.nn.Module):
    """A module of a user's own: three parameters, each of them a layer to a router."""

    def __init__(self, d_key, d_value):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(d_key, 4), torch.nn.Linear(4, d_value, bias=False)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


@pytest.mark.parametrize("levels", [[FAST, SLOW], [Level("mid", period=4), Level("slow", period=8)]], ids=len)
@pytest.mark.parametrize("kind", ["topk", "chunk"])
def test_each_parameter_of_a_module_is_a_layer(kind, levels):
    """Token by token, and whole chunks at once where no level is faster, against levels that write by themselves."""
    memory = build(KINDS[kind] | {"granularity": "layer"}, levels, network="test_routing.Tanh")
    assert memory.router.groups == 3
    x = inputs()
    close(measure(memory, "dual", x), measure(memory, "recurrence", x))


@pytest.mark.parametrize("memory", ["delta", "mlp"])
@pytest.mark.parametrize("kind", ["topk", "chunk"])
def test_rows_at_different_positions(kind, memory):
    """Rows 0, 1, 2 have read 7, 5 and 0 tokens: chunks and periods end apart, and what a chunk's router knows."""
    memory = build(KINDS[kind] | GRANULARITIES["block"], **MEMORIES[memory])
    state = memory(torch.randn(3, 2, DIM)).state
    state = memory.reset_state(state, torch.tensor([False, True, True]))
    state = memory(torch.randn(3, 5, DIM), state).state
    state = memory.detach_state(memory.reset_state(state, torch.tensor([False, False, True])))
    x = torch.randn(3, 9, DIM, requires_grad=True)
    executors_agree(memory, x, state)
    whole = measure(memory, "dual", x, state)
    for row in range(3):
        of_row = tree_map(lambda tensor, row=row: tensor[row : row + 1], state)
        alone = tensors(memory(x[row : row + 1], of_row))
        close(alone, {key: whole[key][row : row + 1] for key in alone})


# The equations, in plain loops, with autograd for every inner gradient


def plainly(memory, x, gates):
    """What is read [time, heads, d_value] of one row, whose writes the gates [time, heads, layers, blocks, levels]
    multiply. Takes from the memory only what its writer and reader say, and W_init."""

    def network(weights, a):
        for index, weight in enumerate(weights):
            a = a @ weight
            a = torch.nn.functional.silu(a) if index + 1 < len(weights) else a
        return a

    writes, queries = memory.writer(x, x.dtype), memory.reader.query(x, x.dtype)
    reads = []
    for head in range(memory.heads):
        init = [weight[head] for weight in memory.init]
        delta, momentum, total = ({level.name: [0 * w for w in init] for level in memory.levels} for _ in range(3))
        left, read, anchor = torch.ones(()), [], None
        for t in range(x.shape[1]):
            if memory.signal_at == "token" or t % memory.chunk == 0:
                anchor = weights_now(left, init, delta)
            key, value = writes.keys[0, head, t], writes.values[0, head, t]
            error = 0.5 * ((network(anchor, key) - value) ** 2).sum()
            slopes = torch.autograd.grad(error, anchor, create_graph=True)
            ending = []
            for index, level in enumerate(memory.levels):
                gate = writes.gates[level.name]
                step = []
                for layer, slope in enumerate(slopes):
                    m = gates[t, min(head, gates.shape[1] - 1), min(layer, gates.shape[2] - 1), :, index]
                    columns = [m[column * len(m) // slope.shape[-1]] for column in range(slope.shape[-1])]
                    step.append(gate.lr[0, head, t, 0] * slope * torch.stack(columns))
                total[level.name] = [a + b for a, b in zip(total[level.name], step, strict=True)]
                move = (level, gate.log_keep[0, head, t].exp(), gate.log_momentum[0, head, t].exp())
                if (t + 1) % level.period == 0:
                    ending.append(move)
            for level, keep, beta in [one for one in ending if one[0].period == 1]:
                left = left * keep if level.forgets_init else left
                apply(level, keep, beta, delta, momentum, total)
            read.append(network(weights_now(left, init, delta), queries[0, head, t]).squeeze(0))
            for level, keep, beta in [one for one in ending if one[0].period > 1]:
                apply(level, keep, beta, delta, momentum, total)
        reads.append(torch.stack(read))
    return torch.stack(reads, 1)


def weights_now(left, init, delta):
    """W = keep W_init + Σ Δ."""
    return [left * w + sum(of[i] for of in delta.values()) for i, w in enumerate(init)]


def apply(level, keep, beta, delta, momentum, total):
    """S ← β S − Σ products, Δ ← α Δ + S."""
    name = level.name
    momentum[name] = [beta * s - step for s, step in zip(momentum[name], total[name], strict=True)]
    delta[name] = [keep * d + s for d, s in zip(delta[name], momentum[name], strict=True)]
    total[name] = [torch.zeros_like(step) for step in total[name]]


def read_by(memory, x):
    """What `memory` reads, before the reader makes an output of it."""
    seen = []
    handle = memory.reader.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    out = memory(x)
    handle.remove()
    return seen[0][0, :, :, 0].transpose(0, 1).contiguous(), out


def slope_of_gates(read, gates):
    """Of a scalar that depends on all that was read."""
    torch.manual_seed(3)
    return torch.autograd.grad((read * torch.randn_like(read)).sum(), gates)[0]


AXES = {"layer": (1, None, 1), "head": (2, 1, 1), "block": (2, None, 3)}
SURROGATES = ["dense", "dense-no-hold", "static", "topk", "top2", "topk-static", "binary"]


def gates_of(kind, logits):
    """Gates and their surrogate, by plain formulas, one group at a time."""
    values, surrogates = [], []
    for z in logits.reshape(-1, logits.shape[-1]):
        shares = [one.exp() / sum(other.exp() for other in z) for one in z]
        size = z.tolist()
        if kind == "binary":
            values.append(torch.stack([torch.ones(()) if one >= 0 else torch.zeros(()) for one in size]))
            surrogates.append(z)
            continue
        open_ = len(z) if not kind.startswith("top") else (2 if kind == "top2" else 1)
        ranked = sorted(range(len(z)), key=lambda i, size=size: -size[i])[:open_]
        values.append(torch.stack([shares[i].detach() if i in ranked else torch.zeros(()) for i in range(len(z))]))
        surrogates.append(torch.stack(shares))
    return (torch.stack(of).reshape(logits.shape) for of in (values, surrogates))


@pytest.mark.parametrize("memory", ["delta", "mlp"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", SURROGATES)
def test_reads_and_the_routers_gradient_are_those_of_the_equations(kind, granularity, memory):
    """The gates, and the gradient that their surrogate makes of ∂ loss / ∂ gates, computed without the router's code;
    inner gradients by autograd, the outer one through them."""
    memory = build(KINDS[kind] | GRANULARITIES[granularity], **MEMORIES[memory] | {"readers": 1})
    x, router = inputs(1, 9), memory.router
    axes = tuple(size or len(memory.init) for size in AXES[granularity])
    logits = router.bias + (x[0] @ router.weight.T if hasattr(router, "weight") else torch.zeros(9, 1))
    logits = logits.reshape(9, *axes, -1)
    values, surrogate = gates_of(kind, logits)
    gates = values[..., :2].detach().requires_grad_()
    expected = plainly(memory, x, gates)
    read, out = read_by(memory, x)
    torch.testing.assert_close(read, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(out.aux["router.gates"][0], gates.detach().flatten(1, 3))

    parameters = dict(router.named_parameters())
    by_hand = torch.autograd.grad(surrogate[..., :2], list(parameters.values()), slope_of_gates(expected, gates))
    torch.manual_seed(3)
    found = torch.autograd.grad((read * torch.randn_like(read)).sum(), list(parameters.values()))
    for name, one, other in zip(parameters, found, by_hand, strict=True):
        assert one.abs().max() > 1e-6
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("kind", ["dense", "static", "chunk", "fixed"])
def test_the_routers_gradient_is_that_of_finite_differences(kind, granularity):
    """Where gates are differentiable: of the router's parameters, or a table's gates, and of the input."""
    levels = [Level("fast", **LEARNED, forget_to="zero"), Level("slow", period=2, **LEARNED)]
    blocks = {"blocks": 2} if granularity == "block" else {}
    router = RouterConfig(**KINDS[kind], granularity=granularity, **blocks)
    memory = FastWeights(2, levels, heads=1, hidden=(2,), chunk=2, router=router)
    if kind == "fixed":
        memory.router.parts = (1, 2, memory.router.blocks)  # each of its gates moves alone here
    named = {"table": memory.router.table} if kind == "fixed" else dict(memory.router.named_parameters())
    values = [(value + 0.3 * torch.randn_like(value)).detach().requires_grad_() for value in named.values()]

    def function(x, *values):
        moved = {f"router.{name}": value for name, value in zip(named, values, strict=True)}
        out = functional_call(memory, moved, (x,))
        return out.y, *(value for key, value in tensors(out).items() if "delta" in key or "entropy" in key)

    arguments = (torch.randn(1, 6, 2, requires_grad=True), *values)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)


# Straight through


@pytest.mark.parametrize("kind", ["topk", "top2"])
def test_the_mean_top_k_gradient_of_a_memory_points_where_that_of_dense_gates_does(kind):
    """Over sequences, with the memory's loss, which is not multilinear: the more so, the more choices are open."""
    hard = build(KINDS[kind] | GRANULARITIES["head"], signal_at="token")
    soft = build(KINDS["dense"] | GRANULARITIES["head"], signal_at="token")
    soft.load_state_dict(hard.state_dict())
    x, target = torch.randn(2, 64, TIME, DIM)
    means = []
    for memory in (hard, soft):
        loss = (memory(x).y - target).square().mean()
        means.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(memory.router.parameters()))]))
    assert torch.nn.functional.cosine_similarity(*means, dim=0) > {"topk": 0.6, "top2": 0.8}[kind]


# Tables, and hold

ROUNDING = 1e-14  # of W_init, with which a component is kept while both fade


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("granularity", ["head", "block"])
@pytest.mark.parametrize("slow", [SLOW, Level("slow"), Level("slow", forget=0.1, forget_to="zero")], ids=range(3))
def test_a_router_fixed_to_ones_changes_no_bit(granularity, memory, slow):
    """All levels open: the memory without a router. One level open: the memory of that level. In float32, where a sum
    in another order shows."""
    x = torch.randn(2, TIME, DIM, dtype=torch.float32)
    for levels, table in (([FAST, slow], {"fast": 1.0, "slow": 1.0}), ([FAST], {"fast": 1.0}), ([slow], {"slow": 1.0})):
        plain = build(None, levels, **MEMORIES[memory]).float()
        router = {"kind": "fixed", "table": table, **GRANULARITIES[granularity]}
        fixed = build(router, [FAST, slow], **MEMORIES[memory]).float()
        fixed.load_state_dict(plain.state_dict(), strict=False)
        out, expected = fixed(x), plain(x)
        assert torch.equal(out.y, expected.y) and torch.equal(out.aux["surprise"], expected.aux["surprise"])
        assert expected.y.isfinite().all()
        for closed in {"fast", "slow"} - table.keys():
            assert all(delta.eq(0).all() for delta in out.state["levels"][closed]["delta"].values())


def test_a_table_holds_a_gate_for_each_group_and_level():
    router = {
        "kind": "fixed",
        "table": {"fast": [0.0, 0.5, 1.0, 0.0, 2.0, 0.25], "slow": 1.0},
        **GRANULARITIES["block"],
    }
    memory = build(router, signal_at="token")
    out = memory(torch.randn(2, TIME, DIM))
    expected = torch.tensor([[0.0, 0.5, 1.0, 0.0, 2.0, 0.25], [1.0] * 6]).T
    assert torch.equal(out.aux["router.gates"], expected.expand(2, TIME, 6, 2))
    delta = out.state["levels"]["fast"]["delta"]["0"]  # 2 heads, 3 blocks of one column
    assert (delta.abs().amax((0, 2)) > ROUNDING).flatten().tolist() == [False, True, True, False, True, True]


@pytest.mark.parametrize("memory", ["delta", "mlp"])
@pytest.mark.parametrize("kind", ["dense", "topk", "binary"])
def test_what_holds_never_moves(kind, memory):
    """Group 1 holds, the others write: of its columns no component moves, however long."""
    memory = build(KINDS[kind] | {"input": "static"} | GRANULARITIES["block"], **MEMORIES[memory])
    with torch.no_grad():
        bias = memory.router.bias.view(memory.router.groups, -1)
        bias[1] = -1000.0
        bias[1, -1] = 1000.0 if kind != "binary" else -1000.0
        state = memory(torch.randn(2, 3 * TIME, DIM)).state
    for level in state["levels"].values():
        delta = level["delta"]["0"]  # of head 0: its blocks are groups 0, 1, 2
        block = delta.shape[-1] // 3
        assert delta[:, 0, :, block : 2 * block].abs().max() < ROUNDING
        assert kind != "dense" or delta[:, 0, :, :block].abs().max() > 1e-6
    moved = sum(level["delta"]["0"].abs().sum() for level in state["levels"].values())
    assert moved > 1e-6


# What is measured


def test_what_a_router_measures():
    memory = build(KINDS["top2"] | GRANULARITIES["block"], hidden=(3,))
    out = memory(torch.randn(2, TIME, DIM))
    aux = {name.removeprefix("router."): value for name, value in out.aux.items()}
    gates, logits, groups = aux["gates"], aux["logits"], 2 * 2 * 3
    assert gates.shape == (2, TIME, groups, 2) and logits.shape == (2, TIME, groups, 3)
    torch.testing.assert_close(aux["gates.slow"], gates[..., 1])
    torch.testing.assert_close(aux["load.fast"], gates[..., 0].gt(0).double().mean(-1))
    p = torch.softmax(logits, -1)
    torch.testing.assert_close(aux["entropy"], -(p * p.log()).sum(-1).mean(-1))
    sizes = {0: 3 * 3 // 3, 1: 3 * 3 // 3}  # of a block of a layer of a head: 3 → 3 → 3, three blocks
    costs = torch.tensor([sizes[layer] for _ in range(2) for layer in range(2) for _ in range(3)], dtype=torch.float64)
    torch.testing.assert_close(aux["costs"], (costs / costs.sum()).unsqueeze(1).expand(2, TIME, groups, 2))


def test_the_logits_of_a_binary_gate_are_those_of_open_and_closed():
    memory = build(KINDS["binary"] | GRANULARITIES["head"], signal_at="token")
    x = torch.randn(2, TIME, DIM)
    z = (x @ memory.router.weight.T + memory.router.bias).unflatten(-1, (2 * 2, 1))
    aux = memory(x).aux
    torch.testing.assert_close(aux["router.logits"], torch.cat([z / 2, -z / 2], -1))
    p = torch.sigmoid(z.squeeze(-1))
    torch.testing.assert_close(aux["router.entropy"], -(p * p.log() + (1 - p) * (1 - p).log()).mean(-1))
