"""References in a config: `${vars.dim}` stands for a value, `${vars.memory}` for a whole mapping, such as a module.

A mapping is resolved in its own place, whose lines its errors name, and then stands at both. OmegaConf resolves what is
more than one value: text around a reference, a relative one.
"""

from __future__ import annotations

import functools
import re
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metamem.config.errors import ConfigError, Key, Path, Sources, Where
from metamem.config.plain import is_list, is_mapping

_REFERENCE = re.compile(r"\$\{\s*([\w.\[\]-]+)\s*\}")


def interpolate(tree: Any, sources: Sources) -> Any:
    """The tree with every `${...}` replaced, and `sources` told of what stands at a second place now."""
    _check(tree, Where(sources))
    return _Resolver(tree, sources).part((), Where(sources))


def escape(value: Any) -> Any:
    """Text that looks like a reference but is none any more, so that reading it back leaves it alone."""
    if is_mapping(value):
        return {key: escape(item) for key, item in value.items()}
    if is_list(value):
        return [escape(item) for item in value]
    # A backslash in front of a reference would escape it, and so is itself escaped.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


class _Resolver:
    """Follows references through a tree; `within` are the parts that it stands in, to find one that holds itself."""

    def __init__(self, tree: Any, sources: Sources) -> None:
        self.tree, self.sources = tree, sources
        self.within: list[Path] = []

    @functools.cached_property
    def config(self) -> Any:
        """The tree as OmegaConf has it, which takes longer to make than all else."""
        return cast(Any, OmegaConf.create(self.tree))

    def part(self, path: Path, where: Where) -> Any:
        """The mapping or list at a path, as it stands at `where`."""
        if path in self.within or (path and where.path[: len(path)] == path):
            raise RecursionError
        value = self.tree
        for key in path:
            value = value[key]
        self.within.append(path)
        result = self.resolved(value, Where(self.sources, path))
        self.within.pop()
        if path:
            self.sources.copy(path, where.path)
        return result

    def resolved(self, value: Any, where: Where) -> Any:
        if is_mapping(value):
            return {key: self.item(child, where / key) for key, child in value.items()}
        return [self.item(child, where / i) for i, child in enumerate(value)]

    def item(self, value: Any, where: Where) -> Any:
        if is_mapping(value) or is_list(value):
            return self.resolved(value, where)
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            path, found = _followed(value, self.tree)
            if is_mapping(found) or is_list(found):
                return self.part(path, where)
            if not isinstance(found, str) or "${" not in found:
                return found
            result = self.config
            for key in where.path:
                result = result[key]
            return OmegaConf.to_container(result, resolve=True) if OmegaConf.is_config(result) else result
        except RecursionError:
            raise where.error(f"{value!r} refers to itself") from None
        except OmegaConfBaseException as error:
            raise _reference_error(value, self.tree, where, error) from None


def _followed(value: str, tree: Any) -> tuple[Path, Any]:
    """Where a value `${path}` leads, through any number of them, and what is there; text that still has `${` in it is
    more than that, or leads nowhere."""
    seen: set[str] = set()
    part: Any = value
    path: Path = ()
    while isinstance(part, str) and part not in seen:
        seen.add(part)
        reference = _REFERENCE.fullmatch(part)
        if reference is None or reference[1].startswith("."):
            return path, part
        part, path = tree, ()
        for name in re.findall(r"[^.\[\]]+", reference[1]):
            key = _key(part, name)
            if key is None:
                return (), value
            part, path = part[key], (*path, key)
    return path, part


def _key(part: Any, name: str) -> Key | None:
    """The key or index of what a reference calls `name` in a mapping or list; None where there is none."""
    if is_list(part):
        return int(name) if name.isdecimal() and int(name) < len(part) else None
    return name if is_mapping(part) and name in part else None


def _check(value: Any, where: Where) -> None:
    """Refuse a malformed `${` here, where its place is known: OmegaConf refuses the whole tree for it."""
    if is_mapping(value):
        for key, item in value.items():
            _check(item, where / key)
    elif is_list(value):
        for i, item in enumerate(value):
            _check(item, where / i)
    elif isinstance(value, str) and "${" in value and not _well_formed(value):
        raise where.error(f"{value!r} is not a valid reference; write ${{vars.name}}, or \\${{ for the text itself")


@functools.lru_cache(maxsize=1024)  # a config repeats a few, and an ablation its config
def _well_formed(value: str) -> bool:
    try:
        OmegaConf.create({"value": value})
    except OmegaConfBaseException:
        return False
    return True


def _reference_error(value: str, tree: Any, where: Where, error: Exception) -> ConfigError:
    for reference in _REFERENCE.findall(value):
        parent, known = reference.split("."), tree
        for depth, key in enumerate(parent):
            if not is_mapping(known) or key not in known:
                choices = [".".join([*parent[:depth], name]) for name in known] if is_mapping(known) else []
                return where.unknown(f"{value!r} refers to {reference}, which is not there", reference, choices)
            known = known[key]
    return where.error(f"{value!r}: {str(error).splitlines()[0]}")
