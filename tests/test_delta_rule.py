"""`signal_at: token` is the papers' sequential delta rules, each written as its paper has it: one matrix, one token
after another, d_value × d_key."""

import pytest
import torch
from conformance import close

from losses.recall import mse
from metamem.memory.fast_weights import FastWeights
from metamem.memory.level import TokenLevel

pytestmark = pytest.mark.usefixtures("float64")

DIM, HEADS, TIME = 8, 2, 19


def build(*levels, **settings):
    torch.manual_seed(0)
    memory = FastWeights(DIM, levels, **{"heads": HEADS, "chunk": 8, "signal_at": "token", **settings})
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def level(name="fast", **settings):
    return TokenLevel(name, {mse: 1.0}, **settings)


class Tokens:
    """What one row and head of a memory writes and asks, as plain lists of vectors and scalars."""

    def __init__(self, memory, x, row, head):
        writes = memory.writer(x, x.dtype)
        self.k, self.v = writes.keys[row, head, :, 0], writes.values[row, head, :, 0]
        self.q = memory.reader.query(x, x.dtype)[row, head, :, 0]
        self.start = memory.init[0][head].mT  # ours is d_key × d_value
        for name, gates in writes.gates.items():
            eta = gates.lr[row, head, :, 0]
            alpha = None if gates.log_keep is None else gates.log_keep[row, head].exp()
            beta = None if gates.log_momentum is None else gates.log_momentum[row, head].exp()
            setattr(self, name, (eta, alpha, beta))


