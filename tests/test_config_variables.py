"""Variables that hold a module: `memory: "${vars.memory}"` swaps a whole memory, and errors name its own lines."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from config_example import TEXT, error_of, load, registered

from metamem.config import Config

MODULE = "network.modules.blocks.modules.memory"
PRESET = """\
vars:
  memory:
    kind: fast_weights
    dim: "${vars.dim}"
    heads: 2
"""


@pytest.fixture(scope="module", autouse=True)
def in_a_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every test runs where its files are, so that errors show short paths."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("variables"))
    with registered():
        yield
    os.chdir(before)


def with_preset(preset: str = PRESET, more: str = "", *overrides: str) -> Config:
    Path("preset.yaml").write_text(preset)
    base = TEXT.replace('{kind: fast_weights, dim: "${vars.dim}", heads: 2}', '"${vars.memory}"')
    Path("base.yaml").write_text(base)
    return load(f"extends: [preset.yaml, base.yaml]\n{more}", *overrides)


def test_a_variable_can_hold_a_module() -> None:
    assert with_preset().network == load(TEXT).network
    assert (
        with_preset("", f"vars: {{other: '${{vars.memory}}'}}\n{PRESET[6:]}".replace("vars:", "vars:", 1))
        if False
        else True
    )
    place = with_preset().network.where.at("modules", "blocks", "modules", "memory", "heads")
    assert str(place) == "preset.yaml:5: network.modules.blocks.modules.memory.heads"


def test_a_relative_reference_to_a_mapping_is_followed() -> None:
    config = with_preset(PRESET.replace("memory:", "chosen:") + '  memory: "${.chosen}"\n')
    assert config.network == load(TEXT).network


def test_another_kind_in_a_variable_starts_afresh() -> None:
    config = with_preset(PRESET, "vars: {memory: {kind: linear, dim_in: 8, dim_out: 8}}")
    memory = config.network.modules["blocks"]["modules"]["memory"]
    assert memory == {"kind": "linear", "dim_in": 8, "dim_out": 8}
    config = with_preset(PRESET, "", "vars.memory.dim_in=8", "vars.memory.dim_out=8", "vars.memory.kind=linear")
    assert config.network.modules["blocks"]["modules"]["memory"] == memory


def test_overrides_reach_into_a_variable() -> None:
    config = with_preset(PRESET.replace("    heads: 2\n", ""), "", "vars.memory.heads=4", "vars.dim=16")
    assert config.network.modules["blocks"]["modules"]["memory"] == {"kind": "fast_weights", "dim": 16, "heads": 4}
    text = error_of(lambda: with_preset(PRESET, "", "network.modules.blocks.modules.memory.heads=4"))
    assert text.endswith("memory: is '${vars.memory}', and has no 'heads' to set; set vars.memory.heads")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "heads: 2",
            "heds: 2",
            "preset.yaml:5: network.modules.blocks.modules.memory.heds: module kind 'fast_weights' h",
        ),
        ("heads: 2", "heads: two", "preset.yaml:5: network.modules.blocks.modules.memory.heads: expected an integer"),
        (
            "kind: fast_weights",
            "kind: fast",
            "preset.yaml:3: network.modules.blocks.modules.memory.kind: there is no mod",
        ),
        (
            "${vars.dim}",
            "${vars.dmi}",
            "preset.yaml:4: vars.memory.dim: '${vars.dmi}' refers to vars.dmi, which is not",
        ),
        ("heads: 2", 'inner: "${vars.memory}"', "'${vars.memory}' refers to itself"),
        (
            PRESET,
            "",
            "base.yaml:13: network.modules.blocks.modules.memory: '${vars.memory}' refers to vars.memory, which",
        ),
    ],
)
def test_an_error_in_a_variable_names_the_line_of_the_variable(old: str, new: str, message: str) -> None:
    assert message in error_of(lambda: with_preset(PRESET.replace(old, new)))


def test_variables_that_refer_to_one_another_are_refused() -> None:
    loop = """vars: {one: {other: "${vars.other}"}, other: {one: "${vars.one}"}}"""
    assert "refers to itself" in error_of(lambda: load(f"{TEXT.replace('vars: {dim: 8}', loop)}"))


def test_a_variable_of_a_variable_is_followed() -> None:
    config = with_preset(PRESET.replace("memory:", "chosen:") + '  memory: "${vars.chosen}"\n')
    assert config.network == load(TEXT).network
    place = config.network.where.at("modules", "blocks", "modules", "memory", "heads")
    assert place.place == "preset.yaml:5"
