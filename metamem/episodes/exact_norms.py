"""Normalisation whose second derivative is right under vmap.

torch 2.13's batching rules for the gradients of layer, batch, group and instance norm take the mean and deviation as
constants in the gradient of the gain: vmap(grad(loss)) is right, and its outer gradient is silently wrong (found by
tests/test_episodes.py, which fails without this file). Without a gain inside, the rules are right. So here a norm runs
without, and gain and shift come after it as a product and a sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class ExactNorms(TorchFunctionMode):
    """Within it, layer, batch, group and instance norms apply gain and shift by themselves."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        names = ARGUMENTS.get(func)
        if names is None:
            return func(*args, **(kwargs or {}))
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        gain, shift = given.get("weight"), given.get("bias")
        y = func(**{**given, "weight": None, "bias": None})
        channels = func is not functional.layer_norm
        return _affine(y, gain, shift, channels)


def _affine(y: Tensor, gain: Tensor | None, shift: Tensor | None, channels: bool) -> Tensor:
    """y ⊙ gain + shift, which belong to the second axis or to the last ones."""

    def aligned(value: Tensor) -> Tensor:
        return value.view(-1, *(1,) * (y.dim() - 2)) if channels else value

    y = y if gain is None else y * aligned(gain)
    return y if shift is None else y + aligned(shift)


NORMS = (functional.layer_norm, functional.batch_norm, functional.group_norm, functional.instance_norm)
ARGUMENTS = {norm: tuple(inspect.signature(norm).parameters) for norm in NORMS}
