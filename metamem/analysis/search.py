"""A search: cells that are chosen one by one, by what all before came to. Optuna's samplers choose.

Nothing but the rows is its memory: a trial's generator is seeded by its number, so that a search that was stopped goes
on from the results file; with one worker, to the same cells as one that was not.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from metamem.analysis.plan import Cell, Search, import_optuna, trial_name
from metamem.analysis.results import Result
from metamem.config import ConfigError
from metamem.config.ablation import SEARCH, IntervalConfig, SearchConfig

DIGITS = 4  # of a number that is chosen: nothing depends on more, and one can read it
Found = Callable[[Cell], Result | None]


@dataclass(frozen=True)
class Trial:
    """A point, and its cells, one a seed; none where no config can have its values."""

    values: dict[str, Any]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Told:
    """What a sampler is told of a point: its score; None while it runs; nan where it diverged or failed."""

    values: Mapping[str, Any]
    score: float | None


def search_cells(
    search: Search, before: Iterable[Result], found: Found, refused: Callable[[Result], None]
) -> Iterator[Cell]:
    """The cells of a search, each point chosen when its first cell is asked for.

    `before` are rows of an earlier run: their points are taken again. `found` gives the row of a cell that is finished;
    `refused` is given that of a point that no config can have. Raises ConfigError for a metric that cells do not have.
    """
    settings, trials = search.settings, list[Trial]()
    known = _recorded(before, settings)
    for number in range(settings.trials):
        told = [Told(trial.values, score(trial.cells, found, settings)) for trial in trials]
        values = known.get(number) or suggest(settings, told, number)
        try:
            cells = search.cells(number, values)
        except ConfigError as error:
            name = trial_name(number, values)
            refused(Result(name, SEARCH, values, values, 0, name, "failed", message=str(error)))
            cells = ()
        trials.append(Trial(values, cells))
        yield from cells


def score(cells: Sequence[Cell], found: Found, settings: SearchConfig) -> float | None:
    """The mean of the metric over a point's cells; None while some are not finished; nan where one diverged or failed.
    Raises ConfigError where they have no such metric."""
    rows = [found(cell) for cell in cells]
    if any(row is None for row in rows):
        return None
    for row in rows:
        if row is not None and row.status == "done" and settings.metric not in row.metrics:
            place = settings.where / ("minimise" if settings.minimise else "maximise")
            raise place.unknown(f"no cell has a metric {settings.metric!r}", settings.metric, row.metrics)
    return mean_metric([row for row in rows if row is not None], settings)


def mean_metric(rows: Sequence[Result], settings: SearchConfig) -> float:
    """The mean of the metric; nan where one of the rows has none, or there is no row."""
    numbers = [row.metrics.get(settings.metric) if row.status == "done" else None for row in rows]
    there = [number for number in numbers if number is not None]
    return statistics.fmean(there) if there and len(there) == len(rows) else math.nan


def suggest(settings: SearchConfig, told: Sequence[Told], number: int) -> dict[str, Any]:
    """The values of the next point: a function of the points so far, and of the search's seed and the number."""
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = Random(f"{settings.seed} {number}").getrandbits(32)
    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    study = optuna.create_study(
        direction="minimize" if settings.minimise else "maximize", sampler=samplers[settings.sampler](seed=seed)
    )
    space = {key: _distribution(optuna, values) for key, values in settings.space.items()}
    states = optuna.trial.TrialState
    for one in told:
        # A point that diverged is a result, and a bad one: what was pruned is worse to a sampler than any score.
        state = states.RUNNING if one.score is None else states.PRUNED if math.isnan(one.score) else states.COMPLETE
        params = {key: _as_param(value, settings.space[key]) for key, value in one.values.items()}
        value = one.score if state == states.COMPLETE else None
        study.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=space, value=value))
    params = study.ask(space).params
    return {key: _as_value(params[key], values) for key, values in settings.space.items()}


def best(search: Search, rows: Iterable[Result]) -> tuple[str, float] | None:
    """The point with the best score among rows of a search, by the name of its cells, and its score."""
    settings, points = search.settings, dict[str, list[Result]]()
    for row in rows:
        if row.family == SEARCH:
            points.setdefault(row.cell, []).append(row)
    scores = {name: mean for name, of in points.items() if not math.isnan(mean := mean_metric(of, settings))}
    if not scores:
        return None
    name = (min if settings.minimise else max)(scores, key=scores.__getitem__)
    return name, scores[name]


def _recorded(rows: Iterable[Result], settings: SearchConfig) -> dict[int, dict[str, Any]]:
    """Number -> values of the points of an earlier run that this search could have chosen."""
    found = {}
    for row in rows:
        number = re.match(rf"{SEARCH} (\d+) ", row.cell)
        of_space = row.family == SEARCH and row.factors.keys() == settings.space.keys()
        if number and of_space and all(_is_in(row.factors[key], values) for key, values in settings.space.items()):
            found[int(number[1])] = row.factors
    return found


def _is_in(value: Any, values: IntervalConfig | list[Any]) -> bool:
    if isinstance(values, list):
        return value in values
    return isinstance(value, int if values.integer else float) and values.low <= value <= values.high


def _distribution(optuna: Any, values: IntervalConfig | list[Any]) -> Any:
    """A list is a choice of its indices: its values may be anything."""
    if isinstance(values, list):
        return optuna.distributions.CategoricalDistribution(list(range(len(values))))
    if values.integer:
        return optuna.distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
    return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)


def _as_param(value: Any, values: IntervalConfig | list[Any]) -> Any:
    return values.index(value) if isinstance(values, list) else value


def _as_value(param: Any, values: IntervalConfig | list[Any]) -> Any:
    if isinstance(values, list):
        return values[param]
    return param if values.integer else min(max(float(f"{param:.{DIGITS}g}"), values.low), values.high)
