"""Every preset of configs/memory is its paper's recurrence, written plainly: token by token, or mini-batch by
mini-batch, one head at a time, each inner gradient by autograd of the paper's own objective.

Built from the preset's YAML inside a language model; the plain side takes only the slow weights. What is read, the
final weights and momenta, and the outer gradients by every slow weight and the input, in float64. Row vectors, as in
the engine, save where a paper's matrix is d_value × d_key.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from conformance import close, gradients, tensors
from small_models import CONFIGS
from torch.nn import functional

from metamem import build, load_config
from metamem.memory.base import Out
from metamem.memory.fast_weights import FastWeights

pytestmark = pytest.mark.usefixtures("float64")

DIM, HEADS = 8, 2
WIDTH = DIM // HEADS
TIME = 14  # three mini-batches of CHUNK and half of a fourth
CHUNK, WINDOW, WRITERS = 4, 7, 3
STEP = 0.05  # Atlas', of a transformed step
PERIODS = {"fast": 2, "middle": 4, "slow": 8}
SMALL = [f"vars.dim={DIM}", f"vars.heads={HEADS}", "vars.blocks=1", "vars.vocabulary=16"]


def build_preset(preset, folder, *overrides):
    """The memory of a preset, as a network around it has it, with random slow weights, gates too."""
    memory = fresh_preset(preset, folder, *SMALL, *overrides)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def fresh_preset(preset, folder, *overrides):
    """The memory of a preset as it starts."""
    file = folder / f"{preset}.yaml"
    files = [CONFIGS / f"memory/{preset}.yaml", CONFIGS / "experiment/associative_recall.yaml"]
    file.write_text(f"extends: {[str(path) for path in files]}\n")
    return build(load_config(file, overrides)).get_submodule("blocks.0.memory")


# What a memory is given: the slow weights, applied


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def silu_unit(x):
    return unit(x * x.sigmoid())


def elu_plus_one(x):
    return torch.where(x > 0, x + 1, x.exp())


class Tokens:
    """What one row of x is for one head: keys and values, [time, writers, width] (without that axis for one writer),
    queries, gates, and the weights at the start."""

    def __init__(self, memory, x, head, features):
        (level,) = memory.levels
        writer, gates = memory.writer, memory.writer.gates[level.name]
        self.k = features(self.of_head(x @ writer.keys.weight.mT, head))
        self.v = self.of_head(x @ writer.values.weight.mT, head)
        self.q = features(self.of_head(x @ memory.reader.queries.weight.mT, head)).squeeze(1)

        def logits(gate):
            return x @ gates[gate].weight.mT + gates[gate].bias

        if "lr" in gates:
            self.rate = level.lr_max * logits("lr").reshape(len(x), HEADS, -1)[:, head].sigmoid()
        if "momentum" in gates:
            self.momentum = logits("momentum")[:, head].sigmoid()
        if "forget" in gates:
            self.keep = 1 - logits("forget")[:, head].sigmoid()
        if memory.writer.writers == 1:
            self.k, self.v = self.k.squeeze(1), self.v.squeeze(1)
            self.rate = self.rate.squeeze(1) if "lr" in gates else None
        self.start = [weight[head] for weight in memory.init]
        if memory.residual_norm:
            self.gain, self.shift = memory.norm_gain[head, 0], memory.norm_shift[head, 0]

    @staticmethod
    def of_head(projected, head):
        return projected.reshape(len(projected), HEADS, -1, WIDTH)[:, head]


class Held(NamedTuple):
    """What a method reads for each token, and holds at the end: one matrix a layer, d_in × d_out. `anchor`: the
    weights at which the gradients of a half-read mini-batch are taken; `pending`: the step summed since the last."""

    reads: Sequence
    weights: Sequence
    momentum: Sequence = ()
    pending: Sequence = ()
    anchor: Sequence = ()


def plain(memory, x, method, features):
    """The whole memory by a method: RMSNorm of what each head reads, then the output projection."""
    heads = [[method(Tokens(memory, row, head, features)) for head in range(HEADS)] for row in x]
    reads = torch.stack([torch.stack([torch.stack(held.reads) for held in row], 1) for row in heads])
    deviation = (reads.square().mean(-1, keepdim=True) + torch.finfo(reads.dtype).eps).sqrt()
    read = (reads / deviation * memory.reader.norm.weight).flatten(2)
    state = {}
    for name in Held._fields[1:]:
        for layer in range(len(getattr(heads[0][0], name))):
            rows = [torch.stack([getattr(held, name)[layer] for held in row]) for row in heads]
            state.setdefault(name, {})[str(layer)] = torch.stack(rows)
    return Out(read @ memory.reader.output.weight.mT, state, {})


def held_by(memory, state):
    """The state of a memory in the words of `Held`: its weights are what is left of W_init, and Δ."""
    (level,) = state["levels"].values()
    left = level["keep"][..., None, None] if "keep" in level else 1.0
    weights = {layer: left * memory.init[int(layer)] + delta for layer, delta in level["delta"].items()}
    parts = {**level, "weights": weights}
    held = {name: parts[name] for name in ("weights", "momentum", "pending") if name in parts}
    return held | ({"anchor": state["anchor"]} if "anchor" in state else {})


# Linear memories


def linear_attention(token):
    """Katharopoulos et al. 2020, eqs. 18–20: s ← s + φ(k) vᵀ, z ← z + φ(k), y = φ(q)ᵀ s / φ(q)ᵀ z."""
    (s,) = token.start
    z, reads = torch.zeros(WIDTH), []
    for k, v, q in zip(token.k, token.v, token.q, strict=True):
        s, z = s + torch.outer(k, v), z + k
        reads.append(q @ s / (q @ z))
    return Held(reads, [s])


def delta_net(token):
    """Yang et al. 2024 (2406.06484), eq. 2: S ← S (I − β k kᵀ) + β v kᵀ, y = S q."""
    S, reads = token.start[0].mT, []
    for k, v, q, beta in zip(token.k, token.v, token.q, token.rate, strict=True):
        S = S @ (torch.eye(WIDTH) - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
        reads.append(S @ q)
    return Held(reads, [S.mT])


def gated_delta_net(token):
    """Yang et al. 2024 (2412.06464), eq. 10: S ← S α (I − β k kᵀ) + β v kᵀ."""
    S, reads = token.start[0].mT, []
    for k, v, q, beta, alpha in zip(token.k, token.v, token.q, token.rate, token.keep, strict=True):
        S = S @ (alpha * (torch.eye(WIDTH) - beta * torch.outer(k, k))) + beta * torch.outer(v, k)
        reads.append(S @ q)
    return Held(reads, [S.mT])


def householder_product(token):
    """Siems et al. 2025, section 3: H ← A H + B, A = g Π_j (I − β_j k_j k_jᵀ),
    B = Σ_j Π_{i>j} (I − β_i k_i k_iᵀ) β_j k_j v_jᵀ; g = 1 in the form without a gate."""
    (H,), reads, keep = token.start, [], getattr(token, "keep", torch.ones(TIME))
    for keys, values, q, betas, g in zip(token.k, token.v, token.q, token.rate, keep, strict=True):
        A, B = g * torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH)
        for k, v, beta in zip(keys, values, betas, strict=True):
            reflection = torch.eye(WIDTH) - beta * torch.outer(k, k)
            A, B = reflection @ A, reflection @ B + beta * torch.outer(k, v)
        H = A @ H + B
        reads.append(H.mT @ q)
    return Held(reads, [H])


def momentum_delta_rule(token):
    """Behrouz et al. 2024, eqs. 13–14 for a matrix: S ← η S − θ (M k − v) kᵀ, M ← (1 − α) M + S."""
    M, reads = token.start[0].mT, []
    S = torch.zeros_like(M)
    for t, (k, v, q) in enumerate(zip(token.k, token.v, token.q, strict=True)):
        S = token.momentum[t] * S - token.rate[t] * torch.outer(M @ k - v, k)
        M = token.keep[t] * M + S
        reads.append(M @ q)
    return Held(reads, [M.mT], [S.mT])


def longhorn(token):
    """Liu et al. 2024 (2407.14207): S ← argmin_S' ‖S' − S‖² + β ‖S' k − v‖², by the system that its gradient gives."""
    S, reads = token.start[0].mT, []
    for k, v, q, beta in zip(token.k, token.v, token.q, token.rate, strict=True):
        system = torch.eye(WIDTH) + beta * torch.outer(k, k)
        S = torch.linalg.solve(system, S + beta * torch.outer(v, k), left=False)
        reads.append(S @ q)
    return Held(reads, [S.mT])


