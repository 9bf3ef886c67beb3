"""The plan of an ablation: its cells, each with a config that was loaded, checked and built before anything runs.

    plan = plan_ablation("configs/ablation/periods.yaml", ["training.steps=20"])
    rows = run_ablation(plan, Path("runs/periods"), workers=2)

A cell is one config and one seed. Cells of several families that come to the same config are one computation.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import metamem.tasks  # noqa: F401  (fills the registry)
from metamem.config import Config, ConfigError, UserError, Where, load_config, resolve_objectives, to_dict
from metamem.config.ablation import (
    SEARCH,
    AblationConfig,
    Attribution,
    FamilyConfig,
    IntervalConfig,
    ResourcesConfig,
    SearchConfig,
    load_ablation,
    split_overrides,
)
from metamem.config.errors import show
from metamem.config.load import read_text
from metamem.config.overrides import Override
from metamem.config.shipped import locate
from metamem.hierarchy import OuterLevels
from metamem.hierarchy.calendar import calendar_of
from metamem.network import build
from metamem.registry import check_options
from metamem.training import build_task

LEVELS = "levels"  # the factor of a family that takes levels out
FAST = ("token", "inner")  # clocks
Measure = Callable[[Config, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One config and one seed. `factors`: what varies in its family, full key -> value; `overrides`: all that it sets
    over the base; `fingerprint`: equal where config, seed and function are."""

    name: str
    family: str
    factors: dict[str, Any]
    overrides: dict[str, Any]
    seed: int
    config: Config
    fingerprint: str

    @property
    def slug(self) -> str:
        """The cell as a file's name."""
        return self.config.name


@dataclass(frozen=True)
class Search:
    """Cells that are chosen one by one: `cells` gives those, one a seed, of a number and values of the space's keys."""

    settings: SearchConfig
    cells: Callable[[int, Mapping[str, Any]], tuple[Cell, ...]]


@dataclass(frozen=True)
class Plan:
    """The cells of an ablation, seed by seed, so that one that is stopped has all cells of its first seeds."""

    name: str
    source: str
    base: str
    function: str | None
    cells: tuple[Cell, ...]
    seeds: list[int]
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    retries: int = 1
    search: Search | None = None

    @property
    def count(self) -> int:
        """How many cells there will be."""
        return len(self.cells) + (self.search.settings.trials * len(self.seeds) if self.search else 0)


def plan_ablation(path: Path | str, overrides: Sequence[str] = ()) -> Plan:
    """The plan of the ablation in a file. Overrides of its own keys (`seeds=[0]`) change it, all others every cell.

    Raises ConfigError, before anything runs, for whatever is wrong with any cell: a key that does not exist, a type, a
    network that cannot be built, a task that cannot be had, a function that is not there.
    """
    path = locate(path)
    own, shared = split_overrides(overrides)
    ablation = load_ablation(path, own)
    if ablation.function is not None:
        resolve_function(ablation.function, ablation.where / "function")
    base = locate(ablation.base, path.parent)
    read_text(base, str(ablation.where / "base"))  # an error is told at the place that names it
    named = [
        (name, family, factors, [*settings, *shared])
        for family, options in ablation.cells.items()
        for name, factors, settings in _family(ablation, family, options, base)
    ]
    first = [_first_cell(ablation, base, *one) for one in named]
    return Plan(
        ablation.name,
        str(path),
        str(base),
        ablation.function,
        tuple(_all_seeds(ablation, base, first, named)),
        ablation.seeds,
        ablation.resources,
        ablation.retries,
        None if ablation.search is None else _search(ablation, ablation.search, base, shared),
    )


