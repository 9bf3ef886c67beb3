"""Small models of real modules, texts to read, and the streaming law of any stateful module."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from metamem import Config, Network, build, load_config
from metamem.state import State, Stateful, flatten

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SENTENCE = "In the beginning was the word, and the word was with memory. "

# The quickstart's model at a size at which a test can afford it.
SMALL = (
    "vars.dim=8",
    "vars.heads=2",
    "vars.blocks=1",
    "vars.window=4",
    "vars.memory.chunk=4",
    "training.batch=2",
    "training.length=16",
    "training.warmup=0",
)

# embed -> mlp -> head over 7 tokens: small enough to write out what learns in it. The hierarchy comes below it.
TINY = """
name: tiny
task: {name: none}
network:
  modules:
    embed: {kind: embedding, size: 7, dim: 6}
    mlp: {kind: mlp, dim: 6, expansion: 1, activation: tanh}
    norm: {kind: rms_norm, dim: 6}
    head: {kind: linear, dim_in: 6, dim_out: 7}
  connections:
    - {from: in, to: embed}
    - {from: embed, to: mlp}
    - {from: [embed, mlp], to: sum, by: sum}
    - {from: sum, to: norm}
    - {from: norm, to: head}
    - {from: head, to: out}
"""
# The same with every kind of state.
RECURRENT = (
    TINY.replace("mlp: {kind: mlp,", "attention: {kind: attention, dim: 6, heads: 1, window: 3}\n    mlp: {kind: mlp,")
    .replace("norm:", "memory: {kind: fast_weights, dim: 6, heads: 2, signal_at: token, chunk: 4}\n    norm:")
    .replace("from: embed, to: mlp}", "from: embed, to: attention}\n    - {from: attention, to: mlp}")
    .replace("from: sum, to: norm", "from: sum, to: memory}\n    - {from: memory, to: norm")
)
TOKEN_LEVEL = """
    - {name: surprise, clock: token, objective: {losses.recall.mse: 1.0}, rule: {lr_max: 0.5}, groups: [memory]}"""
STEP_LEVEL = """
    - {name: task, clock: step, objective: {losses.outer.next_token: 1.0},
       optimizer: {name: sgd, lr: 0.1}, groups: [all]}
"""
GROUPS = """
hierarchy:
  groups:
    all: {match: "**"}
    middle: {match: ["mlp.**", "norm.**"], scope: stream}
    ends: {match: "head.**", scope: stream}%s
  levels:"""
MEMORY_GROUP = """
    memory: {match: "memory.init.**", scope: sample}"""


def config_of(text: str, *overrides: str) -> Config:
    """The config of a YAML text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.yaml"
        path.write_text(text)
        return load_config(path, overrides)


def tiny(inner: str = "", *overrides: str) -> Config:
    """The tiny model with inner levels and one step level."""
    return config_of(TINY + GROUPS % "" + inner + STEP_LEVEL, *overrides)


def recurrent(inner: str = "", *overrides: str) -> Config:
    """The tiny model with an attention and a memory, inner levels and one step level."""
    return config_of(RECURRENT + GROUPS % MEMORY_GROUP + TOKEN_LEVEL + inner + STEP_LEVEL, *overrides)


def with_memory(memory: str, glob: str, *overrides: str) -> Config:
    """The recurrent model with another memory, a line of YAML, whose initial weights the glob names."""
    line = "memory: {kind: fast_weights, dim: 6, heads: 2, signal_at: token, chunk: 4}"
    group = MEMORY_GROUP.replace("memory.init.**", glob)
    text = RECURRENT.replace(line, f"memory: {memory}") + GROUPS % group + TOKEN_LEVEL + STEP_LEVEL
    return config_of(text, *overrides)


def inner_level(name: str = "stream", **settings: object) -> str:
    """A line of YAML: an inner level that moves the group `middle` every other token, as far as not said otherwise."""
    level = {
        "period": 2,
        "objective": "{losses.outer.next_token: 1.0}",
        "optimizer": "{name: sgd, lr: 0.3}",
        "groups": "[middle]",
        **settings,
    }
    return f"\n    - {{name: {name}, clock: inner, " + ", ".join(f"{k}: {v}" for k, v in level.items()) + "}"


