"""Plain values, as YAML holds them. Of an `Any`, `isinstance(value, dict)` leaves a type checker without the type of
keys and items; these say it."""

from __future__ import annotations

from typing import Any, TypeGuard


def is_mapping(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a plain value is a mapping; its keys are text then."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether a plain value is a list."""
    return isinstance(value, list)
