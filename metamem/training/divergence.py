"""A training that is no longer finite: found before anything is saved, and told with level, group and parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from metamem.config import HierarchyConfig, UserError
from metamem.globs import matches
from metamem.hierarchy import OuterLevels


class Diverged(UserError):
    """A loss, gradient or weight that is not finite at outer step `step`; the checkpoint before it stays."""

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Owned:
    """A slow weight, and the level that owns it, by which of its groups."""

    level: str
    group: str
    name: str
    weight: Tensor

    def __str__(self) -> str:
        return f"{self.name!r} (group {self.group!r} of level {self.level!r})"


def check_losses(losses: Mapping[str, float], outer: OuterLevels, hierarchy: HierarchyConfig, step: int) -> None:
    """Raises Diverged where a level's loss is not finite, with the weight that is not either, or is the largest."""
    for level, loss in losses.items():
        if not math.isfinite(loss):
            where = _worst([(own, outer.replicas.full(own.weight)) for own in slow_weights(outer, hierarchy)])
            raise Diverged(f"the loss of level {level!r} is {loss}; the weights are {where}", step)


def check_gradients(norms: Mapping[str, float], outer: OuterLevels, hierarchy: HierarchyConfig, step: int) -> None:
    """Raises Diverged where the norm of a level's gradient is not finite, with the weight whose gradient is not either,
    or is the largest."""
    for level, norm in norms.items():
        if not math.isfinite(norm):
            mine = [(own, own.weight.grad) for own in slow_weights(outer, hierarchy) if own.level == level]
            where = _worst([(own, outer.replicas.full(grad)) for own, grad in mine if grad is not None])
            raise Diverged(f"the gradient of level {level!r} is {norm}, {where}", step)


def check_weights(outer: OuterLevels, hierarchy: HierarchyConfig, step: int) -> None:
    """Raises Diverged where a slow weight is not finite: what is saved can be gone on from."""
    for own in slow_weights(outer, hierarchy):
        if not outer.replicas.full(own.weight).isfinite().all():
            raise Diverged(f"a step of level {own.level!r} made weights that are not finite, of {own}", step)


def slow_weights(outer: OuterLevels, hierarchy: HierarchyConfig) -> Iterator[Owned]:
    """Every weight that an outer level owns."""
    for level in outer.levels:
        for name, weight in zip(outer.owned[level.name], outer.parameters[level.name], strict=True):
            group = next(g for g in level.groups if any(matches(glob, name) for glob in hierarchy.groups[g].match))
            yield Owned(level.name, group, name, weight)


def _worst(of: list[tuple[Owned, Tensor]]) -> str:
    """Where the first number is that is not finite, or else the largest."""
    sizes = [(own, float(values.detach().abs().max()) if values.numel() else 0.0) for own, values in of]
    for own, size in sizes:
        if not math.isfinite(size):
            return f"not finite in {own}"
    own, size = max(sizes, key=lambda found: found[1])
    return f"at most {size:.3g}, in {own}"