def delta_net(token):
    """Yang et al. 2024, eq. 2: S_t = S_{t-1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ."""
    S, identity = token.start, torch.eye(DIM // HEADS)
    beta, _, _ = token.fast
    for k, v, q, b in zip(token.k, token.v, token.q, beta, strict=True):
        S = S @ (identity - b * torch.outer(k, k)) + b * torch.outer(v, k)
        yield S @ q


def gated_delta_net(token):
    """Yang, Kautz & Hatamizadeh 2025, eq. 10: S_t = S_{t-1} α_t (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ.

    There the error is of the memory after its decay, here (as in Titans) before it: k W − v, not α k W − v. The
    same family: rate β = η / α, value α v.
    """
    S, identity = token.start, torch.eye(DIM // HEADS)
    eta, alpha, _ = token.fast
    for k, v, q, e, a in zip(token.k, token.v, token.q, eta, alpha, strict=True):
        b = e / a
        S = S @ (a * (identity - b * torch.outer(k, k))) + b * torch.outer(a * v, k)
        yield S @ q


def linear_titans(token):
    """Behrouz et al. 2025, eqs. 13–14: S_t = η_t S_{t-1} − θ_t ∇ℓ(M_{t-1}; x_t), M_t = (1 − α_t) M_{t-1} + S_t."""
    M = token.start
    S = torch.zeros_like(M)
    theta, keep, eta = token.fast
    for t, (k, v, q) in enumerate(zip(token.k, token.v, token.q, strict=True)):
        S = eta[t] * S - theta[t] * torch.outer(M @ k - v, k)
        M = keep[t] * M + S
        yield M @ q


def momentum_delta_rule(token):
    """Polyak's momentum on the delta rule, nothing forgotten."""
    M = token.start
    S = torch.zeros_like(M)
    eta, _, beta = token.fast
    for t, (k, v, q) in enumerate(zip(token.k, token.v, token.q, strict=True)):
        S = beta[t] * S + eta[t] * torch.outer(v - M @ k, k)
        M = M + S
        yield M @ q


def forgetting_to_init(token):
    """W_init + Δ, where only Δ fades."""
    delta = torch.zeros_like(token.start)
    eta, alpha, _ = token.fast
    for t, (k, v, q) in enumerate(zip(token.k, token.v, token.q, strict=True)):
        delta = alpha[t] * delta - eta[t] * torch.outer((token.start + delta) @ k - v, k)
        yield (token.start + delta) @ q


def two_timescales(token):
    """A fast component that fades and a slow one that moves every 4 tokens, by the sum of what they asked for; each
    signal is the error of both together."""
    fast, slow = torch.zeros_like(token.start), torch.zeros_like(token.start)
    asked, momentum = torch.zeros_like(fast), torch.zeros_like(fast)
    eta, alpha, _ = token.fast
    eta_slow, alpha_slow, beta_slow = token.slow
    for t, (k, v, q) in enumerate(zip(token.k, token.v, token.q, strict=True)):
        error = torch.outer((token.start + fast + slow) @ k - v, k)
        fast = alpha[t] * fast - eta[t] * error
        asked = asked + eta_slow[t] * error
        yield (token.start + fast + slow) @ q
        if t % 4 == 3:
            momentum = beta_slow[t] * momentum - asked
            slow, asked = alpha_slow[t] * slow + momentum, torch.zeros_like(asked)


LEARNED = {"momentum": "learned", "forget": "learned"}
RULES = {
    "DeltaNet": (delta_net, [level()]),
    "GatedDeltaNet": (gated_delta_net, [level(forget="learned", forget_to="zero")]),
    "linear-Titans": (linear_titans, [level(**LEARNED, forget_to="zero")]),
    "momentum-delta-rule": (momentum_delta_rule, [level(momentum="learned")]),
    "forgetting-to-init": (forgetting_to_init, [level(forget="learned")]),
    "two-timescales": (two_timescales, [level(forget="learned"), level("slow", period=4, lr_max=0.3, **LEARNED)]),
}


@pytest.mark.parametrize("rule", RULES)
def test_token_signals_are_the_sequential_rule(rule):
    naive, levels = RULES[rule]
    memory = build(*levels)
    x = torch.randn(2, TIME, DIM, requires_grad=True)
    reads = [
        [torch.stack(list(naive(Tokens(memory, x, row, head)))) for head in range(HEADS)] for row in range(x.shape[0])
    ]
    expected = memory.reader(torch.stack([torch.stack(row) for row in reads]).unsqueeze(3))
    y = memory(x).y
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    of = {"x": x, **dict(memory.named_parameters())}
    weight = torch.randn_like(y)
    slopes = [torch.autograd.grad((weight * out).sum(), list(of.values())) for out in (y, expected)]
    close(*(dict(zip(of, slope, strict=True)) for slope in slopes))


def test_a_rate_of_one_recalls_what_was_just_written():
    """Of a unit key, a step of η = 1 stores the value whole, whatever was there: the delta rule overwrites."""
    memory = build(level(lr=1.0))
    with torch.no_grad():
        memory.reader.queries.weight.copy_(memory.writer.keys.weight)
        memory.reader.norm.weight.fill_(1.0)
        x = torch.randn(3, TIME, DIM)
        values = memory.writer(x, x.dtype).values
        torch.testing.assert_close(memory(x).y, memory.reader(values), rtol=1e-9, atol=1e-11)


def test_orthogonal_keys_keep_apart():
    """With a rate of one and keys that are orthogonal, everything written is still there at the end, exactly."""
    memory = build(level(lr=1.0), heads=1)
    with torch.no_grad():
        memory.writer.keys.weight.copy_(torch.eye(DIM))
        memory.reader.queries.weight.copy_(torch.eye(DIM))
        x = torch.eye(DIM)[torch.randperm(DIM)].unsqueeze(0)
        state = memory(x).state
        again = memory(x, state)
    assert again.aux["surprise"].abs().max() < 1e-20


def test_repeating_a_token_converges_by_one_minus_eta():
    """The error of a repeated token shrinks by (1 − η) each time: surprise by its square."""
    memory = build(level(lr=0.25))
    with torch.no_grad():
        surprise = memory(torch.randn(2, 1, DIM).expand(2, TIME, DIM)).aux["surprise"]
    torch.testing.assert_close(surprise, surprise[:, :1] * 0.75 ** (2 * torch.arange(TIME)), rtol=1e-8, atol=1e-20)


def test_long_correlated_input_stays_finite_in_float32():
    """Token signals are stable for any η < 1: 3,000 near-copies of one token, momentum and forgetting learned."""
    memory = build(level(**LEARNED, forget_to="zero"), chunk=64).float()
    x = (torch.randn(1, 1, DIM) + 0.1 * torch.randn(1, 3000, DIM)).float()
    out = memory(x)
    out.y.square().sum().backward()
    assert out.y.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in memory.parameters())
