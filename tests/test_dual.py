"""The dual form is the token-by-token recurrence, and both are what autograd makes of the papers' equations.

Values, state and outer gradients, in float64.
"""

import functools
import itertools

import pytest
import torch
from conformance import close, gradients, loss, stream, tensors
from torch.func import functional_call

from losses.recall import cosine, mse
from metamem.memory import decay, fast_weights
from metamem.memory.base import Out
from metamem.memory.decay import decay_add
from metamem.memory.dual import decay_matrix, kernel
from metamem.memory.fast_weights import FastWeights
from metamem.memory.level import TokenLevel
from metamem.state import flatten, unflatten


def dot(pred, target):
    return -(pred * target).sum(-1)


def l2(weights, initial):
    return 0.5 * (weights - initial).square().sum((-2, -1))


pytestmark = pytest.mark.usefixtures("float64")

Level = functools.partial(TokenLevel, objectives={mse: 1.0}, lr_max=0.4)
LEARNED = {"momentum": "learned", "forget": "learned"}
LEVELS = {
    "plain": [Level("fast")],
    "momentum": [Level("fast", momentum="learned")],
    "forget-to-init": [Level("fast", forget="learned")],
    "forget-to-zero": [Level("fast", forget="learned", forget_to="zero")],
    "all-learned": [Level("fast", **LEARNED, forget_to="zero")],
    "all-constant": [Level("fast", lr=0.1, momentum=0.7, forget=0.05, forget_to="zero")],
    "only-slow": [Level("slow", period=8, **LEARNED, forget_to="zero")],
    "period-two-chunks": [Level("fast", **LEARNED), Level("slow", period=8, **LEARNED)],
    "period-half-chunk": [Level("fast", **LEARNED), Level("slow", period=2, **LEARNED, forget_to="zero")],
    "period-is-chunk": [Level("fast", forget=0.1), Level("slow", period=4, reduction="mean")],
    "two-of-period-1": [
        Level("fast", **LEARNED, forget_to="zero"),
        Level("other", objectives={mse: 0.5, cosine: 0.3}, lr=0.2, forget=0.2, forget_to="zero"),
    ],
    "three-levels": [
        Level("fast", **LEARNED, forget_to="zero"),
        Level("slow", period=2, objectives={cosine: 1.0}, forget="learned"),
        Level("slower", period=16, momentum=0.5, forget=0.2, forget_to="zero", reduction="mean"),
    ],
}
BOUNDARY_LEVELS = {
    "predicted-targets": [Level("fast", signal="predicted_targets", **LEARNED)],
    "window-of-three": [Level("fast", window=3, lr=0.05, **LEARNED, forget_to="zero")],
    "window-beyond-the-chunk": [Level("fast", window=6, lr=0.03, momentum=0.5), Level("slow", period=8, **LEARNED)],
    "two-windows": [Level("fast", window=2, lr=0.1, forget=0.1), Level("slow", window=7, period=4, lr=0.03, **LEARNED)],
    "muon": [Level("slow", period=4, transform="muon", step=0.3, momentum="learned", forget=0.1, forget_to="zero")],
    "muon-window": [Level("slow", period=4, window=9, transform="muon", step=0.3, momentum=0.6)],
    "muon-weight-norm": [Level("fast", lr=0.1), Level("slow", period=8, transform="muon", weight_norm=True)],
    "adam": [Level("slow", period=4, transform="adam", step=0.05, forget="learned")],
    "rmsprop-and-sign": [
        Level("other", period=4, transform="rmsprop", step=0.05, objectives={cosine: 1.0}),
        Level("slow", period=8, transform="sign", step=0.02, momentum=0.3),
    ],
    "clip-and-retention": [
        Level("fast", forget="learned"),
        Level("slow", period=4, transform="clip", step=0.5, retention={l2: 0.1}, weight_norm=True),
    ],
}
LEVELS |= BOUNDARY_LEVELS
BOUNDARY = ("two-windows", "muon-window", "muon-weight-norm", "adam", "clip-and-retention")
SHAPES = {
    "depth1": {"hidden": ()},
    "depth1-heads2-writers2-readers3": {"hidden": (), "heads": 2, "writers": 2, "readers": 3},
    "depth2-heads2": {"hidden": (5,), "heads": 2},
    "depth2-writers3-readers2": {"hidden": (5,), "writers": 3, "readers": 2, "activation": "gelu"},
    "depth3-heads2": {"hidden": (3, 5), "heads": 2, "activation": "tanh"},
}
MLPS = tuple(SHAPES)
SHAPES |= {
    "residual-norm-bias": {"residual_norm": True, "bias": True, "feature_map": "identity"},
    "depth2-residual-norm-bias": {"hidden": (5,), "heads": 2, "residual_norm": True, "bias": True, "writers": 2},
    "swiglu": {"network": "swiglu", "expansion": (2.0,), "heads": 2, "readers": 2, "feature_map": "silu_unit"},
}
PLAIN = [name for name in LEVELS if name not in BOUNDARY_LEVELS]
# every boundary setting on two shapes, every other network under three settings
NARROW = [*itertools.product(BOUNDARY_LEVELS, ("depth1-heads2-writers2-readers3", "depth2-heads2"))]
NARROW += itertools.product(("all-learned", "period-half-chunk", "muon"), [name for name in SHAPES if name not in MLPS])
DIM = 6


