"""Schedule: where a call's tokens are cut so that every chunk and every period ends at the end of a segment.

Rows of a batch may stand at different positions (a row was reset mid-stream). A segment then ends where any row's
chunk or period does, and its event says for which rows. Equal segments in a row make a run, computed together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

Rows = tuple[bool, ...]  # which rows of the batch; () for all of them


@dataclass(frozen=True)
class Segment:
    """Tokens `start … start + length`: `refresh`, rows that begin a chunk at its first token; `fire`, rows whose
    level ends its period at its last."""

    start: int
    length: int
    refresh: Rows | None
    fire: Mapping[str, Rows]


@dataclass(frozen=True)
class Run:
    """Consecutive segments of equal length."""

    start: int
    length: int
    segments: tuple[Segment, ...]

    @property
    def stop(self) -> int:
        """The token after the last."""
        return self.start + self.length * len(self.segments)


def schedule(positions: Sequence[int], time: int, chunk: int, periods: Mapping[str, int]) -> list[Run]:
    """The runs of a call of `time` tokens.

    - `positions`  tokens read so far, per row; one entry stands for all rows
    - `chunk`      tokens that share the weights at which signals are computed
    - `periods`    level -> period, for levels of a period above 1
    """
    clocks = [chunk, *periods.values()]
    segments, start = [], 0
    while start < time:
        here = [position + start for position in positions]
        length = min(time - start, *(clock - position % clock for clock in clocks for position in here))
        there = [position + length for position in here]
        ends = {name: _rows(there, period) for name, period in periods.items()}
        fire = {name: rows for name, rows in ends.items() if rows is not None}
        segments.append(Segment(start, length, _rows(here, chunk), fire))
        start += length
    runs: list[list[Segment]] = []
    for segment in segments:
        if not runs or runs[-1][0].length != segment.length:
            runs.append([])
        runs[-1].append(segment)
    return [Run(run[0].start, run[0].length, tuple(run)) for run in runs]


def known_positions(position: Int[Tensor, "batch"], clocks: Sequence[int]) -> list[int]:
    """Each row's position, one entry where all agree. A compiled graph has no host values: there a state must stand at
    a boundary of all clocks, which is asserted at run time."""
    if torch.compiler.is_compiling():
        for clock in clocks:
            torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
                (position % clock == 0).all(), f"compiled memory: the state must stand at a multiple of {clock}"
            )
        return [0]
    positions = position.tolist()
    return positions[:1] if len(set(positions)) == 1 else positions


def _rows(positions: Sequence[int], clock: int) -> Rows | None:
    """The rows that stand at a multiple of the clock: () for all, None for none."""
    rows = tuple(position % clock == 0 for position in positions)
    if all(rows):
        return ()
    return rows if any(rows) else None