def resolve_function(path: str, where: Where | str = "") -> Measure:
    """The function at `module:function`, which measures a cell: `(config, seed) -> mapping`."""
    place, (module_name, colon, name) = Where.of(where), path.partition(":")
    if not colon or not name:
        raise place.error(f"{show(path)}: write a function as module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises as it is imported
        raise place.error(f"importing {module_name} failed: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise place.unknown(f"{module_name} has no function {name!r}", name, there)
    return getattr(module, name)


def import_optuna() -> Any:
    """Optuna, which chooses the cells of a search; or a UserError that names the extra."""
    try:
        import optuna
    except ImportError:
        raise UserError("a search needs Optuna: pip install 'metamem-torch[optuna]'") from None
    return optuna


Named = tuple[str, str, dict[str, Any], list[Override]]  # a cell's name, family, factors, overrides


def _all_seeds(ablation: AblationConfig, base: Path, first: Sequence[Cell], named: Sequence[Named]) -> Iterator[Cell]:
    """The cells of all seeds, given those of the first."""
    yield from first
    if len(ablation.seeds) == 1:
        return
    # Loading takes as long as a small training: it is done again only where something refers to the seed.
    plain = [to_dict(load_config(base, [Override("seed", seed)])) | {"seed": 0} for seed in (0, 1)]
    refers = plain[0] != plain[1] or "${" + "seed" in str([one[-1] for one in named])
    for seed in ablation.seeds[1:]:
        for cell, (*_, settings) in zip(first, named, strict=True):
            again = _load(ablation, base, settings, seed) if refers else replace(cell.config, seed=seed)
            yield _seeded(cell, again, ablation.function)


def _first_cell(
    ablation: AblationConfig, base: Path, name: str, family: str, factors: dict[str, Any], settings: Sequence[Override]
) -> Cell:
    """A cell of the first seed, its network and task built: no other seed changes what can be wrong with them."""
    try:
        config = _load(ablation, base, settings, ablation.seeds[0])
        check_options(config)
        resolve_objectives(config)
        OuterLevels(config, build(config), calendar_of(config, build_task(config)))
    except ValueError as error:  # ConfigError, or what a task says of its options
        raise ConfigError(f"{error} [cell {name!r}]") from error
    overrides = {item.key: item.value for item in settings}
    return _seeded(Cell(name, family, factors, overrides, config.seed, config, ""), config, ablation.function)


def _load(ablation: AblationConfig, base: Path, settings: Sequence[Override], seed: int) -> Config:
    return load_config(base, [*settings, Override("seed", seed, (ablation.where / "seeds").place)])


def _seeded(cell: Cell, config: Config, function: str | None) -> Cell:
    """The cell with the config of a seed, named after both."""
    identity = json.dumps([to_dict(config) | {"name": ""}, function], sort_keys=True, default=str)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    slug = f"{re.sub('[^A-Za-z0-9.]+', '-', cell.name)[:80]}-seed{config.seed}-{fingerprint[:6]}"
    return replace(cell, seed=config.seed, config=replace(config, name=slug), fingerprint=fingerprint)


def _family(
    ablation: AblationConfig, family: str, options: FamilyConfig, base: Path
) -> Iterator[tuple[str, dict[str, Any], list[Override]]]:
    """(name, factors, overrides) of each cell of a family."""
    fixed = [*_overrides(ablation.set, ablation.where / "set"), *_overrides(options.set, options.where / "set")]
    axes: list[list[list[Override]]] = [
        [[Override(key, value, options.where.at("grid", key, index).place)] for index, value in enumerate(values)]
        for key, values in options.grid.items()
    ]
    if options.together:
        columns = zip(*options.together.values(), strict=True)
        place = (options.where / "together").place
        axes.append([[Override(k, v, place) for k, v in zip(options.together, c, strict=True)] for c in columns])
    variants: list[tuple[str | None, list[Override]]] = [(None, [])]
    if options.levels:
        variants = list(_attributions(options, load_config(base, fixed)))
    short = short_names([*options.grid, *options.together])
    for point in itertools.product(*axes):
        varied = [override for part in point for override in part]
        for variant, removed in variants:
            factors = {item.key: item.value for item in varied} | ({LEVELS: variant} if variant else {})
            shown = [f"{short.get(key, key)}={value_text(value)}" for key, value in factors.items()]
            yield " ".join([family, *shown]), factors, [*fixed, *varied, *removed]


def _attributions(options: FamilyConfig, config: Config) -> Iterator[tuple[str, list[Override]]]:
    """Which fast levels there are: all, all but one (`leave_one_out`), one alone (`add_one_in`)."""
    place = options.where / "levels"
    fast = [level.name for level in config.hierarchy.levels if level.clock in FAST]
    if len(fast) < 2:
        raise place.error(f"takes fast levels apart, and the config has {', '.join(fast) or 'none'}")

    def out(names: Sequence[str]) -> list[Override]:
        return [Override(f"hierarchy.levels.{name}", None, place.place) for name in names]

    yield "all", []
    kinds: list[Attribution] = options.levels
    if "leave_one_out" in kinds:
        yield from ((f"without {name}", out([name])) for name in fast)
    if "add_one_in" in kinds:
        yield from ((f"only {name}", out([other for other in fast if other != name])) for name in fast)


def _search(ablation: AblationConfig, search: SearchConfig, base: Path, shared: Sequence[Override]) -> Search:
    """The search of an ablation. Raises ConfigError where no cell could have a value of its space: of each key the
    ends, the middle, or every value of a list are tried, the other keys at their first."""
    import_optuna()
    fixed = _overrides(ablation.set, ablation.where / "set")

    def named(name: str, values: Mapping[str, Any]) -> Named:
        settings = _overrides(values, search.where / "space")
        return name, SEARCH, dict(values), [*fixed, *settings, *shared]

    def cells(number: int, values: Mapping[str, Any]) -> tuple[Cell, ...]:
        one = named(trial_name(number, values), values)
        return tuple(_all_seeds(ablation, base, [_first_cell(ablation, base, *one)], [one]))

    probes = {key: _probes(values) for key, values in search.space.items()}
    first = {key: values[0] for key, values in probes.items()}
    for key, values in probes.items():
        for value in values:
            point = first | {key: value}
            _first_cell(ablation, base, *named(trial_name(0, point), point))
    return Search(search, cells)


def _probes(values: IntervalConfig | list[Any]) -> list[Any]:
    if isinstance(values, list):
        return values
    middle = (values.low * values.high) ** 0.5 if values.log else (values.low + values.high) / 2
    return [int(x) if values.integer else x for x in (values.low, values.high, middle)]


def trial_name(number: int, values: Mapping[str, Any]) -> str:
    """The name of the cells of a point that a search chose."""
    short = short_names(list(values))
    return " ".join([SEARCH, str(number), *(f"{short[key]}={value_text(value)}" for key, value in values.items())])


def _overrides(settings: Mapping[str, Any], where: Where) -> list[Override]:
    return [Override(key, value, (where / key).place) for key, value in settings.items()]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key by as few of its last parts as tell it from the others: `period`, or `gist.period`."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [f".{other}" for other in keys if other != key]
        names[key] = next((tail for tail in tails if not any(other.endswith(f".{tail}") for other in others)), key)
    return names


def value_text(value: Any) -> str:
    """A factor's value in the name of a cell."""
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, dict | list) else show(value)