def squared(levels):
    """Whether token signals of these levels can be solved for."""
    return all(set(level.objectives) == {mse} and level.window == 1 for level in levels)


def build(levels, **settings):
    torch.manual_seed(0)
    memory = FastWeights(DIM, levels, **{"heads": 1, "chunk": 4, **settings})
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def measure(memory, executor, x, state=None):
    memory.executor = executor
    out = memory(x, state)
    return {**tensors(out), **{f"d {name}": value for name, value in gradients(memory, x, out).items()}}


def executors_agree(memory, x, state=None, others=("recurrence", "vmap_grad")):
    expected = measure(memory, "recurrence", x, state)
    muon = any(level.transform == "muon" for level in memory.levels)  # it divides by small singular values
    for executor in {"dual", *others} - {"recurrence"}:
        close(measure(memory, executor, x, state), expected, rounding=1000 if muon else 1)


@pytest.mark.parametrize(("levels", "shape"), [*itertools.product(PLAIN, MLPS), *NARROW])
def test_the_dual_form_is_the_recurrence(levels, shape):
    memory = build(LEVELS[levels], **SHAPES[shape])
    executors_agree(memory, torch.randn(2, 18, DIM, requires_grad=True))


@pytest.mark.parametrize("shape", ["depth1", "depth1-heads2-writers2-readers3"])
@pytest.mark.parametrize("levels", [name for name in LEVELS if squared(LEVELS[name])])
def test_the_triangular_solve_is_the_recurrence(levels, shape):
    memory = build(LEVELS[levels], **SHAPES[shape], signal_at="token")
    executors_agree(memory, torch.randn(2, 18, DIM, requires_grad=True))


IN_TURN = {"writers": 3, "writes": "in_turn", "heads": 2}
TOKEN = {
    "decayed": ("all-learned", {"signal_at": "decayed", "heads": 2, "writers": 2}),
    "decayed-two-levels": ("period-two-chunks", {"signal_at": "decayed", "readers": 2}),
    "decayed-two-forget-init": ("period-half-chunk", {"signal_at": "decayed"}),
    "in-turn": ("plain", {"signal_at": "token", **IN_TURN}),
    "in-turn-decayed": ("forget-to-zero", {"signal_at": "decayed", "readers": 2, **IN_TURN}),
    "in-turn-two-levels": ("period-is-chunk", {"signal_at": "decayed", **IN_TURN}),
    "predicted-targets": ("predicted-targets", {"signal_at": "token", "heads": 2}),
    "bias": ("all-learned", {"signal_at": "token", "bias": True}),
}


@pytest.mark.parametrize("case", TOKEN)
def test_token_signals_of_every_order_are_the_recurrence(case):
    levels, settings = TOKEN[case]
    executors_agree(build(LEVELS[levels], **settings), torch.randn(2, 18, DIM, requires_grad=True))


@pytest.mark.parametrize("signal_at", ["token", "chunk"])
def test_hebbian_signals_do_not_depend_on_where_they_are_computed(signal_at):
    levels = [Level("fast", objectives={dot: 1.0}, signal="hebbian", **LEARNED, forget_to="zero")]
    memory = build(levels, heads=2, writers=2, readers=2, signal_at=signal_at)
    x = torch.randn(2, 18, DIM, requires_grad=True)
    executors_agree(memory, x)
    other = build(levels, heads=2, writers=2, readers=2, signal_at="token")
    torch.testing.assert_close(memory(x).y, other(x).y, rtol=1e-10, atol=1e-12)


