"""Registries: options come from the constructor's signature, and every wrong one is one line that names it."""

from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal

import pytest
from config_example import TEXT, error_of, load, registered
from torch import nn

from metamem.config import ConfigError, Where
from metamem.config.convert import Range
from metamem.config.json_schema import json_schema
from metamem.registry import MODULES, Registry


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


@dataclass(frozen=True)
class Sizes:
    """Options of several parts."""

    width: int
    depth: Annotated[int, Range(low=1)] = 1

    def __post_init__(self) -> None:
        if self.width % self.depth:
            raise ValueError(f"width {self.width} is not divisible by depth {self.depth}")


def test_an_argument_that_is_a_dataclass_stands_for_its_fields(registry: Registry[Any]) -> None:
    @registry.register("sized")
    class Sized:
        def __init__(self, dim: int, sizes: Sizes, rate: float = 0.5) -> None:
            self.arguments = dim, sizes, rate

    assert list(registry.options("sized")) == ["dim", "width", "depth", "rate"]
    assert registry.options("sized")["width"][1] is MISSING
    built = registry.build("sized", {"width": 4, "depth": 2, "dim": 1})
    assert built.arguments == (1, Sizes(4, 2), 0.5)
    for options, message in [
        ({"dim": 1}, "here: width: is missing: part 'sized' needs an integer"),
        ({"dim": 1, "width": 4, "depth": 0}, "here: depth: must be at least 1, not 0"),
        ({"dim": 1, "width": 4, "depth": 3}, "here: width 4 is not divisible by depth 3"),
        ({"dim": 1, "widht": 4}, "here: widht: part 'sized' has no such option; did you mean 'width'?"),
    ]:
        assert message in error_of(lambda options=options: registry.build("sized", options, "here"))


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


def bare(dim) -> None:
    """A constructor whose argument nothing can check."""


def test_a_dotted_path_needs_no_registration(registry: Registry[Part]) -> None:
    built = registry.build("test_registry.Part", {"dim": 4, "size": 2}, "here", levels=[1])
    assert isinstance(built, Part) and built.arguments["levels"] == [1]
    assert registry.options("test_registry.Part") == registry.options("plain")
    assert registry.needs("test_registry.Part", "dim") and not registry.needs("test_registry.Part", "levels")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_registry.Prat", {}, "here: kind: there is no 'Prat' in test_registry"),
        ("test_registri.Part", {}, "here: kind: there is no module 'test_registri'"),
        ("test_registry.bare", {}, "here: kind: test_registry.bare: annotate 'dim', to check configs by"),
        ("test_registry.Part", {"dmi": 3}, "here: dmi: part 'test_registry.Part' has no such option"),
    ],
)
def test_what_is_wrong_with_a_dotted_path(registry: Registry[Part], name, options, message) -> None:
    assert message in error_of(lambda: registry.build(name, options, "here"))


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


# Options that are modules of their own


class Leaf(nn.Module):
    def __init__(self, dim: int, levels: Any = ()) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError("dim is too small")
        self.dim, self.levels = dim, levels


class Wrapper(nn.Module):
    def __init__(self, part: nn.Module, other: Leaf, times: int = 2) -> None:
        super().__init__()
        self.part, self.other = part, other


@pytest.fixture
def modules() -> Registry[nn.Module]:
    registry: Registry[nn.Module] = Registry("part", key="kind", builder_args={"levels"})
    registry.register("leaf")(Leaf)
    registry.register("wrapper")(Wrapper)
    return registry


def leaf(dim: Any = 3) -> dict[str, Any]:
    return {"kind": "leaf", "dim": dim}


def test_a_nested_module_is_built_from_its_own_entry(modules: Registry[nn.Module]) -> None:
    inner: dict[str, Any] = {"kind": "wrapper", "part": leaf(), "other": leaf(4)}
    assert modules.nested("wrapper", inner) == {("part",): leaf(), ("other",): leaf(4)}
    assert modules.nested("leaf", leaf()) == {}
    outer = modules.build("wrapper", {"part": inner, "other": leaf(5)}, "here", levels=[1])
    assert [outer.part.part.dim, outer.part.other.dim, outer.other.dim] == [3, 4, 5]
    assert outer.part.part.levels == [1]
    assert inner["part"] == leaf(), "the options are changed"


