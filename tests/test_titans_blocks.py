"""Titans' three uses of a memory against loops written from the paper, token by token and row by row (Behrouz et al.
2024, arXiv 2501.00663): as context (equations 21 to 25), as gate (26 to 28), as layer (29 to 31); the memory is a
linear delta rule or Titans' own (9 to 15). In each, what the paper writes of whole segments is taken token by token."""

import pytest
import torch
from conformance import DIM, GATES, LEARNED, TIME, Entry, fast
from torch.nn import functional

from metamem.attention import Attention
from metamem.config.schema import ConnectionConfig
from metamem.memory.context import MemoryAsContext
from metamem.memory.fast_weights import FastWeights
from metamem.memory.persistent_tokens import PersistentTokens
from metamem.network import Network

HEADS, SEGMENT, WINDOW, PERSISTENT = 2, 5, 4, 3


def delta_rule():
    return FastWeights(DIM, [fast()], HEADS, chunk=4, signal_at="token")


def titans():
    return FastWeights(DIM, [fast(**LEARNED, forget_to="zero")], HEADS, hidden=[6], chunk=3)


def as_context(memory):
    return MemoryAsContext(DIM, memory, HEADS, SEGMENT, PERSISTENT)


def as_gate(memory):
    attention = Attention(DIM, HEADS, WINDOW, PERSISTENT)
    edges = [(["in"], "attention", "feed"), (["in"], "memory", "feed"), (["attention", "memory"], "out", "gate")]
    modules = {"attention": attention, "memory": PersistentTokens(PERSISTENT, memory)}
    return Network(modules, [ConnectionConfig(*edge) for edge in edges], DIM)


def as_layer(memory):
    edges = [(["in"], "memory", "feed"), (["memory"], "attention", "feed"), (["attention"], "out", "feed")]
    modules = {"memory": memory, "attention": Attention(DIM, HEADS, WINDOW)}
    return PersistentTokens(PERSISTENT, Network(modules, [ConnectionConfig(*edge) for edge in edges], DIM))


# Written from the paper


class NaiveMemory:
    """∇ at the weights of the chunk's start; S ← β S − η ∇, M ← α M + S; one row of a batch, weights per head."""

    def __init__(self, memory):
        self.memory, self.level = memory, memory.levels[0]
        self.weights = list(memory.init)
        self.momentum = [torch.zeros_like(weight) for weight in self.weights]
        self.anchor, self.position = self.weights, 0

    def copy(self):
        other = NaiveMemory(self.memory)
        other.weights, other.momentum = self.weights, self.momentum
        other.anchor, other.position = self.anchor, self.position
        return other

    def network(self, x, weights):
        for weight in weights[:-1]:
            x = functional.silu(torch.einsum("hi,hio->ho", x, weight))
        return torch.einsum("hi,hio->ho", x, weights[-1])

    def write(self, x):
        writer, gates = self.memory.writer, self.memory.writer.gates["fast"]
        key = functional.normalize((writer.keys.weight @ x).reshape(HEADS, -1), dim=-1)
        value = (writer.values.weight @ x).reshape(HEADS, -1)
        rate = self.level.lr_max * gates["lr"](x).sigmoid()[:, None, None]
        keep = 1 - gates["forget"](x).sigmoid()[:, None, None] if "forget" in gates else 1
        momentum = gates["momentum"](x).sigmoid()[:, None, None] if "momentum" in gates else 0
        chunk = 1 if self.memory.signal_at == "token" else self.memory.chunk
        if self.position % chunk == 0:
            self.anchor = self.weights
        anchor = [weight.clone() for weight in self.anchor]  # ∂ loss / ∂ these alone: x may depend on the weights too
        loss = 0.5 * (self.network(key, anchor) - value).square().sum()
        slopes = torch.autograd.grad(loss, anchor, create_graph=True)
        self.momentum = [momentum * s - rate * slope for s, slope in zip(self.momentum, slopes, strict=True)]
        self.weights = [keep * w + s for w, s in zip(self.weights, self.momentum, strict=True)]
        self.position += 1

    def read(self, x):
        reader = self.memory.reader
        query = functional.normalize((reader.queries.weight @ x).reshape(HEADS, -1), dim=-1)
        return reader.output.weight @ reader.norm(self.network(query, self.weights)).flatten()

    def step(self, x):
        self.write(x)
        return self.read(x)


