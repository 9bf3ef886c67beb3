"""Registries: options come from the constructor's signature, and every wrong one is one line that names it."""

from dataclasses import MISSING
from typing import Annotated, Any, Literal

import pytest

from metamem.config import ConfigError, Where
from metamem.config.convert import Range
from metamem.registry import Registry


class Part:
    def __init__(
        self,
        dim: int,
        *,
        rate: Annotated[float, Range(low=0)] = 0.5,
        kind_of: Literal["sum", "mean"] = "sum",
        size: int | None = None,
        names: tuple[str, ...] = (),
        pair: tuple[float, float] = (0.0, 1.0),
        free: dict[str, Any] | None = None,
        biased: bool = True,
        levels: Any = (),
    ) -> None:
        if size is not None and dim % size:
            raise ValueError(f"dim {dim} is not divisible by size {size}")
        self.arguments = dict(dim=dim, rate=rate, size=size, names=names, pair=pair, free=free, levels=levels)


@pytest.fixture
def registry() -> Registry[Part]:
    registry: Registry[Part] = Registry("part", key="kind", builder_args={"levels"})
    registry.register("plain")(Part)
    return registry


def test_options_are_the_arguments_less_the_builders(registry: Registry[Part]) -> None:
    options = registry.options("plain")
    assert list(options) == ["dim", "rate", "kind_of", "size", "names", "pair", "free", "biased"]
    assert options["dim"] == (int, MISSING)
    assert options["size"] == (int | None, None)


def test_build_converts_and_supplies(registry: Registry[Part]) -> None:
    part = registry.build("plain", {"dim": 4, "rate": 1, "names": ["a"], "pair": [1, 2]}, "here", levels=[1], other=2)
    assert part.arguments["levels"] == [1]
    assert part.arguments["names"] == ("a",)
    assert part.arguments["pair"] == (1.0, 2.0)
    assert isinstance(part.arguments["rate"], float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dmi": 3}, "here: dmi: part 'plain' has no such option; did you mean 'dim'? (dim, rate, "),
        ({}, "here: dim: is missing: part 'plain' needs an integer"),
        ({"dim": "3"}, "here: dim: expected an integer, not '3'"),
        ({"dim": True}, "here: dim: expected an integer, not true"),
        ({"dim": 3.5}, "here: dim: expected an integer, not 3.5"),
        ({"dim": 3, "rate": -1}, "here: rate: must be at least 0, not -1"),
        ({"dim": 3, "rate": float("nan")}, "here: rate: nan is not a finite number"),
        ({"dim": 3, "rate": 10**400}, "is not a finite number"),
        ({"dim": 3, "kind_of": "maen"}, "here: kind_of: 'maen' is not valid; did you mean 'mean'? (sum, mean)"),
        ({"dim": 3, "kind_of": 1}, "here: kind_of: expected 'sum', 'mean', not 1"),
        ({"dim": 3, "size": "x"}, "here: size: expected an integer or null, not 'x'"),
        ({"dim": 3, "names": "a"}, "here: names: expected a list, not 'a'"),
        ({"dim": 3, "names": [1]}, "here: names[0]: expected a string, not 1"),
        ({"dim": 3, "pair": [1]}, "here: pair: expected a list of 2, not [1]"),
        ({"dim": 3, "free": []}, "here: free: expected a mapping or null, not []"),
        ({"dim": 3, "biased": 1}, "here: biased: expected true or false, not 1"),
        ({"dim": 3, "levels": []}, "here: levels: part 'plain' has no such option"),
        ({"dim": 3, "size": 2}, "here: dim 3 is not divisible by size 2"),
    ],
)
def test_wrong_options(registry: Registry[Part], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        registry.build("plain", options, "here")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_name_tells_the_nearest(registry: Registry[Part]) -> None:
    with pytest.raises(ConfigError, match=r"here: kind: there is no part 'plane'; did you mean 'plain'\? \(plain\)"):
        registry.build("plane", {}, Where.of("here"))


def test_names_are_unique_but_a_cell_can_run_again(registry: Registry[Part]) -> None:
    registry.register("plain")(Part)
    with pytest.raises(ValueError, match="already registered"):
        registry.register("plain")(lambda: None)
    assert list(registry) == ["plain"]
    assert "plain" in registry


def test_an_argument_without_annotation_is_refused(registry: Registry[Part]) -> None:
    with pytest.raises(TypeError, match="annotate 'dim'"):
        registry.register("bare")(lambda dim: dim)


def test_functions_can_be_registered(registry: Registry[Part]) -> None:
    @registry.register("made")
    def made(dim: int = 2) -> Part:
        return Part(dim)

    assert registry.build("made", {}).arguments["dim"] == 2
