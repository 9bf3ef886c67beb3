"""The timing of a hierarchy: when each level fires and where the outer gradient is cut, over a stretch at each scale.

tokens     of a sequence, for the levels inside the forward pass
steps      of the outer loop, for those on the clock `step`
training   all of its outer steps, for those on epochs and tasks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from metamem.config import Config, LevelConfig
from metamem.hierarchy.calendar import Calendar

SHORTEST = {"token": 16, "outer step": 8}  # stretches: too few ticks show no rhythm
WIDEST = 64  # characters of a line of text


@dataclass(frozen=True)
class Stretch:
    """`length` units of time, and after which of them (from 1) each of its levels fires; `cuts`: after which the outer
    gradient does not flow on."""

    title: str
    unit: str
    length: int
    fires: Mapping[str, Sequence[int]]
    cuts: Mapping[str, Sequence[int]]


def timing(config: Config, calendar: Calendar) -> list[Stretch]:
    """The stretches of a config's training that show all of its levels, fast scales first."""
    levels = config.hierarchy.levels
    fast = [level for level in levels if not level.outer]
    steps = [level for level in levels if level.clock == "step"]
    slow = [level for level in levels if level.outer and level.clock != "step"]
    return [
        *([_tokens(config, fast)] if fast else []),
        *([_steps(calendar, steps)] if steps else []),
        *([_training(calendar, slow)] if slow else []),
    ]


def _tokens(config: Config, levels: Sequence[LevelConfig]) -> Stretch:
    settings = config.training
    slowest = max([level.period * max(1, level.unroll or 1) for level in levels] + [settings.unroll or 1])
    length = min(settings.length, max(SHORTEST["token"], 2 * slowest))
    fires, cuts = {}, {}
    for level in levels:
        whole = range(level.period, length + 1, level.period)
        # No update ends a sequence: nothing in it would see one.
        fires[level.name] = [end for end in whole if level.clock == "token" or end < settings.length]
        own = fires[level.name][level.unroll - 1 :: level.unroll] if level.unroll else []
        every = range(settings.unroll, length + 1, settings.unroll) if settings.unroll else []
        cuts[level.name] = sorted({*own, *every} - {settings.length})
    title = "one sequence" if length == settings.length else f"the first {length} tokens of a sequence"
    return Stretch(title, "token", length, fires, cuts)


def _steps(calendar: Calendar, levels: Sequence[LevelConfig]) -> Stretch:
    length = min(calendar.steps, max(SHORTEST["outer step"], 2 * max(level.period for level in levels)))
    fires = {level.name: [step for step in range(1, length + 1) if calendar.fires(level, step)] for level in levels}
    title = "all outer steps" if length == calendar.steps else f"the first {length} outer steps"
    return Stretch(title, "outer step", length, fires, {})


def _training(calendar: Calendar, levels: Sequence[LevelConfig]) -> Stretch:
    fires = {level.name: calendar.firings(level) for level in levels}
    return Stretch("the whole training", "outer step", calendar.steps, fires, {})


def timing_text(stretches: Sequence[Stretch]) -> str:
    """The stretches as lines of text: `|` where a level fires, `x` where it fires and the gradient is cut."""
    names = max(len(name) for stretch in stretches for name in stretch.fires)
    lines = []
    for stretch in stretches:
        width = min(stretch.length, WIDEST)
        bounds = [stretch.length * column // width for column in range(width + 1)]
        share = "" if width == stretch.length else f", {stretch.length / width:.3g} {stretch.unit}s a column"
        cut = ", x and the outer gradient is cut" if any(stretch.cuts.values()) else ""
        lines.append(f"{stretch.title} (| fires{cut}{share})")
        for name, fires in stretch.fires.items():
            cuts = stretch.cuts.get(name, [])
            spans = list(pairwise(bounds))
            marks = ["x" if _within(cuts, *span) else "|" if _within(fires, *span) else "·" for span in spans]
            lines.append(f"  {name:<{names}}  {''.join(marks)}")
    return "\n".join(lines)


def _within(points: Sequence[int], after: int, upto: int) -> bool:
    return any(after < point <= upto for point in points)
