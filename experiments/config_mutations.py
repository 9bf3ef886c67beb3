"""What may go wrong with a config, at random: a key gone or misspelt, a wrong type, a number out of range, bad YAML.

A mutation takes a tree of plain values and a generator, and gives it damaged; those of text take the YAML itself.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from metamem.config import nodes

Tree = Any  # nested dict, list and scalars
Path = tuple[str | int, ...]

NUMBERS = (-1, 0, 1, 2, 3, 7, -2.5, 0.3, 1e-9, 10**6, 10**9, 10**20, 1e30, 1e300, math.inf, -math.inf, math.nan)
STRANGE = ("", " ", "zzz", "é", "🦀", "\u2028", "\x00", "a" * 300, "a/b", "../x", "-", "in", "out", "kind", "*", "${")
GLOBS = ("nothing.*.here", "**.x", "[", "]", "{a,b}", "?", "", "*", "blocks.*", "blocks.**.", "a b", "\\")
REFERENCES = (
    "${nothing}",
    "${vars}",
    "${vars.dim}",
    "${vars.memory}",
    "${",
    "${}",
    "${a.b.c}",
    "x${seed}y",
    "${network}",
)
MARKS = ":{}[]-#&*!|>'\"%@`\t\\\x00\u2028 \n0a"


def mutate(tree: Tree, random: Random) -> tuple[str, str]:
    """The name of a mutation and the YAML that it makes of a tree."""
    name = random.choice(list(MUTATIONS))
    if name in TEXT_MUTATIONS:
        return name, TEXT_MUTATIONS[name](nodes.dump(tree), random)
    damaged = copy.deepcopy(tree)
    for _ in range(1 if random.random() < 0.8 else 2):
        damaged = TREE_MUTATIONS[name](damaged, random)
    return name, nodes.dump(damaged)


def places(tree: Tree, path: Path = ()) -> Iterator[Path]:
    """The paths of all that is in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def get(tree: Tree, path: Path) -> Tree:
    """What is at a path."""
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: Tree, path: Path, value: Tree) -> Tree:
    if not path:
        return value
    get(tree, path[:-1])[path[-1]] = value
    return tree


def _chosen(tree: Tree, random: Random, fits: Callable[[Path, Tree], bool] = lambda path, value: True) -> Path | None:
    there = [path for path in places(tree) if fits(path, get(tree, path))]
    return random.choice(there) if there else None


def _replacing(
    choices: Callable[[Tree, Random], Tree], fits: Callable[[Path, Tree], bool] = lambda path, value: True
) -> Callable[[Tree, Random], Tree]:
    """The mutation that replaces a value that fits."""

    def replace(tree: Tree, random: Random) -> Tree:
        path = _chosen(tree, random, fits)
        return tree if path is None else _put(tree, path, choices(get(tree, path), random))

    return replace


def _delete(tree: Tree, random: Random) -> Tree:
    if (path := _chosen(tree, random)) is not None:
        del get(tree, path[:-1])[path[-1]]
    return tree


def _rename(tree: Tree, random: Random) -> Tree:
    path = _chosen(tree, random, lambda path, value: isinstance(path[-1], str))
    if path is None:
        return tree
    parent, key = get(tree, path[:-1]), path[-1]
    wrong = _misspelt(str(key), random)
    return _put(tree, path[:-1], {(wrong if name == key else name): value for name, value in parent.items()})


def _misspelt(word: str, random: Random) -> str:
    at = random.randrange(len(word) + 1)
    return random.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + random.choice("qx_é.") + word[at:],
            word[::-1],
            word.upper(),
            word + "s",
        ]
    )


def _swap(tree: Tree, random: Random) -> Tree:
    one, other = _chosen(tree, random), _chosen(tree, random)
    if one is None or other is None or one[: len(other)] == other or other[: len(one)] == one:
        return tree
    values = copy.deepcopy(get(tree, one)), copy.deepcopy(get(tree, other))
    return _put(_put(tree, one, values[1]), other, values[0])


