"""Plain YAML values to typed Python ones, by annotation: the one type check of configs and of registered options.

Understood are bool, int, float, str, None, `Literal`, unions, `list[X]`, `Sequence[X]`, `tuple[X, ...]`, `tuple[X, Y]`,
`dict[str, X]`, `Any`, schema dataclasses, and `Annotated` with a `Range`, `ONE_OR_MORE`, `DOTTED` or `ByName`.
OmegaConf's structured configs know most of these, but their errors lose the index inside a list and know neither file
nor line.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from metamem.config.errors import Where, nearest, show
from metamem.config.plain import is_list, is_mapping


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number may take: `low <= x`, `above < x`, `x <= high`, `x < below`, as far as given."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        parts = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in parts.items() if bound is not None)


ONE_OR_MORE = "one or more"  # Annotated[list[X], ONE_OR_MORE]: a single X stands for a list of one
DOTTED = "a dotted path"  # Annotated[str, DOTTED]: of something in a module, such as mypackage.module.function


@dataclasses.dataclass(frozen=True)
class ByName:
    """Annotated[list[X], ByName(order)]: may be a mapping name -> X instead, put in the order of that key, the names'
    own where it is equal; null stands for an X that was taken out."""

    order: Callable[[Any], Any]


LISTS = (list, Sequence)
SCALARS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    dict: "a mapping",
}


def convert(value: Any, annotation: Any, where: Where) -> Any:
    """`value` as `annotation` has it, or a `ConfigError` that names place, value, and what is accepted there."""
    if get_origin(annotation) is Annotated:
        return _convert_annotated(value, annotation, where)
    if not _fits(value, annotation):
        raise _mismatch(value, annotation, where)
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return _convert_dataclass(value, annotation, where)
    if origin in (Union, types.UnionType):
        return convert(value, next(option for option in arguments if _fits(value, option)), where)
    if origin is int:
        return int(value)
    if origin is float:
        # Refused before float(), which overflows on an integer that is too large.
        if abs(value) > 1e300 or not math.isfinite(value):
            raise where.error(f"{show(value)} is not a finite number")
        return float(value)
    if origin in LISTS:
        return [convert(item, (*arguments, Any)[0], where / i) for i, item in enumerate(value)]
    if origin is tuple and arguments:
        return tuple(convert(item, kind, where / i) for i, (item, kind) in enumerate(_pairs(value, arguments, where)))
    if origin is dict:
        return {key: convert(item, (*arguments, Any, Any)[1], where / key) for key, item in value.items()}
    return value


def _convert_annotated(value: Any, annotation: Any, where: Where) -> Any:
    inner, *marks = get_args(annotation)
    for mark in marks:
        if isinstance(mark, ByName) and is_mapping(value):
            return _convert_by_name(value, get_args(inner)[0], mark, where)
    if ONE_OR_MORE in marks:
        value = value if is_list(value) else [value]
        if not value:
            raise where.error("the list is empty: name at least one")
    # A mismatch is described with the whole annotation, which knows the range.
    if not _fits(value, inner):
        raise _mismatch(value, annotation, where)
    result = convert(value, inner, where)
    for mark in marks:
        if isinstance(mark, Range) and isinstance(result, int | float) and result not in mark:
            raise where.error(f"must be {mark}, not {show(value)}")
    return result


def _convert_by_name(value: dict[str, Any], kind: Any, mark: ByName, where: Where) -> list[Any]:
    items: list[Any] = []
    for name, item in value.items():
        if is_mapping(item):
            if item.get("name", name) != name:
                raise (where / name / "name").error(f"is {show(item['name'])}, but its key already names it {name!r}")
            item = {**item, "name": name}
        if item is not None:
            items.append(convert(item, kind, where / name))
    return sorted(items, key=mark.order)


def _convert_dataclass(value: dict[str, Any], cls: Any, where: Where) -> Any:
    fields = {key_of(field): field for field in schema_fields(cls)}
    hints = get_type_hints(cls, include_extras=True)
    for key in value:
        if key not in fields:
            raise (where / key).unknown("unknown key", key, fields)
    arguments: dict[str, Any] = {}
    for key, field in fields.items():
        if key in value:
            arguments[field.name] = convert(value[key], hints[field.name], where / key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise (where / key).error(f"is missing: give {describe(hints[field.name])}")
    return cls(**arguments, where=where)


def schema_fields(cls: Any) -> Iterator[dataclasses.Field[Any]]:
    """The fields of a schema dataclass that a config file can set: all but its `where`."""
    return (field for field in dataclasses.fields(cls) if field.name != "where")


def dataclass_at(schema: Any, path: Sequence[str | int]) -> Any:
    """The schema dataclass that describes what stands at a path of a config; an item of a list by index or name."""
    kind = schema
    for key in path:
        if dataclasses.is_dataclass(kind):
            kind = get_type_hints(kind)[next(field.name for field in schema_fields(kind) if key_of(field) == key)]
        else:
            kind = get_args(kind)[-1]
    return kind


def key_of(field: dataclasses.Field[Any]) -> str:
    """The key of a field in YAML: its name, unless that is a Python keyword (`from`)."""
    return field.metadata.get("key", field.name)


def describe(annotation: Any) -> str:
    """What is accepted, in words: `an integer (at least 1) or null`."""
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Annotated and DOTTED in arguments:
        return DOTTED
    if origin is Annotated:
        marks = [str(mark) for mark in arguments[1:] if isinstance(mark, Range)]
        single = f"{describe(get_args(arguments[0])[0])} or " if ONE_OR_MORE in arguments[1:] else ""
        named = " or a mapping" if any(isinstance(mark, ByName) for mark in arguments[1:]) else ""
        return single + describe(arguments[0]) + named + "".join(f" ({mark})" for mark in marks)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is Literal:
        return ", ".join(map(show, arguments))
    if annotation in (None, types.NoneType):
        return "null"
    if origin in LISTS or (origin is tuple and (not arguments or arguments[-1] is ...)):
        return "a list"
    if origin is tuple:
        return f"a list of {len(arguments)}"
    if dataclasses.is_dataclass(annotation):
        return "a mapping"
    return SCALARS.get(origin, getattr(origin, "__name__", str(origin)))


def _mismatch(value: Any, annotation: Any, where: Where) -> Exception:
    choices = list(_literals(annotation))
    if choices and isinstance(value, str):
        guess = nearest(value, choices)
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        literal_only = get_origin(annotation) is Literal
        accepted = ", ".join(choices) if literal_only else describe(annotation)
        return where.error(f"{show(value)} is not valid{hint} ({accepted})")
    return where.error(f"expected {describe(annotation)}, not {show(value)}")


def _literals(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield from (value for value in get_args(annotation) if isinstance(value, str))
    elif get_origin(annotation) in (Annotated, Union, types.UnionType):
        for option in get_args(annotation):
            yield from _literals(option)


def _pairs(value: list[Any], arguments: tuple[Any, ...], where: Where) -> Iterator[tuple[Any, Any]]:
    if arguments[-1] is ...:
        return ((item, arguments[0]) for item in value)
    if len(value) != len(arguments):
        raise where.error(f"expected a list of {len(arguments)}, not {show(value)}")
    return zip(value, arguments, strict=True)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether the value has the annotation's outer shape: enough to choose a member of a union."""
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Annotated:
        fits = _fits(value, arguments[0]) and (DOTTED not in arguments[1:] or "." in value)
        return fits or (ONE_OR_MORE in arguments[1:] and value is not None)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if annotation in (None, types.NoneType):
        return value is None
    if annotation is Any:
        return True
    if origin is int:  # 1e4 is a float to YAML, and a fair way to write a number of steps
        return type(value) is int or (isinstance(value, float) and value.is_integer())
    if origin is float:
        return type(value) in (int, float)
    if origin in (*LISTS, tuple):
        return isinstance(value, list)
    if origin is dict or dataclasses.is_dataclass(annotation):
        return isinstance(value, dict)
    return isinstance(value, origin) if isinstance(origin, type) else False
