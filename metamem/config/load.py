"""Config files to a checked `Config`: YAML with `extends`, overrides, `${...}` interpolation, types, consistency.

`extends: [a.yaml, metamem:b.yaml]` names files relative to the one that says it, and configs that ship with metamem.
Later ones win over earlier ones, the file itself over all of them. Mappings merge, lists replace. What chooses another
`kind` (a module, or a variable that holds one) or another `name` (the task, a level's optimizer) starts afresh; a
level's objective is replaced whole. Levels as a mapping name -> level merge by name, over a list of them too. The
config's own `name` is not inherited: it names the run, and defaults to the file's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from metamem.config import nodes
from metamem.config.check import check_config
from metamem.config.convert import convert
from metamem.config.errors import Where, nearest
from metamem.config.nodes import Node
from metamem.config.overrides import Override, apply_overrides
from metamem.config.references import escape, interpolate
from metamem.config.schema import Config, Located, RunConfig, to_dict
from metamem.config.shipped import locate, shipped_like, shipped_name

C = TypeVar("C", bound=Located)


def load_config(path: Path | str, overrides: Sequence[str | Override] = ()) -> Config:
    """The config in the file at `path`, with overrides on top: `key.path=value`, or an `Override`.

    Raises `ConfigError`, one line with file, line, key, value and the nearest valid choice, for anything that is wrong
    with it; what needs the modules themselves (their options, parameter names) is checked when they are built.
    """
    config = load_as(Config, path, overrides)
    check_config(config)
    return config


def load_as(schema: type[C], path: Path | str, overrides: Sequence[str | Override] = ()) -> C:
    """A config of another schema, its types checked and nothing else."""
    path = locate(path)
    root = apply_overrides(_load(path, display(path), ()), overrides, schema)
    root.entries.setdefault("name", Node(path.stem, root.place))
    tree, sources = nodes.strip(root)
    return convert(interpolate(tree, sources), schema, Where(sources))


def has_key(path: Path | str, key: str) -> bool:
    """Whether a config file, or one that it extends, has a key at its top."""
    path = locate(path)
    return key in _load(path, display(path), ()).entries


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, which `load_config` reads back to an equal `Config`."""
    return nodes.dump(escape(to_dict(config)))


def _load(path: Path, asked_by: str, chain: tuple[Path, ...]) -> Node:
    """The merged tree of a file and all that it extends."""
    place, identity = display(path), Path(os.path.realpath(path))
    if identity in chain:
        cycle = " -> ".join(display(step) for step in (*chain[chain.index(identity) :], identity))
        raise Where.of(asked_by).error(f"extends goes in a circle: {cycle}")
    node = nodes.parse(read_text(path, asked_by), place)
    if node.value is None:
        node.value = {}
    if not isinstance(node.value, dict):
        raise Where.of(place).error("a config is a mapping of keys to values")
    extends = node.value.pop("extends", None)
    if extends is None:
        return node
    listed = extends.value if isinstance(extends.value, list) else [extends]
    merged = Node({}, place)
    for item in listed:
        if not isinstance(item.value, str):
            raise Where.of(item.place).error("extends: expected a file name or a list of file names")
        base = _load(locate(item.value, path.parent), f"{item.place}: extends", (*chain, identity))
        base.entries.pop("name", None)
        merged = nodes.merge(merged, base)
    return nodes.merge(merged, node)


def read_text(path: Path, asked_by: str) -> str:
    """The text of a YAML file; a `ConfigError` at the place that asked for it where it cannot be had."""
    name = display(path)
    about = "" if asked_by == name else f"{name}: "
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        like = _like(path)
        hint = f"; did you mean {display(like)!r}?" if like is not None else ""
        raise Where.of(asked_by).error(f"{about}no such file{hint}") from None
    except UnicodeDecodeError as error:
        raise Where.of(asked_by).error(f"{about}not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Where.of(asked_by).error(f"{about}cannot be read: {reason}") from None


def _like(path: Path) -> Path | None:
    """The file that was meant by one that is not there: one that ships under that name, or the nearest beside it."""
    if (shipped := shipped_like(path)) is not None:
        return shipped
    folder = path.parent
    siblings = sorted(file.name for file in folder.glob("*.yaml")) if folder.is_dir() else []
    guess = nearest(path.name, siblings)
    return folder / guess[0] if guess else None


def display(path: Path) -> str:
    """A path as the user knows it: relative to the current folder, if it lies in it; `metamem:FILE`, if it ships."""
    try:
        real = os.path.realpath(path)
        relative = os.path.relpath(real)
    except (OSError, ValueError):
        return str(path)
    return shipped_name(Path(real)) or str(path) if relative.startswith("..") else relative