# Networks and their gradients


def mlp(activation):
    """M(x) = φ(x W¹) W²."""
    return lambda token, weights, x: activation(x @ weights[0]) @ weights[1]


def swiglu(token, weights, x):
    """Zhang et al. 2025: W² (SiLU(W¹ x) ⊙ (W³ x))."""
    gate, up, down = weights
    return (functional.silu(x @ gate) * (x @ up)) @ down


def layer_norm(token, z):
    return functional.layer_norm(z, (WIDTH,), token.gain, token.shift, eps=1e-6)


def residual_linear(token, weights, x):
    """Sun et al. 2024, TTT-Linear: f(x) = x + LN(W x + b); the last row of the matrix is b."""
    (weight,) = weights
    return x + layer_norm(token, x @ weight[:-1] + weight[-1])


def residual_mlp(token, weights, x):
    """Sun et al. 2024, TTT-MLP: f(x) = x + LN(f_MLP(x)), GELU."""
    first, second = weights
    hidden = functional.gelu(x @ first[:-1] + first[-1])
    return x + layer_norm(token, hidden @ second[:-1] + second[-1])


def descent(network, token, weights, which, loss=lambda pred, v: 0.5 * (pred - v).square().sum(-1)):
    """∇ Σ_i η_i loss(f(k_i), v_i) over the tokens `which`. With ½: the papers' η is half of this one."""
    total = sum(token.rate[i] * loss(network(token, weights, token.k[i]), token.v[i]) for i in which)
    return torch.autograd.grad(total, weights, create_graph=True)