def test_the_triangular_solve_takes_levels_of_different_weights():
    levels = [
        Level("fast", objectives={mse: 0.5}, **LEARNED),
        Level("other", objectives={mse: 2.0}, forget=0.3, forget_to="zero"),
        Level("slow", objectives={mse: 0.25}, period=8, momentum="learned"),
    ]
    memory = build(levels, heads=2, writers=2, signal_at="token")
    executors_agree(memory, torch.randn(2, 18, DIM, requires_grad=True))


@pytest.mark.parametrize("shape", ["depth2-heads2", "depth3-heads2"])
def test_token_signals_of_deep_networks_are_the_recurrence(shape):
    memory = build(LEVELS["period-two-chunks"], **SHAPES[shape], signal_at="token", chunk=1)
    executors_agree(memory, torch.randn(2, 11, DIM, requires_grad=True))


@pytest.mark.parametrize("chunk", [1, 3, 5, 7, 64])
@pytest.mark.parametrize("signal_at", ["chunk", "token"])
def test_chunks_that_do_not_divide_the_sequence(signal_at, chunk):
    memory = build(LEVELS["all-learned"], heads=2, chunk=chunk, signal_at=signal_at)
    executors_agree(memory, torch.randn(1, 11, DIM, requires_grad=True), others=())


@pytest.mark.parametrize("signal_at", ["chunk", "token"])
@pytest.mark.parametrize("levels", ["period-two-chunks", "period-half-chunk", *BOUNDARY])
def test_rows_at_different_positions(levels, signal_at):
    """Rows 0, 1, 2 have read 7, 5 and 0 tokens: chunks and periods end apart."""
    if signal_at == "token" and any(level.window > 1 for level in LEVELS[levels]):
        pytest.skip("a window has the signals of the chunk")
    memory = build(LEVELS[levels], heads=2, signal_at=signal_at)
    x = torch.randn(3, 17, DIM, requires_grad=True)
    state = memory(torch.randn(3, 2, DIM)).state
    state = memory.reset_state(state, torch.tensor([False, True, True]))
    state = memory(torch.randn(3, 5, DIM), state).state
    state = memory.detach_state(memory.reset_state(state, torch.tensor([False, False, True])))
    assert state["position"].tolist() == [7, 5, 0]
    executors_agree(memory, x, state)


@pytest.mark.parametrize("signal_at", ["chunk", "token"])
@pytest.mark.parametrize("before", [0, 3])
def test_a_long_call_goes_in_pieces_and_gives_the_same(before, signal_at, monkeypatch):
    memory = build(LEVELS["period-two-chunks"], signal_at=signal_at)
    x = torch.randn(2, 27, DIM, requires_grad=True)
    state = memory.detach_state(memory(torch.randn(2, before, DIM)).state) if before else None
    whole = measure(memory, "dual", x, state)
    monkeypatch.setattr(fast_weights, "PIECE", 9)
    lengths = [piece.shape[1] for piece in memory._pieces(x, state)]
    assert lengths == ([8, 8, 8, 3] if before == 0 else [5, 8, 8, 6])
    close(whole, measure(memory, "dual", x, state))


def test_how_signals_share_a_chunk_does_not_matter_to_token_signals():
    """`chunk` is a speed of the exact online rule, not a setting of it."""
    x = torch.randn(2, 23, DIM, requires_grad=True)
    results = []
    for chunk in (1, 4, 8, 32):
        memory = build(LEVELS["all-learned"], heads=2, chunk=chunk, signal_at="token")
        out = memory(x)
        results.append({**tensors(out), **gradients(memory, x, out)})
    for other in results[1:]:
        close(other, results[0])


# The papers' equations, with autograd for every gradient


