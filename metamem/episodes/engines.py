"""Engines: who runs the inner loop. One protocol; where two compute the same thing they agree on the outer gradient.

    functional     our inner loop, tasks batched: by hand where the module allows, else by torch.func.vmap
    loop           our inner loop, task by task with torch.autograd.grad: for modules that vmap cannot run
    torchopt       our inner loop with torchopt's functional transformations
    torchopt_meta  torchopt's MetaSGD, MetaAdam and MetaAdamW, task by task
    higher         higher's innerloop_ctx, task by task; Adam corrected
    implicit       the solution of the regularised inner problem, by torchopt's implicit differentiation (iMAML)

What an engine cannot do, or gets wrong, is refused before it runs, with what can.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from metamem.config.errors import suggest
from metamem.episodes.executors import LOOP, Executor, fastest
from metamem.episodes.level import Adapted, Batch, EngineError, EpisodeLevel
from metamem.episodes.transforms import transform
from metamem.episodes.unroll import unroll


def adapt_functional(module: nn.Module, support: Batch, level: EpisodeLevel) -> Adapted:
    """Tasks batched."""
    return unroll(module, support, level, fastest(module), transform(level.optimizer))


def adapt_loop(module: nn.Module, support: Batch, level: EpisodeLevel) -> Adapted:
    """Task by task."""
    return unroll(module, support, level, LOOP, transform(level.optimizer))


@dataclass(frozen=True)
class Engine:
    """Where an engine's functions are, found when it is first asked for, and the packages that they need.

    `adapt` and `refusal` are `module:function`; `batched` says whether its tasks run as one batch.
    """

    adapt: str
    refusal: str | None = None
    packages: tuple[str, ...] = ()
    batched: bool = True


ENGINES: Mapping[str, Engine] = {
    "functional": Engine("engines:adapt_functional"),
    "loop": Engine("engines:adapt_loop", batched=False),
    "torchopt": Engine("with_torchopt:adapt", packages=("torchopt",)),
    "torchopt_meta": Engine("with_torchopt:adapt_meta", "with_torchopt:refusal_meta", ("torchopt",), batched=False),
    "higher": Engine("with_higher:adapt", "with_higher:refusal", ("higher",), batched=False),
    "implicit": Engine("implicit:adapt", "implicit:refusal", ("torchopt",)),
}


def adapt(module: nn.Module, support: Batch, level: EpisodeLevel) -> Adapted:
    """The module's parameters after the inner loop of a level on each task's support set.

    Nothing of the module changes. Under torch.no_grad the result is detached, else the outer gradient flows through it
    as far as `level.unroll` says. Raises EngineError for what the level's engine cannot do.
    """
    refuse(module, level)
    return _function(level.engine, ENGINES[level.engine].adapt)(module, support, level)


def predict(
    module: nn.Module, adapted: Adapted, inputs: Shaped[Tensor, "tasks examples *features"], level: EpisodeLevel
) -> Float[Tensor, "tasks examples *out"]:
    """The predictions of each task's adapted module, inputs and predictions [tasks, examples, …]."""
    return executor(module, level).predict(module, adapted.fast, adapted.buffers, inputs)


def refuse(module: nn.Module, level: EpisodeLevel) -> None:
    """Raises EngineError where the level's engine cannot do what the level asks, or would get it wrong."""
    if level.engine not in ENGINES:
        raise EngineError(f"there is no engine {level.engine!r}{suggest(level.engine, ENGINES)}")
    reference = ENGINES[level.engine].refusal
    reason = _function(level.engine, reference)(module, level) if reference else None
    if reason is not None:
        raise EngineError(f"engine {level.engine!r} {reason}; the engine 'functional' has no such limit")
    if level.optimizer.name == "sgd" and level.optimizer.nesterov and not level.optimizer.momentum:
        raise EngineError("nesterov needs a momentum above 0")


def executor(module: nn.Module, level: EpisodeLevel) -> Executor:
    """How predictions of a level's engine are computed: batched, or task by task as the engine itself runs."""
    return fastest(module) if ENGINES[level.engine].batched else LOOP


def _function(engine: str, reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    for package in ENGINES[engine].packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            others = ", ".join(repr(other) for other, entry in ENGINES.items() if package not in entry.packages)
            raise EngineError(f"engine {engine!r} needs {package} ({error}); engines without it: {others}") from error
    return getattr(importlib.import_module(f"metamem.episodes.{module}"), name)