def zeros(weights):
    return [torch.zeros_like(weight) for weight in weights]


def newton_schulz(matrix):
    """Jordan et al. 2024: five steps X ← a X + (b A + c A²) X, A = X Xᵀ, on the shorter side."""
    x = matrix / matrix.norm()
    x = x.mT if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


# Deep memories


def mini_batch_descent(network):
    """Sun et al. 2024, eq. 6 and section 2.4: W_t = W_{t−1} − η ∇ℓ(W_{t'}; x_t), t' the end of the mini-batch before,
    z_t = f(q_t; W_t)."""

    def method(token):
        weights, reads, anchor = token.start, [], []
        for t in range(TIME):
            anchor = weights if t % CHUNK == 0 else anchor
            steps = descent(network, token, anchor, [t])
            weights = [weight - step for weight, step in zip(weights, steps, strict=True)]
            reads.append(network(token, weights, token.q[t]))
        return Held(reads, weights, anchor=anchor)

    return method


def surprise_momentum(network, window=1, chunk=CHUNK):
    """Behrouz et al. 2024, eqs. 13–14 and section 3.2: S_t = η_t S_{t−1} − θ_t ∇ℓ(M_{t'}; x_t),
    M_t = (1 − α_t) M_{t−1} + S_t. With a window, the Omega rule of Behrouz et al. 2025, eq. 9:
    ∇ Σ_{i=t−c+1…t} γ_i ℓ(M_{t'}; x_i), the weights γ and the rate one gate of token i."""

    def method(token):
        M, S, reads, anchor = token.start, zeros(token.start), [], []
        for t in range(TIME):
            anchor = M if t % chunk == 0 else anchor
            steps = descent(network, token, anchor, range(max(0, t - window + 1), t + 1))
            S = [token.momentum[t] * s - step for s, step in zip(S, steps, strict=True)]
            M = [token.keep[t] * m + s for m, s in zip(M, S, strict=True)]
            reads.append(network(token, M, token.q[t]))
        return Held(reads, M, S, anchor=anchor)

    return method


