"""An ablation: a grid over a config, as YAML of its own kind.

    base: ../associative_recall.yaml          # a config, relative to this file
    seeds: [0, 1, 2, 3, 4]                    # each cell once a seed
    set: {training.steps: 400}                # overrides of all cells
    cells:                                    # families of cells, by name
      periods:
        set: {vars.width: 8}                  # overrides of all cells of the family
        grid: {vars.period: [1, 4, 16], vars.rate: [0.1, 0.3]}        # a cell for each pair
      scaled:
        together: {vars.period: [1, 4, 16], vars.rate: [0.3, 0.075, 0.019]}   # a cell for each column
      timescales:
        levels: [leave_one_out, add_one_in]   # all fast levels; all but one; one alone
    function: mypackage.module:function       # (config, seed) -> measurements, in place of a training

What a family varies multiplies: its grid, its columns, its levels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from metamem.config import nodes
from metamem.config.convert import ONE_OR_MORE, convert
from metamem.config.errors import Where, show
from metamem.config.load import display, read_text
from metamem.config.nodes import Node
from metamem.config.overrides import Override, apply_overrides, parse_override
from metamem.config.schema import Config, Located, Whole

Attribution = Literal["leave_one_out", "add_one_in"]

_NAME = re.compile(r"\w[\w.-]*")
_FAMILY = re.compile(r"\w[\w .+-]*")


@dataclass(frozen=True)
class FamilyConfig(Located):
    """A family of cells: overrides that all of them have (`set`), and what varies: the product of `grid`, the columns
    of `together` (lists of one length), and `levels` (which fast levels there are)."""

    set: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    together: dict[str, list[Any]] = field(default_factory=dict)
    levels: Annotated[list[Attribution], ONE_OR_MORE] = field(default_factory=list)


@dataclass(frozen=True)
class AblationConfig(Located):
    """An ablation: families of cells over the config `base`, each cell once for every one of `seeds`. `function`, as
    `module:function`, measures a cell in place of a training. `name` names its folder and defaults to the file's."""

    name: str
    base: str
    cells: dict[str, FamilyConfig]
    seeds: Annotated[list[Whole], ONE_OR_MORE] = field(default_factory=lambda: [0])
    set: dict[str, Any] = field(default_factory=dict)
    function: str | None = None


KEYS = tuple(item.name for item in fields(AblationConfig) if item.name != "where")


def load_ablation(path: Path | str, overrides: Sequence[str | Override] = ()) -> AblationConfig:
    """The ablation in the file at `path`; an override's key is one of its own, such as `seeds=[0, 1]`.

    Raises `ConfigError` for what is wrong with the file itself; cells are checked by `metamem.analysis.plan`.
    """
    path = Path(path)
    place = display(path)
    root = nodes.parse(read_text(path, place), place)
    if not isinstance(root.value, dict) or "base" not in root.value:
        kind = "a config" if isinstance(root.value, dict) and {*root.value} & _config_keys() else "no ablation"
        raise Where.of(place).error(f"is {kind}; an ablation names the config that it varies, as base: ../config.yaml")
    root = apply_overrides(root, overrides)
    root.value.setdefault("name", Node(path.stem, root.place))
    plain, sources = nodes.strip(root)
    ablation: AblationConfig = convert(plain, AblationConfig, Where(sources))
    _check(ablation)
    return ablation


def is_ablation(path: Path) -> bool:
    """Whether a YAML file is an ablation rather than a config."""
    value = nodes.parse(read_text(path, display(path)), display(path)).value
    return isinstance(value, dict) and "base" in value


def _config_keys() -> set[str]:
    return {"extends", *(item.name for item in fields(Config))} - {*KEYS, "where"}


def _check(ablation: AblationConfig) -> None:
    if not _NAME.fullmatch(ablation.name):
        raise (ablation.where / "name").error(
            f"{show(ablation.name)} cannot name a folder: use letters, digits, '.', '_', '-'"
        )
    _distinct(ablation.seeds, ablation.where / "seeds")
    if not ablation.cells:
        raise (ablation.where / "cells").error("is empty: name at least one family of cells, as {base: {}}")
    for name, family in ablation.cells.items():
        if not _FAMILY.fullmatch(name):
            raise family.where.error(f"{show(name)} cannot name cells: use letters, digits, blanks, '.', '_', '+', '-'")
        _check_family(family)


def _check_family(family: FamilyConfig) -> None:
    seen: dict[str, str] = {}
    for part in ("set", "grid", "together"):
        for key, value in getattr(family, part).items():
            place = family.where.at(part, key)
            if key == "seed":
                raise place.error("every cell has the seeds that seeds lists")
            if key in seen:
                raise place.error(f"is in {seen[key]} too: a cell has one value of it")
            seen[key] = part
            if part != "set":
                _distinct(value, place, repeats=part == "together")
    lengths = {key: len(values) for key, values in family.together.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        raise (family.where / "together").error(f"the lists vary together, and have different lengths ({listed})")
    columns = list(zip(*family.together.values(), strict=True))
    for index, column in enumerate(columns):
        if column in columns[:index]:
            raise (family.where / "together").error(f"the columns {columns.index(column)} and {index} are the same")
    _distinct(family.levels, family.where / "levels", empty=True)


def _distinct(values: Sequence[Any], where: Where, repeats: bool = False, empty: bool = False) -> None:
    if not values and not empty:
        raise where.error("the list is empty: name at least one")
    for index, value in enumerate(values):
        if not repeats and any(value == other and type(value) is type(other) for other in values[:index]):
            raise (where / index).error(f"{show(value)} is listed twice: that would be the same cell")


def split_overrides(overrides: Sequence[str]) -> tuple[list[Override], list[Override]]:
    """Overrides of a command line: those of the ablation's own keys, and those of every cell's config."""
    parsed = [parse_override(text) for text in overrides]
    own = [override for override in parsed if override.key in KEYS]
    return own, [override for override in parsed if override not in own]