def naive(memory, x):
    """DESIGN section 2 for one row and one head, each inner gradient by autograd of the objective itself.

    Takes from the memory only what its writer and reader say, and W_init.
    """

    def network(weights, a):
        for index, weight in enumerate(weights):
            a = a @ weight
            a = torch.nn.functional.silu(a) if index + 1 < len(weights) else a
        return a

    writes, queries = memory.writer(x, x.dtype), memory.reader.query(x, x.dtype)
    init = [weight[0] for weight in memory.init]
    levels = {level.name: level for level in memory.levels}

    def zeros():
        return {name: [torch.zeros_like(weight) for weight in init] for name in levels}

    delta, momentum, total, left = zeros(), zeros(), zeros(), dict.fromkeys(levels, torch.ones(()))

    def now():
        share = torch.ones(())
        for name in levels:
            share = share * left[name]
        return [share * weight + sum(delta[name][i] for name in levels) for i, weight in enumerate(init)]

    def gate(log, t):
        return None if log is None else log[0, 0, t].exp()

    def apply(name, steps, t):
        gates = writes.gates[name]
        keep, beta = gate(gates.log_keep, t), gate(gates.log_momentum, t)
        keep, beta = (torch.ones(()) if keep is None else keep), (torch.zeros(()) if beta is None else beta)
        momentum[name] = [beta * s - step for s, step in zip(momentum[name], steps, strict=True)]
        delta[name] = [keep * d + s for d, s in zip(delta[name], momentum[name], strict=True)]
        left[name] = left[name] * keep if levels[name].forget_to == "zero" else left[name]

    reads, surprises, anchor = [], [], None
    for t in range(x.shape[1]):
        if memory.signal_at == "token" or t % memory.chunk == 0:
            anchor = now()
        key, value = writes.keys[0, 0, t], writes.values[0, 0, t]
        error = 0.5 * ((network(anchor, key) - value) ** 2).sum(-1)
        surprises.append(error.mean())
        for name, level in levels.items():
            gradient = torch.autograd.grad(error.sum(), anchor, create_graph=True)
            steps = [writes.gates[name].lr[0, 0, t] * g for g in gradient]
            if level.period == 1:
                apply(name, steps, t)
            else:
                total[name] = [a + b for a, b in zip(total[name], steps, strict=True)]
        reads.append(network(now(), queries[0, 0, t]))
        for name, level in levels.items():
            if level.period > 1 and (t + 1) % level.period == 0:
                apply(name, total[name], t)
                total[name] = [torch.zeros_like(weight) for weight in init]
    y = memory.reader(torch.stack(reads)[None, None])
    aux = {"surprise": torch.stack(surprises)[None]}
    tree = {"position": torch.tensor([x.shape[1]]), "levels": {}}
    for name, level in levels.items():
        entry = {"delta": delta[name]}
        entry |= {"momentum": momentum[name]} if level.has_momentum else {}
        entry |= {"pending": [-step for step in total[name]]} if level.period > 1 else {}
        tree["levels"][name] = {
            key: {str(i): tensor[None, None] for i, tensor in enumerate(tensors)} for key, tensors in entry.items()
        }
        if level.forgets_init:
            tree["levels"][name]["keep"] = left[name].reshape(1, 1)
    if memory.signal_at == "chunk":
        tree["anchor"] = {str(i): tensor[None, None] for i, tensor in enumerate(anchor)}
    return Out(y, tree, aux)


NAIVE = {
    "linear-token": ((), "token", 4, ["all-learned", "period-two-chunks"]),
    "linear-chunk": ((), "chunk", 4, ["all-learned", "period-half-chunk"]),
    "mlp-chunk": ((5,), "chunk", 4, ["all-learned", "period-two-chunks", "period-half-chunk"]),
    "mlp3-chunk": ((5, 3), "chunk", 4, ["all-constant", "period-two-chunks"]),
    "mlp-token": ((5,), "token", 1, ["all-learned", "period-two-chunks"]),
}


@pytest.mark.parametrize(
    ("setting", "levels"), [(name, levels) for name, setting in NAIVE.items() for levels in setting[-1]]
)
def test_the_engine_is_what_autograd_makes_of_the_equations(setting, levels):
    hidden, signal_at, chunk, _ = NAIVE[setting]
    memory = build(LEVELS[levels], hidden=hidden, signal_at=signal_at, chunk=chunk)
    x = torch.randn(1, 14, DIM, requires_grad=True)
    out, expected = memory(x), naive(memory, x)
    close(tensors(out), tensors(expected))
    close(gradients(memory, x, out), gradients(memory, x, expected))


# The outer gradient, against finite differences

SMALL = {
    "linear-token": {"hidden": (), "signal_at": "token"},
    "linear-chunk": {"hidden": (), "writers": 2, "readers": 2},
    "mlp-chunk": {"hidden": (2,)},
}


@pytest.mark.parametrize("settings", SMALL.values(), ids=SMALL.keys())
def test_the_outer_gradient_is_that_of_finite_differences(settings):
    """Of every slow weight and the input: gradients through gradients, second order in all that the writes do."""
    torch.manual_seed(0)
    levels = [Level("fast", **LEARNED, forget_to="zero"), Level("slow", period=4, **LEARNED)]
    memory = FastWeights(2, levels, heads=1, chunk=2, **settings)
    names = [name for name, _ in memory.named_parameters()]
    parameters = [(p + 0.3 * torch.randn_like(p)).detach().requires_grad_() for p in memory.parameters()]

    def function(x, *values):
        return loss(functional_call(memory, dict(zip(names, values, strict=True)), (x,)))

    assert torch.autograd.gradcheck(function, (torch.randn(1, 6, 2, requires_grad=True), *parameters))