def _double(tree: Tree, random: Random) -> Tree:
    path = _chosen(tree, random, lambda path, value: isinstance(path[-1], int))
    if path is not None:
        items = get(tree, path[:-1])
        items.insert(random.randrange(len(items) + 1), copy.deepcopy(get(tree, path)))
    return tree


def _nest(value: Tree, random: Random) -> Tree:
    for _ in range(random.choice([1, 3, 60])):
        value = [value] if random.random() < 0.5 else {random.choice(["a", "kind", "name", "modules"]): value}
    return value


def _wrong_type(value: Tree, random: Random) -> Tree:
    pool = ["zzz", 3, 2.5, True, None, [], {}, [[1]], {"zzz": 1}, [None], "1", [value, value]]
    return random.choice([item for item in pool if type(item) is not type(value)])


def _text_delete(text: str, random: Random) -> str:
    at = random.randrange(max(1, len(text)))
    return text[:at] + text[at + random.choice([1, 1, 5, 40]) :]


def _text_insert(text: str, random: Random) -> str:
    at = random.randrange(len(text) + 1)
    return text[:at] + random.choice(MARKS) * random.choice([1, 1, 2, 300]) + text[at:]


def _text_cut(text: str, random: Random) -> str:
    return text[: random.randrange(len(text) + 1)]


def _text_line(text: str, random: Random) -> str:
    lines = text.splitlines(keepends=True) or ["\n"]
    at = random.randrange(len(lines))
    moved = random.choice([lines[at], "  " + lines[at], lines[at].lstrip(), "\t" + lines[at], "- " + lines[at]])
    return "".join([*lines[:at], moved, *lines[at + random.choice([0, 1]) :]])


def _text_tag(text: str, random: Random) -> str:
    tag = random.choice(
        ["!!python/object/apply:os.getpid []", "!!python/name:os.system", "!x 3", "!!binary aGk=", "*a"]
    )
    lines = text.splitlines(keepends=True) or ["\n"]
    at = random.randrange(len(lines))
    key = lines[at].partition(":")[0]
    return "".join([*lines[:at], f"{key}: {tag}\n", *lines[at + 1 :]])


def _is_number(path: Path, value: Tree) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(path: Path, value: Tree) -> bool:
    return isinstance(value, str)


def _is_container(path: Path, value: Tree) -> bool:
    return isinstance(value, dict | list)


TREE_MUTATIONS: dict[str, Callable[[Tree, Random], Tree]] = {
    "key or item gone": _delete,
    "key misspelt": _rename,
    "wrong type": _replacing(_wrong_type),
    "number out of range": _replacing(lambda value, random: random.choice(NUMBERS), _is_number),
    "number for anything": _replacing(lambda value, random: random.choice(NUMBERS)),
    "null": _replacing(lambda value, random: None),
    "unknown name": _replacing(lambda value, random: _misspelt(value, random), _is_text),
    "strange text": _replacing(lambda value, random: random.choice(STRANGE), _is_text),
    "glob": _replacing(
        lambda value, random: random.choice(GLOBS), lambda path, value: "match" in path or "groups" in path
    ),
    "reference": _replacing(lambda value, random: random.choice(REFERENCES)),
    "empty": _replacing(lambda value, random: type(value)(), _is_container),
    "swapped": _swap,
    "given twice": _double,
    "nested": _replacing(_nest),
    "as text": _replacing(lambda value, random: json.dumps(value), _is_container),
}
TEXT_MUTATIONS: dict[str, Callable[[str, Random], str]] = {
    "text: gone": _text_delete,
    "text: put in": _text_insert,
    "text: cut": _text_cut,
    "text: line": _text_line,
    "text: tag": _text_tag,
}
MUTATIONS = (*TREE_MUTATIONS, *TEXT_MUTATIONS)
