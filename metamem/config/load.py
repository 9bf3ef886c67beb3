"""Config files to a checked `Config`: YAML with `extends`, overrides, `${...}` interpolation, types, consistency.

`extends: [a.yaml, b.yaml]` names files relative to the one that says it. Later ones win over earlier ones, the file
itself over all of them. Mappings merge; lists replace; a module with another `kind` and a task with another `name`
start afresh. `name` is not inherited: it names the run, and defaults to the file's own name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metamem.config import nodes
from metamem.config.check import check_config
from metamem.config.convert import convert
from metamem.config.errors import ConfigError, Sources, Where, nearest
from metamem.config.nodes import Node
from metamem.config.overrides import apply_overrides
from metamem.config.schema import Config, to_dict

_REFERENCE = re.compile(r"\$\{\s*([\w.\[\]-]+)\s*\}")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config in the file at `path`, with `key.path=value` overrides on top.

    Raises `ConfigError`, one line with file, line, key, value and the nearest valid choice, for anything that is wrong
    with it; what needs the modules themselves (their options, parameter names) is checked when they are built.
    """
    path = Path(path)
    root = apply_overrides(_load(path, _display(path), ()), list(overrides))
    root.value.setdefault("name", Node(path.stem, root.place))
    tree, sources = nodes.strip(root)
    config = convert(_interpolate(tree, sources), Config, Where(sources))
    check_config(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, which `load_config` reads back to an equal `Config`."""
    return nodes.dump(_escape(to_dict(config)))


def _load(path: Path, asked_by: str, chain: tuple[Path, ...]) -> Node:
    """The merged tree of a file and all that it extends."""
    place, identity = _display(path), path.resolve()
    if identity in chain:
        cycle = " -> ".join(_display(step) for step in (*chain[chain.index(identity) :], identity))
        raise Where.of(asked_by).error(f"extends goes in a circle: {cycle}")
    node = nodes.parse(_read(path, asked_by), place)
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
        base = _load(path.parent / item.value, f"{item.place}: extends", (*chain, identity))
        base.value.pop("name", None)
        merged = nodes.merge(merged, base)
    return nodes.merge(merged, node)


def _read(path: Path, asked_by: str) -> str:
    name = _display(path)
    about = "" if asked_by == name else f"{name}: "
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        folder = path.parent
        siblings = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
        guess = nearest(path.name, siblings)
        hint = f"; did you mean {_display(folder / guess[0])!r}?" if guess else ""
        raise Where.of(asked_by).error(f"{about}no such file{hint}") from None
    except UnicodeDecodeError as error:
        raise Where.of(asked_by).error(f"{about}not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Where.of(asked_by).error(f"{about}cannot be read: {reason}") from None


def _display(path: Path) -> str:
    """A path as the user knows it: relative to the current folder where it lies in it."""
    try:
        relative = os.path.relpath(path.resolve())
    except (OSError, ValueError):
        return str(path)
    return str(path) if relative.startswith("..") else relative


def _interpolate(tree: Any, sources: Sources) -> Any:
    """The tree with every `${...}` replaced. OmegaConf sees the tree only where there is one."""
    _check_references(tree, Where(sources))
    config = OmegaConf.create(tree)

    def resolved(value: Any, container: Any, where: Where) -> Any:
        if isinstance(value, dict):
            return {key: item(child, container, key, where / key) for key, child in value.items()}
        if isinstance(value, list):
            return [item(child, container, i, where / i) for i, child in enumerate(value)]
        return value

    def item(value: Any, container: Any, key: str | int, where: Where) -> Any:
        if not isinstance(value, str):
            return resolved(value, container[key], where) if isinstance(value, dict | list) else value
        if "${" not in value:
            return value
        try:
            result = container[key]
            return OmegaConf.to_container(result, resolve=True) if OmegaConf.is_config(result) else result
        except RecursionError:
            raise where.error(f"{value!r} refers to itself") from None
        except OmegaConfBaseException as error:
            raise _reference_error(value, tree, where, error) from None

    return resolved(tree, config, Where(sources))


def _check_references(value: Any, where: Where) -> None:
    """Refuse a malformed `${` here, where its place is known: OmegaConf refuses the whole tree for it."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_references(item, where / key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_references(item, where / i)
    elif isinstance(value, str) and "${" in value:
        try:
            OmegaConf.create({"value": value})
        except OmegaConfBaseException:
            hint = "write ${vars.name}, or \\${ for the text itself"
            raise where.error(f"{value!r} is not a valid reference; {hint}") from None


def _reference_error(value: str, tree: Any, where: Where, error: Exception) -> ConfigError:
    for reference in _REFERENCE.findall(value):
        parent, known = reference.split("."), tree
        for depth, key in enumerate(parent):
            if not isinstance(known, dict) or key not in known:
                choices = [".".join([*parent[:depth], name]) for name in known] if isinstance(known, dict) else []
                return where.unknown(f"{value!r} refers to {reference}, which is not there", reference, choices)
            known = known[key]
    return where.error(f"{value!r}: {str(error).splitlines()[0]}")


def _escape(value: Any) -> Any:
    """Text that looks like a reference but is none any more, so that reading it back leaves it alone."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    # A backslash in front of a reference would escape it, and so is itself escaped.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