def small_quickstart(*overrides: str, name: str = "quickstart") -> Config:
    """A shipped config at a small size."""
    return load_config(CONFIGS / f"{name}.yaml", [*SMALL, *overrides])


def shaken(config: Config, by: float = 0.3) -> Network:
    """The model of a config with random slow weights: what starts at zero hides what depends on it."""
    network = build(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return network


def write_text(path: Path, size: int = 4000) -> Path:
    """A text that a model of any size learns something from."""
    path.write_text((SENTENCE * (size // len(SENTENCE) + 1))[:size])
    return path


# Objectives that a config can name as `small_models.brier`.


def brier(pred: Float[Tensor, "*tokens vocabulary"], target: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """Σ (softmax(pred) − onehot(target))²."""
    wanted = functional.one_hot(target, pred.shape[-1]).to(pred.dtype)
    return (pred.softmax(-1) - wanted).square().sum(-1)


def kinked(pred: Float[Tensor, "*tokens vocabulary"], target: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """Finite everywhere, its gradient nowhere."""
    return (pred - pred.detach()).square().sum(-1).sqrt()


# The streaming law


def in_pieces(module: nn.Module, x: Tensor, cuts: Iterable[int], state: State | None = None) -> tuple[Tensor, State]:
    """x in pieces that end at `cuts`, the state carried from piece to piece."""
    outputs, start, after = [], 0, state
    for stop in [*sorted(cuts), x.shape[1]]:
        y, after, *_ = module(x[:, start:stop], after)
        outputs.append(y)
        start = stop
    assert after is not None
    return torch.cat(outputs, 1), after


def named(y: Tensor, state: State) -> dict[str, Tensor]:
    """All that a module gives, by name."""
    return {"y": y, **{key: value for key, value in flatten(state).items() if value is not None}}


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], rtol: float = 1e-8, atol: float = 1e-10) -> None:
    """Equal up to float64's rounding."""
    assert one.keys() == other.keys()
    for name in one:
        explain = {"msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol, **explain)


def slopes(module: nn.Module, x: Tensor, y: Tensor, state: State) -> dict[str, Tensor]:
    """The gradient of every parameter (and of x) of a scalar that depends on every number of output and state."""
    generator = torch.Generator().manual_seed(7)
    total = y.new_zeros(())
    for tensor in named(y, state).values():
        if tensor.is_floating_point():
            total = total + (torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * tensor).sum()
    of = dict(module.named_parameters()) | ({"x": x} if x.requires_grad else {})
    found = torch.autograd.grad(total, list(of.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(of, found, strict=True))


def streaming_law(module: Stateful, x: Tensor, examples: int = 10) -> None:
    """Any split gives the outputs, state and gradients of one call; a row that is reset in mid-stream goes on as a
    fresh one, the others as if nothing had happened."""
    batch, time = x.shape[:2]
    y, state, *_ = module(x)
    whole, steepness = named(y, state), slopes(module, x, y, state)
    cutting = st.sets(st.integers(1, time - 1), max_size=time - 1)

    @settings(max_examples=examples)
    @given(cuts=cutting)
    def split(cuts: set[int]) -> None:
        pieces = in_pieces(module, x, cuts)
        close(named(*pieces), whole)
        close(slopes(module, x, *pieces), steepness)

    @settings(max_examples=examples)
    @given(cuts=cutting, at=st.integers(1, time - 1), rows=st.lists(st.booleans(), min_size=batch, max_size=batch))
    def reset(cuts: set[int], at: int, rows: list[bool]) -> None:
        chosen = torch.tensor(rows)
        with torch.no_grad():
            before = in_pieces(module, x[:, :at], {cut for cut in cuts if cut < at})[1]
            late = {cut - at for cut in cuts if cut > at}
            rest = named(*in_pieces(module, x[:, at:], late, module.reset_state(before, chosen)))
            if any(rows):
                fresh, after, *_ = module(x[chosen, at:])
                close({key: value[chosen] for key, value in rest.items()}, named(fresh, after))
        if not all(rows):
            gone_on = {key: value[~chosen] for key, value in whole.items()}
            gone_on["y"] = gone_on["y"][:, at:]
            close({key: value[~chosen] for key, value in rest.items()}, gone_on)

    split()
    reset()
