"""An ablation: a grid over a config, as YAML of its own kind.

    base: ../associative_recall.yaml          # a config, relative to this file, or metamem:FILE for one that ships
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
    resources: {cpus: 1, gpus: 0, memory: 2000000000}             # of each cell
    retries: 1                                # of a cell whose process dies

What a family varies multiplies: its grid, its columns, its levels. Cells may be chosen one by one, too:

    search:
      sampler: tpe                            # or random
      trials: 40                              # points of the space, each a cell for every seed
      space: {vars.rate: {low: 0.001, high: 1, log: true}, vars.width: {low: 4, high: 64, integer: true},
              vars.kind: [linear, mlp]}
      minimise: error                         # or maximise: the mean of a metric over seeds
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
from metamem.config.schema import Config, Count, Located, NonNegative, Positive, Whole
from metamem.config.shipped import locate

Attribution = Literal["leave_one_out", "add_one_in"]

SEARCH = "search"  # the family of a search's cells
_NAME = re.compile(r"\w[\w.-]*")
_FAMILY = re.compile(r"\w[\w .+-]*")


@dataclass(frozen=True)
class FamilyConfig(Located):
    """A family of cells: overrides that all of them have (`set`), and what varies: the product of `grid`, the columns
    of `together` (lists of one length), and `levels` (which fast levels there are)."""

    set: dict[str, Any] = field(default_factory=dict[str, Any])
    grid: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    together: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    levels: Annotated[list[Attribution], ONE_OR_MORE] = field(default_factory=list[Attribution])


@dataclass(frozen=True)
class IntervalConfig(Located):
    """The numbers from `low` to `high`, evenly, or in their logarithm; whole ones only, with `integer`."""

    low: float
    high: float
    log: bool = False
    integer: bool = False


@dataclass(frozen=True)
class SearchConfig(Located):
    """Points of `space` (key -> interval, or a list of values) that a sampler of Optuna chooses one by one, by what
    those before came to, so as to `minimise` or `maximise` the mean of a metric over the ablation's seeds."""

    trials: Count
    space: dict[str, IntervalConfig | list[Any]]
    sampler: Literal["tpe", "random"] = "tpe"
    minimise: str | None = None
    maximise: str | None = None
    seed: Whole = 0

    @property
    def metric(self) -> str:
        """The metric that it is about."""
        return self.minimise or self.maximise or ""


@dataclass(frozen=True)
class ResourcesConfig(Located):
    """What a cell takes of the machine that it runs on: CPUs (parts of one too; it has a thread for each), GPUs, bytes
    of memory. The last two are for a cluster to place cells by; local ones share their machine."""

    cpus: Positive = 1.0
    gpus: NonNegative = 0.0
    memory: Count | None = None

    @property
    def threads(self) -> int:
        """The threads of a cell."""
        return max(1, int(self.cpus))


@dataclass(frozen=True)
class AblationConfig(Located):
    """An ablation: families of cells over the config `base`, and those that a `search` chooses, each cell once for
    every one of `seeds`. `function`, as `module:function`, measures a cell in place of a training. `name` names its
    folder and defaults to the file's. A cell whose process dies is begun again, `retries` times."""

    name: str
    base: str
    cells: dict[str, FamilyConfig] = field(default_factory=dict[str, FamilyConfig])
    search: SearchConfig | None = None
    seeds: Annotated[list[Whole], ONE_OR_MORE] = field(default_factory=lambda: [0])
    set: dict[str, Any] = field(default_factory=dict[str, Any])
    function: str | None = None
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    retries: Whole = 1


KEYS = tuple(item.name for item in fields(AblationConfig) if item.name != "where")
PARTS = ("resources", "search")  # keys of which an override may change a part


def load_ablation(path: Path | str, overrides: Sequence[str | Override] = ()) -> AblationConfig:
    """The ablation in the file at `path`; an override's key is one of its own, such as `seeds=[0, 1]`.

    Raises `ConfigError` for what is wrong with the file itself; cells are checked by `metamem.analysis.plan`.
    """
    path = locate(path)
    place = display(path)
    root = nodes.parse(read_text(path, place), place)
    if "base" not in root.entries:
        kind = "a config" if root.entries.keys() & _config_keys() else "no ablation"
        raise Where.of(place).error(f"is {kind}; an ablation names the config that it varies, as base: ../config.yaml")
    root = apply_overrides(root, overrides, AblationConfig)
    root.entries.setdefault("name", Node(path.stem, root.place))
    plain, sources = nodes.strip(root)
    ablation: AblationConfig = convert(plain, AblationConfig, Where(sources))
    _check(ablation)
    return ablation


def is_ablation(path: Path) -> bool:
    """Whether a YAML file is an ablation rather than a config."""
    return "base" in nodes.parse(read_text(path, display(path)), display(path)).entries


def _config_keys() -> set[str]:
    return {"extends", *(item.name for item in fields(Config))} - {*KEYS, "where"}


def _check(ablation: AblationConfig) -> None:
    if not _NAME.fullmatch(ablation.name):
        raise (ablation.where / "name").error(
            f"{show(ablation.name)} cannot name a folder: use letters, digits, '.', '_', '-'"
        )
    _distinct(ablation.seeds, ablation.where / "seeds")
    if not ablation.cells and ablation.search is None:
        raise (ablation.where / "cells").error("is empty: name at least one family of cells, as {base: {}}")
    if ablation.search is not None:
        _check_search(ablation.search, ablation)
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


def _check_search(search: SearchConfig, ablation: AblationConfig) -> None:
    where = search.where
    if (search.minimise is None) == (search.maximise is None):
        raise where.error("minimise a metric, or maximise one: name it there")
    if SEARCH in ablation.cells:
        raise ablation.where.at("cells", SEARCH).error(
            "is what the cells of the search are called: choose another name"
        )
    if not search.space:
        raise (where / "space").error("is empty: name at least one key, as {training.batch: [8, 16, 32]}")
    for key, values in search.space.items():
        place = where.at("space", key)
        if key == "seed":
            raise place.error("every cell has the seeds that seeds lists")
        if key in ablation.set:
            raise place.error("is in set too: a cell has one value of it")
        if isinstance(values, list):
            _distinct(values, place)
            continue
        if values.low >= values.high:
            raise (place / "high").error(f"must be above low, {values.low:g}, not {values.high:g}")
        if values.log and values.low <= 0:
            raise (place / "low").error(f"must be above 0 for a logarithm, not {values.low:g}")
        for name in ("low", "high"):
            if values.integer and not getattr(values, name).is_integer():
                raise (place / name).error(f"must be an integer, as integer is true, not {getattr(values, name):g}")


def _distinct(values: Sequence[Any], where: Where, repeats: bool = False, empty: bool = False) -> None:
    if not values and not empty:
        raise where.error("the list is empty: name at least one")
    for index, value in enumerate(values):
        if not repeats and any(value == other and type(value) is type(other) for other in values[:index]):
            raise (where / index).error(f"{show(value)} is listed twice: that would be the same cell")


def split_overrides(overrides: Sequence[str]) -> tuple[list[Override], list[Override]]:
    """Overrides of a command line: those of the ablation's own keys, and those of every cell's config."""
    parsed = [parse_override(text) for text in overrides]
    own = [override for override in parsed if override.key in KEYS or override.key.partition(".")[0] in PARTS]
    return own, [override for override in parsed if override not in own]