def test_a_builder_can_build_what_is_nested(modules: Registry[nn.Module]) -> None:
    seen = []

    def nested(keys: tuple[str, ...], entry: dict[str, Any]) -> nn.Module:
        seen.append((keys, entry))
        return Leaf(9)

    built = modules.build("wrapper", {"part": leaf(), "other": leaf(4)}, "here", nested)
    assert seen == [(("part",), leaf()), (("other",), leaf(4))] and built.part.dim == built.other.dim == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"other": leaf()}, "here: part: is missing: part 'wrapper' needs a mapping with a kind"),
        ({"part": 3, "other": leaf()}, "here: part: expected a mapping, not 3"),
        ({"part": {"dim": 3}, "other": leaf()}, "here: part.kind: is missing: name a part, such as leaf"),
        ({"part": {"kind": "laef"}, "other": leaf()}, "here: part.kind: there is no part 'laef'; did you mean 'leaf'?"),
        ({"part": leaf("x"), "other": leaf()}, "here: part.dim: expected an integer, not 'x'"),
        ({"part": leaf(0), "other": leaf()}, "here: part: dim is too small"),
        (
            {"part": leaf(), "other": {"kind": "wrapper", "part": leaf(), "other": leaf()}},
            "here: other.kind: 'wrapper' is no Leaf (leaf)",
        ),
    ],
)
def test_a_wrong_nested_module_is_one_line_with_its_place(
    modules: Registry[nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        modules.build("wrapper", options, "here")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class Several(nn.Module):
    def __init__(self, parts: dict[str, Leaf]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)


def test_a_mapping_of_modules_is_built_name_by_name(modules: Registry[nn.Module]) -> None:
    modules.register("several")(Several)
    options = {"parts": {"one": leaf(), "two": leaf(4)}}
    assert modules.nested("several", options) == {("parts", "one"): leaf(), ("parts", "two"): leaf(4)}
    built = modules.build("several", options, "here", levels=[1])
    assert [(name, part.dim, part.levels) for name, part in built.parts.items()] == [("one", 3, [1]), ("two", 4, [1])]
    assert options == {"parts": {"one": leaf(), "two": leaf(4)}}, "the options are changed"
    seen = []
    modules.build("several", options, "here", lambda keys, entry: seen.append((keys, entry)) or Leaf(9))
    assert seen == [(("parts", "one"), leaf()), (("parts", "two"), leaf(4))]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (None, "here: parts: is missing: part 'several' needs a mapping of names, each to a mapping with a kind"),
        ([leaf()], "here: parts: expected a mapping, not"),
        ({"one": {"dim": 3}}, "here: parts.one.kind: is missing: name a part, such as leaf"),
        ({"one": {"kind": "laef"}}, "here: parts.one.kind: there is no part 'laef'; did you mean 'leaf'?"),
        ({"one": leaf(0)}, "here: parts.one: dim is too small"),
        ({"one": {"kind": "several", "parts": {}}}, "here: parts.one.kind: 'several' is no Leaf (leaf)"),
    ],
)
def test_a_wrong_module_of_a_mapping_is_one_line_with_its_place(
    modules: Registry[nn.Module], parts: Any, message: str
) -> None:
    modules.register("several")(Several)
    with pytest.raises(ConfigError) as error:
        modules.build("several", {} if parts is None else {"parts": parts}, "here")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_schema_of_a_mapping_of_modules_has_any_module_under_any_name() -> None:
    with registered():
        MODULES.register("several")(Several)
        entries = json_schema()["$defs"]["Module"]["anyOf"][:-1]
    options = next(entry["properties"] for entry in entries if entry["properties"]["kind"]["const"] == "several")
    mapping = options["parts"]["anyOf"][0]
    assert mapping["type"] == "object"
    assert {"$ref": "#/$defs/Module"} in mapping["additionalProperties"]["anyOf"]


def test_options_of_nested_modules_are_checked_before_anything_is_built(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    head = 'head: {kind: linear, dim_in: "${vars.dim}", dim_out: 16}'
    graph = "{kind: network, modules: {a: {kind: linear, dim_in: 8, dim: 8}}, connections: []}"
    with registered():
        MODULES.register("wrapper")(Wrapper)
        for nested, place in [("{kind: linear, dim_in: 8, dim: 8}", "part"), (graph, "part.modules.a")]:
            text = TEXT.replace(
                head, f"head: {{kind: wrapper, part: {nested}, other: {{kind: linear, dim_in: 8, dim_out: 8}}}}"
            )
            error = error_of(lambda text=text: load(text))
            assert f"network.modules.head.{place}.dim: module kind 'linear' has no such option" in error


def test_the_schema_of_a_nested_module_is_that_of_any() -> None:
    with registered():
        MODULES.register("wrapper")(Wrapper)
        entries = json_schema()["$defs"]["Module"]["anyOf"][:-1]
    options = next(entry["properties"] for entry in entries if entry["properties"]["kind"]["const"] == "wrapper")
    assert {"$ref": "#/$defs/Module"} in options["part"]["anyOf"]
