"""The report of ablations and trainings: one HTML page, and a PNG and a CSV of each of its figures.

write_report([Path("runs/periods")])      # runs/periods/report/report.html, figures/quality-period.png, .csv, …
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import metamem
from metamem.analysis import figures, page, search_figure, timescales
from metamem.analysis.figures import Figure
from metamem.analysis.groups import Group, Source, merge_trainings, metrics_of, optimum, read_source
from metamem.analysis.plan import value_text
from metamem.analysis.style import png, svg
from metamem.config import UserError
from metamem.config.ablation import SEARCH

REPORT, FIGURES = "report.html", "figures"


def write_report(runs: Sequence[Path], folder: Path | None = None, metrics: Sequence[str] = ()) -> Path:
    """The page, in `folder` (by default `report` in the first of the runs), about `metrics` (by default, what the
    task's evaluation gives). Raises UserError for what is no ablation and no run, and for a metric that none has."""
    sources = merge_trainings([read_source(run) for run in runs])
    groups = [group for source in sources for group in source.groups]
    chosen = metrics_of(groups, metrics)
    folder = runs[0] / "report" if folder is None else folder
    goals = {
        source.about["search"][goal]: goal
        for source in sources
        for goal in ("minimise", "maximise")
        if (source.about.get("search") or {}).get(goal)
    }
    drawn = list(draw(groups, chosen, goals))
    try:
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        (folder / REPORT).write_text(_page(sources, groups, chosen, drawn), encoding="utf-8")
        for figure in drawn:
            (folder / FIGURES / f"{figure.name}.png").write_bytes(png(figure.drawing, figure.title))
            (folder / FIGURES / f"{figure.name}.csv").write_text(to_csv(figure.table), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written: {error.strerror}") from None
    return folder / REPORT


def draw(groups: Sequence[Group], metrics: Sequence[str], goals: dict[str, str] | None = None) -> Iterator[Figure]:
    """All figures for which there is something to draw; `goals`: metric -> what a search did with it."""
    yield from _some(search_figure.search(groups, goals or {}))
    if metrics:
        planned = [group for group in groups if group.family != SEARCH]  # a grid has lines, a search's points none
        for factor in figures.numeric_factors(planned):
            yield figures.quality(planned, metrics, factor)
        yield from _some(figures.attribution(groups, metrics), figures.overview(groups, metrics))
        yield from _some(figures.cost(groups, metrics[0]))
    yield from _some(timescales.spectra(groups), timescales.level_norms(groups), timescales.gates(groups))
    yield from _some(figures.learning(groups))


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV, under all of their keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _some(*found: Figure | None) -> Iterator[Figure]:
    return (figure for figure in found if figure is not None)


def _page(sources: Sequence[Source], groups: Sequence[Group], metrics: Sequence[str], drawn: Sequence[Figure]) -> str:
    rows = [row for group in groups for row in group.rows]
    count = {status: sum(row.status == status for row in rows) for status in ("done", "diverged", "failed")}
    about = f"{len(rows)} rows of {len(groups)} cells: " + ", ".join(f"{n} {what}" for what, n in count.items() if n)
    sections = [("what", "What was run", "".join(map(_about, sources)))]
    sections.append(("results", "Results", _results(groups, metrics)))
    if bad := _not_done(groups):
        sections.append(("not-done", "Cells that diverged or failed", bad))
    numbered = enumerate(drawn, start=1)
    files = [f"{FIGURES}/{{}}.png", f"{FIGURES}/{{}}.csv"]
    for number, one in numbered:
        names = [name.format(one.name) for name in files]
        html = page.figure(number, one.title, one.caption, svg(one.drawing, one.name), names)
        sections.append((one.name, one.title, html))
    title = " · ".join(dict.fromkeys(source.title for source in sources))
    made = f"metamem {metamem.__version__}, {time.strftime('%Y-%m-%d %H:%M')}"
    return page.page(title, about, sections, made)


def _about(source: Source) -> str:
    about = source.about
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    pairs = [
        ("folder", str(source.folder)),
        ("command", about.get("command", "")),
        ("config", str(about["source"]) + (f", over {about['base']}" if about.get("base") else "")),
        ("measured by", about.get("function") or ""),
        ("search", _searched(about.get("search"))),
        ("seeds", ", ".join(map(str, about["seeds"]))),
        ("cells", str(len(about["cells"])) if about["cells"] else ""),
        ("started", about.get("started", "")),
        ("versions", versions),
    ]
    cells = "\n".join(
        f"{cell['name']}: " + ", ".join(f"{key}={value_text(value)}" for key, value in cell["overrides"].items())
        for cell in about["cells"]
    )
    config = page.folded("The config of the first cell, resolved", about["config"])
    return (
        f"<h3>{escape(source.title)}</h3>"
        + page.terms(pairs)
        + config
        + (page.folded("What each cell sets", cells) if cells else "")
    )


def _searched(search: dict[str, Any] | None) -> str:
    if search is None:
        return ""
    goal = "minimise" if search["minimise"] else "maximise"
    return f"{search['sampler']}, {search['trials']} points, to {goal} {search[goal]}"


def _results(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    """Mean ± 95 % interval of each metric, and what a cell costs."""
    costs = figures.costs_of(
        groups, {"seconds": "seconds", "flops_per_token": "FLOP a token", "state_bytes": "state, bytes"}
    )
    lives = dict(pair for group in groups for pair in group.levels("spectrum/").items())
    rows = []
    for group in groups:
        numbers = [group.metric(metric) for metric in metrics]
        paid = [group.cost(name) for name in costs]
        half = [timescales.level_half_life(group, level).half_life for level in lives]
        cells = [*(str(n) if n.count else "–" for n in numbers), *(f"{p.mean:,.4g}" if p.count else "–" for p in paid)]
        rows.append(
            [
                group.name,
                f"{len(group.done)} of {len(group.rows)}",
                *cells,
                *(f"{h:.3g}" if h == h else "–" for h in half),
            ]
        )
    headings = ["cell", "seeds", *metrics, *costs.values(), *(f"half-life, {label}" for label in lives.values())]
    best = [(metric, optimum(groups, metric)) for metric in metrics]
    note = ", ".join(f"{metric} {value:.4g}" for metric, value in best if value is not None)
    text = "Mean ± 95 % interval over seeds (Student's t); half-lives in tokens, fitted to the memory spectrum."
    return f"<p>{text}{f' Bayes optimum: {note}.' if note else ''}</p>" + page.table(headings, rows)


def _not_done(groups: Sequence[Group]) -> str:
    rows = [
        [row.cell, str(row.seed), row.status, "–" if row.step is None else str(row.step), row.message or ""]
        for group in groups
        for row in group.rows
        if row.status != "done"
    ]
    return page.table(["cell", "seed", "", "at step", "why"], rows) if rows else ""