def mini_batches(period):
    """The tokens of each, and whether it is whole."""
    for start in range(0, TIME, period):
        tokens = range(start, min(start + period, TIME))
        yield tokens, len(tokens) == period


def lact(token):
    """Zhang et al. 2025, section 3: chunk by chunk, apply, then update: g = ∇ Σ η_i (−f(k_i) · v_i),
    W ← W − Muon(g), each column then at its first length."""
    weights, reads, pending = token.start, [], zeros(token.start)
    for chunk, whole in mini_batches(CHUNK):
        anchor = weights
        reads += [swiglu(token, weights, token.q[t]) for t in chunk]
        g = descent(swiglu, token, weights, chunk, lambda pred, v: -(pred * v).sum())
        pending = zeros(weights) if whole else [-one for one in g]
        if whole:
            moved = [weight - newton_schulz(one) for weight, one in zip(weights, g, strict=True)]
            weights = [w * (w0.norm(dim=0) / w.norm(dim=0)) for w, w0 in zip(moved, token.start, strict=True)]
    return Held(reads, weights, pending=pending, anchor=anchor)


def atlas(token):
    """Behrouz et al. 2025, Atlas, once a chunk: S ← θ S + ∇ Σ_{last c tokens} γ_i ℓ(M; x_i),
    M ← α M − step · NewtonSchulz5(S), with the gates of the chunk's last token."""
    network = mlp(functional.gelu)
    M, S, reads, pending = token.start, zeros(token.start), [], zeros(token.start)
    for chunk, whole in mini_batches(CHUNK):
        anchor, last = M, chunk[-1]
        reads += [network(token, M, token.q[t]) for t in chunk]
        g = descent(network, token, M, range(max(0, chunk[0] + CHUNK - WINDOW), last + 1))
        pending = zeros(M) if whole else [-one for one in g]
        if whole:
            S = [token.momentum[last] * s + one for s, one in zip(S, g, strict=True)]
            M = [token.keep[last] * m - STEP * newton_schulz(s) for m, s in zip(M, S, strict=True)]
    return Held(reads, M, [-s for s in S], pending, anchor)


def continuum(network, period):
    """A block of the chain of Behrouz et al. 2025 (2512.24695): θ ← θ − Σ_{last P tokens} η_t ∇ℓ(θ_t; x_t) every P."""

    def method(token):
        weights, reads, pending = token.start, [], zeros(token.start)
        for tokens, whole in mini_batches(period):
            anchor = weights
            reads += [network(token, weights, token.q[t]) for t in tokens]
            steps = descent(network, token, weights, tokens)
            pending = zeros(weights) if whole else [-step for step in steps]
            weights = [weight - step for weight, step in zip(weights, steps, strict=True)] if whole else weights
        return Held(reads, weights, pending=pending, anchor=anchor)

    return method


# The presets


class Case(NamedTuple):
    """A preset, the recurrence that it is, its feature map, and what else is overridden; `rounding`: how far two ways
    of dividing by small singular values may differ, in units of `close`."""

    preset: str
    method: Callable
    features: Callable = silu_unit
    overrides: tuple = ()
    rounding: float = 1


