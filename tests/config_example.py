"""A valid config and stand-ins for what it names: shared by the tests of the loader and of `metamem check`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from metamem.config import Config, ConfigError, load_config, ownership, resolve_objectives
from metamem.registry import MODULES, TASKS, check_options

TEXT = """\
name: example
vars: {dim: 8}
task:
  name: reading
  train: [web]
network:
  modules:
    embed: {kind: embedding, size: 16, dim: "${vars.dim}"}
    blocks:
      kind: network
      repeat: 2
      modules:
        memory: {kind: fast_weights, dim: "${vars.dim}", heads: 2}
      connections:
        - {from: in, to: memory}
        - {from: [in, memory], to: out, by: sum}
    head: {kind: linear, dim_in: "${vars.dim}", dim_out: 16}
  connections:
    - {from: in, to: embed}
    - {from: embed, to: blocks}
    - {from: blocks, to: head}
    - {from: head, to: out}
hierarchy:
  groups:
    memory: {match: "blocks.*.memory.**", scope: sample}
    body: {match: "**", scope: meta}
  levels:
    - {name: surprise, clock: token, period: 1, objective: {losses.recall.mse: 1.0},
       rule: {signal: backprop, lr: learned, momentum: learned, forget: 0.1}, groups: [memory]}
    - {name: stream, clock: inner, period: 256, objective: {losses.outer.next_token: 1.0},
       optimizer: {name: sgd, lr: 1e-2}, groups: [body], unroll: 4}
    - {name: task, clock: step, period: 1, objective: {losses.outer.next_token: 1.0},
       optimizer: {name: adamw, lr: 3e-3}, groups: [body]}
training: {steps: 2000, batch: 16, length: 512, gradient_clip: null}
"""


def embedding(size: int, dim: int) -> nn.Module:
    return nn.Embedding(size, dim)


def fast_weights(dim: int, heads: int = 1) -> nn.Module:
    return nn.Linear(dim, dim)


def linear(dim_in: int, dim_out: int) -> nn.Module:
    return nn.Linear(dim_in, dim_out)


def network(modules: dict, connections: list, repeat: int | None = None) -> nn.Module:
    return nn.ModuleList(nn.ModuleDict({"memory": fast_weights(8)}) for _ in range(repeat or 1))


class reading:
    def __init__(self, train: tuple[str, ...] = ("web",)) -> None:
        self.train = train

    def describe(self) -> str:
        return f"train: {', '.join(self.train)}"


@contextmanager
def registered() -> Iterator[None]:
    """The registries with the stand-ins only."""
    modules = {f.__name__: f for f in (embedding, fast_weights, linear, network)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULES, "_constructors", modules)
        patch.setattr(TASKS, "_constructors", {"reading": reading})
        yield


def model() -> nn.Module:
    """What the example builds."""
    return nn.ModuleDict({"embed": embedding(16, 8), "blocks": network({}, [], 2), "head": linear(8, 16)})


NAMES = [name for name, _ in model().named_parameters()]


def load(text: str = TEXT, *overrides: str, name: str = "c.yaml") -> Config:
    """Everything that is checked before a network is built."""
    Path(name).write_text(text, encoding="utf-8")
    config = load_config(Path(name), overrides)
    check_options(config)
    resolve_objectives(config)
    ownership(NAMES, config.hierarchy)
    return config


def error_of(action: Callable[[], Any]) -> str:
    """The one line of the `ConfigError` that the action must raise."""
    with pytest.raises(ConfigError) as error:
        action()
    text = str(error.value)
    assert text and len(text.splitlines()) == 1
    return text