def test_the_outer_gradient_flows_through_a_carried_state():
    memory = build(LEVELS["period-two-chunks"], hidden=(3,), heads=1)
    flat = {key: value for key, value in flatten(memory(torch.randn(1, 6, DIM)).state).items() if value is not None}
    names = [name for name, value in flat.items() if value.is_floating_point()]
    x = torch.randn(1, 5, DIM)

    def function(*values):
        return memory(x, unflatten({**flat, **dict(zip(names, values, strict=True))})).y

    starts = [flat[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, starts, fast_mode=True)


# Kernels


def test_the_kernel_is_the_unrolled_recurrence():
    keep, beta = torch.rand(2, 3, 7), torch.rand(2, 3, 7)
    of = kernel(keep.log(), beta.log(), keep)
    delta, momentum = torch.zeros(2, 3, 9), torch.zeros(2, 3, 9)  # the share of each write, of Δ_0 and of S_0
    delta[..., 7], momentum[..., 8] = 1, 1
    for t in range(7):
        momentum = beta[..., t, None] * momentum
        momentum[..., t] += 1
        delta = keep[..., t, None] * delta + momentum
        torch.testing.assert_close(of.writes[..., t, :], delta[..., :7])
        torch.testing.assert_close(of.keep[..., t], delta[..., 7])
        torch.testing.assert_close(of.carry[..., t], delta[..., 8])
    torch.testing.assert_close(of.last_writes, momentum[..., :7])
    torch.testing.assert_close(of.last_carry, momentum[..., 8])


@pytest.mark.parametrize("large", [0, decay.LARGE], ids=["large matrices", "small matrices"])
def test_decay_add_has_the_gradients_of_what_it_computes(large, monkeypatch):
    """Its backward is written by hand: against the plain expression, finite differences, and once more derived."""
    monkeypatch.setattr(decay, "LARGE", large)
    share, weight, step = torch.rand(2, 3), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    arguments = [tensor.requires_grad_() for tensor in (share, weight, step)]
    torch.testing.assert_close(decay_add(*arguments), share[..., None, None] * weight + step)
    assert torch.autograd.gradcheck(decay_add, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(decay_add, arguments, fast_mode=True)


@pytest.mark.parametrize("decay", [1e-30, 1e-3, 0.5, 1 - 1e-7, 1.0])
def test_decays_are_finite_and_differentiable_at_any_strength(decay):
    """Cumulative products of 512 in float32: e^-35000 at one end, exactly 1 at the other."""
    log = torch.full((512,), decay, dtype=torch.float32).log().requires_grad_()
    matrix = decay_matrix(log)
    expected = torch.tensor(decay, dtype=torch.float64) ** torch.arange(512, dtype=torch.float64)
    torch.testing.assert_close(matrix[:, 0].double(), expected, rtol=2e-3, atol=1e-30)
    assert matrix.triu(1).eq(0).all()
    matrix.sum().backward()
    assert log.grad.isfinite().all()


@pytest.mark.parametrize("signal_at", ["chunk", "token"])
@pytest.mark.parametrize("spread", [1, 8, 30])
def test_float32_costs_the_dual_form_no_more_than_the_recurrence(spread, signal_at):
    """Long, with gates spread from near 0 to near 1: cumulative products lose no digits that the recurrence keeps."""
    memory = build([Level("fast", **LEARNED, forget_to="zero", lr=0.02)], heads=2, chunk=64, signal_at=signal_at)
    memory.writer.gates["fast"]["forget"].weight.data *= spread
    x = torch.randn(1, 320, DIM)
    exact = memory(x).y
    memory.float()
    errors = {}
    for executor in ("dual", "recurrence"):
        memory.executor = executor
        errors[executor] = (memory(x.float()).y - exact).abs().mean()
    assert errors["dual"] < 2 * errors["recurrence"] + 1e-5


def test_the_state_of_a_stream_of_random_pieces_is_that_of_the_recurrence():
    memory = build(LEVELS["three-levels"], hidden=(4,), heads=2)
    x = torch.randn(2, 30, DIM, requires_grad=True)
    out = stream(memory, x, [1, 2, 9, 11, 16, 29])
    memory.executor = "recurrence"
    whole = memory(x)
    close(tensors(out), tensors(whole))
    close(gradients(memory, x, out), gradients(memory, x, whole))