OMEGA = ("period=1", "rule.transform=none", "rule.step=1", "rule.lr_max=0.1")
OMEGA = [f"hierarchy.levels.surprise.{setting}" for setting in OMEGA]
CASES = {
    "hebbian": Case("hebbian", linear_attention, elu_plus_one),
    "delta_net": Case("delta_net", delta_net),
    "gated_delta_net": Case("gated_delta_net", gated_delta_net),
    "delta_product": Case("delta_product", householder_product, overrides=(f"vars.writers={WRITERS}",)),
    "delta_product-no-gate": Case(
        "delta_product", householder_product, overrides=("hierarchy.levels.surprise.rule.forget=0",)
    ),
    "longhorn": Case("longhorn", longhorn, lambda x: x),
    "momentum_delta": Case("momentum_delta", momentum_delta_rule),
    "ttt_linear": Case("ttt_linear", mini_batch_descent(residual_linear), unit),
    "ttt_mlp": Case("ttt_mlp", mini_batch_descent(residual_mlp), unit),
    "titans": Case("titans", surprise_momentum(mlp(functional.silu))),
    "titans-every-token": Case("titans", surprise_momentum(mlp(functional.silu), chunk=1), overrides=("vars.chunk=1",)),
    "lact": Case("lact", lact, rounding=1000),
    "atlas": Case("atlas", atlas, overrides=(f"vars.window={WINDOW}",), rounding=1000),
    "omega": Case(
        "atlas", surprise_momentum(mlp(functional.gelu), WINDOW), overrides=(*OMEGA, f"vars.window={WINDOW}")
    ),
    "omega-every-token": Case(
        "atlas",
        surprise_momentum(mlp(functional.gelu), 3, chunk=1),
        overrides=(*OMEGA, "vars.window=3", "vars.chunk=1"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_preset_is_its_papers_recurrence(case, tmp_path):
    preset, method, features, overrides, rounding = CASES[case]
    memory = build_preset(preset, tmp_path, f"vars.chunk={CHUNK}", *overrides)
    assert isinstance(memory, FastWeights)
    x = torch.randn(2, TIME, DIM, requires_grad=True)
    out = memory(x)
    agree(memory, x, Out(out.y, held_by(memory, out.state), {}), plain(memory, x, method, features), rounding)


def test_a_chain_of_memories_is_nested_learnings(tmp_path):
    """`cms`: each memory of the chain reads what the one before it gave."""
    memory = build_preset("cms", tmp_path, *(f"vars.periods.{name}={period}" for name, period in PERIODS.items()))
    x = torch.randn(2, TIME, DIM, requires_grad=True)
    out = memory(x)
    y, expected = x, {}
    for name, period in PERIODS.items():
        y, expected[name], _ = plain(memory.get_submodule(name), y, continuum(mlp(functional.silu), period), unit)
    held = {name: held_by(memory.get_submodule(name), out.state[name]) for name in PERIODS}
    agree(memory, x, Out(out.y, held, {}), Out(y, expected, {}))


def agree(memory, x, out, expected, rounding=1.0):
    """Equal in values and in what is held, and so in the gradients of all of it by every slow weight and x."""
    close(tensors(out), tensors(expected), rounding)
    close(gradients(memory, x, out), gradients(memory, x, expected), rounding)


@pytest.mark.parametrize("preset", sorted({case.preset for case in CASES.values()} | {"cms"}))
def test_a_preset_holds_where_one_token_repeats(preset, tmp_path):
    """In float32 and at the sizes that it comes with, all keys alike: the writes of a chunk add up, the outer gradient
    runs through a thousand of them, and neither grows without bound. Hebbian sums do, and are normed when read."""
    memory = fresh_preset(preset, tmp_path).float()
    x = functional.rms_norm(torch.randn(1, 1, memory.dim_in).float(), (memory.dim_in,)).requires_grad_()
    y, _, aux = memory(x.expand(-1, 1024, -1))
    (gradient,) = torch.autograd.grad((y * torch.randn(y.shape).float()).sum(), x)
    assert gradient.norm() < 1e5
    for surprise in aux.values():
        assert surprise[:, -64:].mean() < surprise[:, :64].mean()
