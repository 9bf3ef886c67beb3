"""Rows of ablations and of trainings, a group for each cell: its seeds together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metamem.analysis.ablation import PLAN
from metamem.analysis.cell import run_rows
from metamem.analysis.results import Result, read_results
from metamem.analysis.statistics import Interval, interval
from metamem.config import UserError, to_dict, to_yaml
from metamem.config.plain import is_mapping
from metamem.json_files import Check, is_text, is_whole, list_of, or_null, read_json
from metamem.training.run_folder import CONFIG, METRICS, run_config, runs_within

OPTIMUM = "optimum"  # a metric of this name, or `optimum/<metric>`, is the best that can be had


@dataclass(frozen=True)
class Group:
    """The rows of one cell; those that are done are what is averaged."""

    name: str
    family: str
    factors: dict[str, Any]
    rows: tuple[Result, ...]

    def metric(self, name: str) -> Interval:
        """A metric over seeds."""
        return interval([value for row in self.done if (value := row.metrics.get(name)) is not None])

    def cost(self, name: str) -> Interval:
        """A cost over seeds."""
        return interval([row.cost[name] for row in self.done if name in row.cost])

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """x and, a row a seed, y of a curve that all seeds have at the same x."""
        curves = [row.curves[name] for row in self.done if name in row.curves]
        curves = [curve for curve in curves if curve["x"] == curves[0]["x"]]
        if not curves:
            return None
        return np.array(curves[0]["x"], float), np.array([curve["y"] for curve in curves], float)

    def curves(self, prefix: str) -> list[str]:
        """The curves whose names begin so, without the beginning."""
        names = dict.fromkeys(name for row in self.done for name in row.curves if name.startswith(prefix))
        return [name.removeprefix(prefix) for name in names]

    def levels(self, prefix: str) -> dict[str, str]:
        """The curves of memories' levels under a prefix, `<memory>/<level>`, and what to call each: its level alone
        where there is one memory."""
        names = self.curves(prefix)
        several = len({name.rpartition("/")[0] for name in names}) > 1
        return {name: name if several else name.rpartition("/")[2] for name in names}

    def level_curves(self, prefix: str) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
        """The curves of `levels`: name, what to call it, x, and y, a row a seed."""
        for name, label in self.levels(prefix).items():
            if (curve := self.curve(prefix + name)) is not None:
                yield name, label, *curve

    @property
    def done(self) -> list[Result]:
        """The rows that are done."""
        return [row for row in self.rows if row.status == "done"]


@dataclass(frozen=True)
class Source:
    """One RUN of a report: an ablation or a training; `about`: what was run."""

    folder: Path
    title: str
    about: dict[str, Any]
    groups: tuple[Group, ...]


def read_source(folder: Path) -> Source:
    """An ablation's folder, or that of a training. Raises UserError for any other."""
    if (folder / PLAN).is_file():
        return _ablation(folder)
    if (folder / CONFIG).is_file() and (folder / METRICS).is_file():
        return _training(folder)
    missing = f"it has no {PLAN}, and no {CONFIG} with {METRICS}"
    raise UserError(f"{folder}: neither an ablation nor a run ({missing}){runs_within(folder)}")


def _is_cell(value: Any) -> bool:
    return is_mapping(value) and is_text(value.get("name")) and is_mapping(value.get("overrides"))


DESCRIBED: dict[str, Check] = {
    **dict.fromkeys(("name", "source", "config"), is_text),
    "base": or_null(is_text),
    "seeds": list_of(is_whole),
    "cells": list_of(_is_cell),
    "fingerprints": list_of(is_text),
}


def _ablation(folder: Path) -> Source:
    about = read_json(folder / PLAN, "the description of an ablation", DESCRIBED)
    wanted = set(about["fingerprints"])
    rows = [row for row in read_results(folder) if row.fingerprint in wanted]
    latest = {(row.cell, row.seed): row for row in rows}  # one that failed may have been run again
    if not latest:
        raise UserError(f"{folder}: no cell is finished yet")
    order = [cell["name"] for cell in about["cells"]]
    groups = [_group([row for (name, _), row in latest.items() if name == cell]) for cell in order]
    return Source(folder, about["name"], about, tuple(group for group in groups if group is not None))


def _group(rows: Sequence[Result]) -> Group | None:
    if not rows:
        return None
    first = rows[0]
    return Group(first.cell, first.family, first.factors, tuple(sorted(rows, key=lambda row: row.seed)))


def _training(folder: Path) -> Source:
    config = run_config(folder)
    metrics, curves = run_rows(folder)
    row = Result(config.name, "trainings", {}, {}, config.seed, str(folder), "done", metrics, curves)
    about = {"name": config.name, "seeds": [config.seed], "config": to_yaml(config), "cells": [], "source": folder}
    return Source(folder, config.name, about, (Group(config.name, "trainings", {}, (row,)),))


def merge_trainings(sources: Sequence[Source]) -> list[Source]:
    """Trainings of one config but for the seed are one group."""
    ablations = [source for source in sources if source.about["cells"]]
    by_config: dict[str, list[Source]] = {}
    for source in sources:
        if source not in ablations:
            config = to_dict(run_config(source.folder)) | {"seed": 0, "name": ""}
            by_config.setdefault(json.dumps(config, sort_keys=True), []).append(source)
    merged = []
    for alike in by_config.values():
        rows = [row for source in alike for group in source.groups for row in group.rows]
        group = Group(alike[0].title, "trainings", {}, tuple(rows))
        merged.append(
            Source(alike[0].folder, alike[0].title, alike[0].about | {"seeds": [r.seed for r in rows]}, (group,))
        )
    return [*ablations, *merged]


def metrics_of(groups: Sequence[Group], chosen: Sequence[str] = (), most: int = 4) -> list[str]:
    """The metrics to show: those chosen, or the first of what a task's evaluation gives; final losses without one."""
    names = list(dict.fromkeys(name for group in groups for row in group.done for name in row.metrics))
    names = [name for name in names if name.partition("/")[0] != OPTIMUM]
    if chosen:
        for name in chosen:
            if name not in names:
                raise UserError(f"no cell has a metric {name!r}; there is {', '.join(names) or 'none'}")
        return list(chosen)
    evaluated = [name for name in names if not name.startswith("loss/")] or names
    whole = [name for name in evaluated if "/" not in name]
    return (whole or evaluated)[:most]


def optimum(groups: Sequence[Group], metric: str) -> float | None:
    """The best that a metric can be, the mean over all cells, where their task knows it."""
    values = [
        row.metrics[name]
        for group in groups
        for row in group.done
        for name in (f"{OPTIMUM}/{metric}", OPTIMUM)
        if name in row.metrics
    ]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def costs_of(groups: Sequence[Group], names: Mapping[str, str]) -> dict[str, str]:
    """Those of the costs (name -> label) that some cell has."""
    return {name: label for name, label in names.items() if any(group.cost(name).count for group in groups)}
