"""YAML text to a tree that knows the line of every key, and back.

The scalars are those of YAML 1.2 rather than PyYAML's 1.1: `3e-3` is a number, `no` and `on` are strings, `010` is ten,
`12:30` is not a count of seconds. A key given twice, a custom tag and a recursive alias are errors.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import yaml

from metamem.config.errors import Path, Sources, Where
from metamem.config.plain import is_list, is_mapping

_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        list("-+.0123456789"),
    ),
)
MOST = 1_000_000  # values of a document: aliases of aliases would come to more than any memory holds
TOO_LONG = 4000  # digits; Python refuses to read longer integers, and no config means one


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {}  # YAML 1.1's are dropped


class _Dumper(yaml.SafeDumper):
    """Keeps 1.1's resolvers beside ours, so that a string either version would read otherwise is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes these line breaks raw in other styles, and reads them back as a blank.
        breaks = any(mark in data for mark in "\r\x85\u2028\u2029")
        return yaml.ScalarNode(_TAG + "str", data, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper.represent_str)

_classes: tuple[Any, ...] = (_Loader, _Dumper)
for _name, _pattern, _first in _SCALARS:
    for _class in _classes:
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^{_pattern}$"), _first)


LEVELS: Path = ("hierarchy", "levels")


@dataclass
class Node:
    """A value and the place of its key; mappings and lists hold nodes."""

    value: dict[str, Node] | list[Node] | str | float | bool | None
    place: str

    @property
    def entries(self) -> dict[str, Node]:
        """The keys of a mapping; of anything else none."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def name(self) -> str | None:
        """The text under the key `name`, if there is one."""
        name = self.entries.get("name")
        return name.value if name is not None and isinstance(name.value, str) else None


def parse(text: str, place: str, numbered: bool = True) -> Node:
    """The tree of a YAML document; `place` is its file, to which lines are added unless `numbered` is false."""
    return _copied(_parsed(text, place, numbered))


def _copied(node: Node) -> Node:
    """The same tree, whose mappings and lists may be changed."""
    if isinstance(node.value, dict):
        return Node({key: _copied(child) for key, child in node.value.items()}, node.place)
    return Node([_copied(child) for child in node.value] if isinstance(node.value, list) else node.value, node.place)


@functools.lru_cache(maxsize=256)  # the cells of an ablation are made of the same few files
def _parsed(text: str, place: str, numbered: bool) -> Node:
    try:
        node = _Loader(text).get_single_node()
        if node is None:
            return Node(None, place)
        if _count(node, {}) > MOST:
            raise Where.of(place).error(f"not valid YAML: its aliases come to more than {MOST:,} values")
        return Node(_value(node, place, numbered, ()), place)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{place}:{mark.line + 1}" if mark and numbered else place
        problem = f"{error.context}: {error.problem}" if error.context and error.problem else error.problem
        raise Where.of(at).error(f"not valid YAML: {problem or error.context}") from None
    except yaml.YAMLError as error:
        raise Where.of(place).error(f"not valid YAML: {error}") from None
    except RecursionError:
        raise Where.of(place).error("not valid YAML: nested too deeply") from None


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """The values that a node comes to, what aliases name counted each time."""
    if id(node) not in known:
        known[id(node)] = 0  # in itself: an error of its own
        inside: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
        inside = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else inside
        known[id(node)] = 1 + sum(_count(child, known) for child in inside)
    return known[id(node)]


def _place(place: str, numbered: bool, node: yaml.Node) -> str:
    return f"{place}:{node.start_mark.line + 1}" if numbered else place


def _value(node: yaml.Node, place: str, numbered: bool, above: tuple[yaml.Node, ...]) -> Any:
    at = functools.partial(_place, place, numbered)
    if any(node is other for other in above):
        raise Where.of(at(node)).error("not valid YAML: an alias that contains itself")
    above = (*above, node)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, at(node))
    if node.tag not in (_TAG + "map", _TAG + "seq"):
        raise Where.of(at(node)).error(f"the tag {node.tag} is not supported")
    if isinstance(node, yaml.SequenceNode):
        return [Node(_value(item, place, numbered, above), at(item)) for item in node.value]
    entries: dict[str, Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise Where.of(at(key)).error("a key must be a plain word")
        if key.value in entries:
            first = entries[key.value].place.rpartition(":")[2]
            raise Where.of(at(key)).error(f"{key.value}: key given twice" + (f", first in line {first}" * numbered))
        entries[key.value] = Node(_value(value, place, numbered, above), at(key))
    return entries


def _scalar(node: yaml.ScalarNode, place: str) -> Any:
    text, tag = node.value, node.tag.removeprefix(_TAG)
    if tag == "str" or tag == "!":
        return text
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    if tag in ("int", "float") and len(text) > TOO_LONG:
        raise Where.of(place).error(f"a number of {len(text)} digits is not supported")
    try:
        if tag == "int":
            return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
        if tag == "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except ValueError:
        raise Where.of(place).error(f"{text!r} is not a number") from None
    raise Where.of(place).error(f"the tag {node.tag} is not supported")


def merge(base: Node, new: Node, path: Path = ()) -> Node:
    """`new` over `base`: mappings merge key by key, everything else (lists too) is replaced.

    What `chooser` knows starts afresh where `new` chooses another `name` or `kind`, whose options are other ones; a
    level's objective is replaced whole; levels by name merge over a list of them too.
    """
    if path == LEVELS and isinstance(new.value, dict):
        base = _by_name(base)
    if path[:2] == LEVELS and path[-1] == "objective":
        return new
    if not isinstance(base.value, dict) or not isinstance(new.value, dict):
        return new
    choice = chooser(path)
    if choice in base.value and choice in new.value and base.value[choice].value != new.value[choice].value:
        return new
    merged = dict(base.value)
    for key, node in new.value.items():
        merged[key] = merge(merged[key], node, (*path, key)) if key in merged else node
    return Node(merged, new.place)


def chooser(path: Path) -> str | None:
    """The key that says what the mapping at `path` is, and with it which other keys it may have."""
    if path == ("module",):
        return "kind"
    if path == ("task",) or (path[:2] == LEVELS and path[-1] == "optimizer"):
        return "name"
    of_module = path[:1] == ("network",) and path[-2:-1] == ("modules",)
    return "kind" if of_module or (path[:1] == ("vars",) and len(path) > 1) else None


def _by_name(node: Node) -> Node:
    """A list of mappings that each have a `name`, as a mapping by it; anything else as it is."""
    items = node.value if isinstance(node.value, list) else []
    if not items or any(item.name is None for item in items):
        return node
    return Node({item.name: item for item in items if item.name is not None}, node.place)


def strip(root: Node) -> tuple[Any, Sources]:
    """The plain value of a tree, and the places and names of its parts."""
    sources = Sources({(): root.place})

    def plain(node: Node, path: Path) -> Any:
        sources.places[path] = node.place
        if isinstance(node.value, dict):
            return {key: plain(child, (*path, key)) for key, child in node.value.items()}
        if isinstance(node.value, list):
            items = [plain(child, (*path, i)) for i, child in enumerate(node.value)]
            sources.labels.update({(*path, i): label for i, item in enumerate(items) if (label := _label(item))})
            return items
        return node.value

    return plain(root, ()), sources


def _label(item: Any) -> str:
    """What a list item is called in errors: a level by its name, a connection by its ends."""
    if not is_mapping(item):
        return ""
    if "from" in item and "to" in item:
        source = item["from"]
        return f"{', '.join(map(str, source)) if is_list(source) else source} -> {item['to']}"
    return item["name"] if isinstance(item.get("name"), str) else ""


def tree(value: Any, place: str) -> Node:
    """Plain values as a tree, all of it written at one place: the inverse of `strip`."""
    if is_mapping(value):
        return Node({key: tree(item, place) for key, item in value.items()}, place)
    return Node([tree(item, place) for item in value] if is_list(value) else value, place)


def dump(value: Any) -> str:
    """Plain values as YAML that `parse` reads back to equal ones."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
