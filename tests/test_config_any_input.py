"""Properties of the loader: whatever is wrong, and wherever, is one line that names it; what is right loads back."""

import copy
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from config_example import TEXT, error_of, load, registered
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metamem.config import Config, ConfigError, load_config, to_yaml
from metamem.config import nodes as yaml_nodes

TREE = yaml_nodes.strip(yaml_nodes.parse(TEXT, "x"))[0]


@pytest.fixture(scope="module", autouse=True)
def in_a_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every test runs where its files are, so that errors show short paths."""
    folder, before = tmp_path_factory.mktemp("configs"), Path.cwd()
    os.chdir(folder)
    with registered():
        yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def valid() -> Config:
    return load()


def containers(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key), value
        yield from containers(value, (*path, key))


EVERYWHERE = [path for path, _ in containers(TREE)]
KEYS = [path for path in EVERYWHERE if isinstance(path[-1], str)]


def parent_of(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(KEYS), st.data())
def test_a_misspelt_key_is_named(path: tuple[Any, ...], data: st.DataObject) -> None:
    tree, key = copy.deepcopy(TREE), path[-1]
    at = data.draw(st.integers(0, len(key) - 1))
    kinds = {
        "drop": key[:at] + key[at + 1 :],
        "double": key[:at] + key[at] + key[at:],
        "other": key[:at] + "q" + key[at:],
    }
    wrong = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    parent = parent_of(tree, path)
    renamed = {(wrong if name == key else name): value for name, value in parent.items()}
    parent.clear()
    parent.update(renamed)
    if path == ("name",) and wrong == "":
        return
    text = error_of(lambda: load(yaml_nodes.dump(tree)))
    assert text.startswith("c.yaml") and (wrong in text or key in text)


def wrong_for(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return ["zzz", 3, [1], True]
    return [{"zzz": 1}, [[1]], *(["zzz"] if not isinstance(value, str | list) else [])]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(EVERYWHERE), st.data())
def test_a_wrong_type_is_named(path: tuple[Any, ...], data: st.DataObject) -> None:
    tree = copy.deepcopy(TREE)
    parent = parent_of(tree, path)
    parent[path[-1]] = data.draw(st.sampled_from(wrong_for(parent[path[-1]])))
    text = error_of(lambda: load(yaml_nodes.dump(tree)))
    named = [str(key) for key in path if isinstance(key, str)]
    assert text.startswith("c.yaml:") and named[-1] in text


@settings(max_examples=100, deadline=None)
@given(st.text())
@example("a: *b")
@example("a: !x 3")
@example("[" * 2000)
@example("9" * 5000)
@example("a: 2000-01-01")
@example("a: !!int x")
@example("---\n---\n")
@example("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 400)))
@example("a: &a [*a, *a]")
def test_no_text_gives_a_traceback(text: str) -> None:
    Path("any.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    error_of(lambda: load_config(Path("any.yaml")))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(EVERYWHERE), st.sampled_from(["=", ".x=", "[0]=", "[0].y=", ""]), st.text(max_size=8))
def test_no_override_gives_a_traceback(path: tuple[Any, ...], middle: str, value: str) -> None:
    override = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)[1:] + middle + value
    try:
        load(TEXT, override)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
awkward = st.sampled_from(
    ["3e-3", "no", "~", "010", "1:30", "${a}", "\\${", "\\\\${x", "=", "<<", "0o7", ".5", "- a", "\u2028"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | words | awkward,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | awkward, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(words | awkward, values, max_size=10))
def test_a_config_loads_back_equal(valid: Config, variables: dict[str, Any]) -> None:
    config = dataclasses.replace(valid, vars=variables)
    Path("back.yaml").write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load_config(Path("back.yaml")) == config
