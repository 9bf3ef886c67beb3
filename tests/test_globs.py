"""Globs over parameter names: `*` within a segment, `**` over any number of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metamem.globs import match_names, matches, nearest_names

NAMES = [
    "embed.weight",
    "blocks.0.memory.init.0",
    "blocks.0.memory.gate.weight",
    "blocks.1.memory.init.0",
    "blocks.1.mlp.up.weight",
    "head.weight",
]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("embed.weight", "embed.weight", True),
        ("embed", "embed.weight", False),
        ("embed.*", "embed.weight", True),
        ("*", "embed.weight", False),
        ("**", "embed.weight", True),
        ("blocks.*.memory.**", "blocks.0.memory.init.0", True),
        ("blocks.*.memory.**", "blocks.0.memory", True),
        ("blocks.*.memory.**", "blocks.0.memory2.init", False),
        ("blocks.**.weight", "blocks.weight", True),
        ("blocks.**.weight", "blocks.0.a.b.weight", True),
        ("**.weight", "weight", True),
        ("blocks.*.mem*.**", "blocks.3.memory.x", True),
        ("a.b", "axb", False),
        ("a+.b", "aa.b", False),
        ("a+.b", "a+.b", True),
        ("**.**", "a", True),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_match_names_keeps_the_order_of_names_and_names_each_once() -> None:
    assert match_names(["head.**", "**.weight"], NAMES) == [
        "embed.weight",
        "blocks.0.memory.gate.weight",
        "blocks.1.mlp.up.weight",
        "head.weight",
    ]
    assert match_names([], NAMES) == []


def test_nearest_names_stay_in_the_part_that_was_meant() -> None:
    assert all(".memory." in name for name in nearest_names("blocks.*.memry.**", NAMES)[:2])
    assert nearest_names("hed.weight", NAMES)[0] == "head.weight"
    assert nearest_names("x", []) == []


segments = st.lists(st.text("ab01_", min_size=1, max_size=3), min_size=1, max_size=5)


@given(segments, st.data())
def test_a_name_matches_what_is_made_of_it(parts: list[str], data: st.DataObject) -> None:
    name = ".".join(parts)
    start = data.draw(st.integers(0, len(parts)))
    end = data.draw(st.integers(start, len(parts)))
    assert matches(name, name)
    assert matches(".".join("*" for _ in parts), name)
    assert matches(".".join([*parts[:start], "**", *parts[end:]]), name)
    assert not matches(".".join(["*", *parts]), name)


@given(st.text(max_size=20), segments)
def test_any_text_is_a_glob(pattern: str, parts: list[str]) -> None:
    assert matches(pattern, ".".join(parts)) in (True, False)
