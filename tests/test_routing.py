"""The router: gates on the writes of a memory, learned through the inner updates."""

import functools
import itertools

import pytest
import torch
from conformance import close, gradients, tensors

from losses.recall import mse
from metamem.config import RouterConfig
from metamem.memory.fast_weights import FastWeights
from metamem.memory.level import TokenLevel

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


# The executors, the splits of a stream, and causality


@pytest.mark.parametrize(
    ("kind", "granularity", "memory"),
    [
        *itertools.product(KINDS, GRANULARITIES, ("delta", "mlp")),
        *itertools.product(("dense", "topk", "chunk"), GRANULARITIES, ("linear", "swiglu")),
    ],
)
def test_gated_writes_are_the_recurrence(kind, granularity, memory):
    """Values, state and gradients: products of matrices, the equations token by token, and autograd of the loss."""
    executors_agree(build(KINDS[kind] | GRANULARITIES[granularity], **MEMORIES[memory]), inputs())