def turn(x, place):
    """Each pair of features (i, i + half) of a head turned by place · 10000^(−i/half)."""
    half = x.shape[-1] // 2
    angle = place * 10_000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(half), angle)
    return torch.cat([turned.real, turned.imag], -1)


def attend(query, place, fixed, placed, w_q, w_kv, w_o):
    """softmax over the learned tokens, which have no place, and (token, place) pairs."""
    q = (w_q @ query).reshape(HEADS, -1)
    scores, values = [], []
    for token, where in [*((token, None) for token in fixed), *placed]:
        key, value = (w_kv @ token).reshape(2, HEADS, -1)
        facing = q if where is None else turn(q, place)
        scores.append((facing * (key if where is None else turn(key, where))).sum(-1) / key.shape[-1] ** 0.5)
        values.append(value)
    weights = torch.stack(scores).softmax(0)
    return w_o @ (weights[..., None] * torch.stack(values)).sum(0).flatten()


def gated(gate, a, b):
    g = gate.project(torch.cat([a, b])).sigmoid()
    return g * a + (1 - g) * b


def windowed(attention, tokens, t, fixed):
    """Sliding-window attention of the token at t."""
    w_q, w_kv = attention.project.weight.split([DIM, 2 * DIM])
    seen = [(tokens[s], s) for s in range(max(0, t - WINDOW + 1), t + 1)]
    return attend(tokens[t], t, fixed, seen, w_q, w_kv, attention.output.weight)


def naive_context(block, x):
    memory, outputs = NaiveMemory(block.memory), []
    for t, token in enumerate(x):
        if t % SEGMENT == 0:
            recall, retrieved, segment = memory.copy(), [], []
        retrieved.append((recall.read(token), t % SEGMENT))
        segment.append((token, SEGMENT + t % SEGMENT))
        y = attend(
            *segment[-1],
            block.persistent,
            retrieved + segment,
            block.queries.weight,
            block.keys_values.weight,
            block.output.weight,
        )
        outputs.append(gated(block.gate, y, memory.step(y)))
    return torch.stack(outputs)


def naive_gate(block, x):
    memory, outputs = NaiveMemory(block.memory.memory), []
    for token in block.memory.tokens:
        memory.write(token)
    for t, token in enumerate(x):
        y = windowed(block.attention, x, t, block.attention.persistent)
        outputs.append(gated(block.out_gate, y, memory.step(token)))
    return torch.stack(outputs)


def naive_layer(block, x):
    memory, attention = NaiveMemory(block.memory.memory), block.memory.attention
    y = [memory.step(token) for token in [*block.tokens, *x]]
    return torch.stack([windowed(attention, y, t, []) for t in range(PERSISTENT, len(y))])


BLOCKS = {"context": (as_context, naive_context), "gate": (as_gate, naive_gate), "layer": (as_layer, naive_layer)}
MEMORIES = {"delta-rule": delta_rule, "titans": titans}


def entry(block, memory):
    return Entry(lambda: BLOCKS[block][0](MEMORIES[memory]()))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("block", BLOCKS)
def test_values_and_gradients_are_those_of_the_paper_s_loop(block, memory):
    module, naive = entry(block, memory).build(), BLOCKS[block][1]
    x = torch.randn(2, TIME, DIM, requires_grad=True)
    y, expected = module(x).y, torch.stack([naive(module, row) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    of = {"x": x, **dict(module.named_parameters())}
    weights = torch.randn_like(y)
    mine = torch.autograd.grad((weights * y).sum(), list(of.values()))
    wanted = torch.autograd.grad((weights * expected).sum(), list(of.values()))
    for name, one, other in zip(of, mine, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert other.abs().max() > 1e-9, f"{name} has no gradient"


# A graph has no `write`, and its memory's surprise, on which `descent` looks, is named by its path.
GRAPH = [name for name in GATES if name not in ("write_then_read", "descent")]


@pytest.mark.parametrize("gate", GRAPH)
def test_memory_as_layer_passes_the_gates_of_a_memory(gate):
    GATES[gate](entry("layer", "delta-rule"))


@pytest.mark.parametrize("gate", ["causality", "streaming_law", "reset_of_rows", "isolation"])
def test_memory_as_gate_passes_the_gates_of_a_memory(gate):
    GATES[gate](entry("gate", "delta-rule"))
