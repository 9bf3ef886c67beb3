"""Overrides: `training.steps=20`, `hierarchy.levels.surprise.period=4`, `hierarchy.levels[0].period=4`.

They are text from a command line, the value YAML; or an `Override`, a plain value and the place where it was written. A
list item is named by its index or by its `name`; a level that is set to null is taken out. An override changes what the
config has or what the schema knows; a key that neither knows is an error, never a silent new entry.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metamem.config import nodes
from metamem.config.convert import dataclass_at, key_of, schema_fields
from metamem.config.errors import Path, Sources, Where, show
from metamem.config.nodes import Node
from metamem.config.schema import Config, Located

PLACE = "command line"
_KEY = re.compile(r"[^.\[\]=]+(\[\d+\])*(\.[^.\[\]=]+(\[\d+\])*)*")


@dataclass(frozen=True)
class Override:
    """A key and its new plain value; `place` is the file and line that errors name."""

    key: str
    value: Any
    place: str = PLACE


def apply_overrides(root: Node, overrides: Sequence[str | Override], schema: type[Located] = Config) -> Node:
    """The tree with every override in it; first those that choose a kind, since they drop the old kind's options."""
    parsed = [_parse(item if isinstance(item, Override) else parse_override(item)) for item in overrides]
    parsed.sort(key=lambda item: nodes.chooser(tuple(item[0][:-1])) != item[0][-1])
    for keys, value in parsed:
        _set(root, keys, value, (), schema)
    return root


def parse_override(text: str) -> Override:
    """The override `key.path=value` of a command line."""
    key, equals, value = text.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise Where.of(PLACE).error(f"{text!r}: write an override as key.path=value")
    return Override(key, nodes.strip(nodes.parse(value, f"{PLACE}: {key}", numbered=False))[0])


def _parse(override: Override) -> tuple[list[str], Node]:
    if not _KEY.fullmatch(override.key):
        raise Where.of(override.place).error(f"{override.key!r}: write a key as key.path")
    return re.findall(r"[^.\[\]]+", override.key), nodes.tree(override.value, override.place)


def _set(node: Node, keys: list[str], value: Node, path: Path, schema: type[Located]) -> None:
    key, rest = keys[0], keys[1:]
    if path[:2] == nodes.LEVELS and path[-1] == "objective":
        key, rest = ".".join(keys), []  # an objective is named by a dotted path, which is one key
    if isinstance(node.value, list):
        index = _index(node.value, key, path, value.place)
        if rest:
            _set(node.value[index], rest, value, (*path, index), schema)
        elif value.value is None and path == nodes.LEVELS:
            del node.value[index]
        else:
            node.value[index] = value
        return
    if not isinstance(node.value, dict):
        reference = re.fullmatch(r"\$\{([\w.]+)\}", str(node.value))
        hint = f"; set {reference[1]}.{'.'.join(keys)}" if reference else ""
        raise _where(path, value.place).error(f"is {show(node.value)}, and has no {key!r} to set{hint}")
    entries = node.value
    if rest:
        if key not in entries:
            known = _schema_keys(path, schema)
            if key not in known:
                raise _where((*path, key), value.place).unknown("unknown key", key, [*entries, *known])
        if key not in entries or entries[key].value is None:
            entries[key] = Node({}, value.place)
        _set(entries[key], rest, value, (*path, key), schema)
        return
    if key not in entries and not _may_be_new(path, value):
        raise _where((*path, key), value.place).unknown("unknown key", key, entries)
    if key == nodes.chooser(path) and key in entries and entries[key].value != value.value:
        entries.clear()
    node.place = value.place
    entries[key] = value


def _index(items: list[Node], key: str, path: Path, place: str) -> int:
    names = [item.name for item in items]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    known = [name for name in names if name]
    if key.isdecimal() or not known:
        raise _where(path, place).error(f"has no item {key}: there are {len(items)}, counted from 0")
    raise _where((*path, key), place).unknown("no item has this name", key, known)


def _schema_keys(path: Path, schema: type[Located]) -> list[str]:
    """The keys that the schema has at this path, which a file may have left out."""
    if path in ((), ("hierarchy",)) or (len(path) == 3 and path[:2] == nodes.LEVELS):
        return [key_of(field) for field in schema_fields(dataclass_at(schema, path))]
    return []


def _may_be_new(path: Path, value: Node) -> bool:
    """Whether a new last key may be right. Options and fields are checked later, against the kind or the schema; a new
    module, group or level must be given whole; a variable that no file has is read by nothing."""
    if path[-1:] in (("modules",), ("groups",)) or path == nodes.LEVELS:
        return isinstance(value.value, dict)
    return path != ("vars",)


def _where(path: Path, place: str) -> Where:
    return Where(Sources({(): place}), path)
