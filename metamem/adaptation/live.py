"""What a person sees of a session on a stream: a table that grows, one row of JSON a piece, and how Ctrl-C ends it.

bits/byte    the surprise, since the row before
so far       the same since the start
gain         over the frozen model, in bits per byte, so far: where it ran beside, or everywhere with `compare`
refused      updates that guards refused, so far
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Float, Int
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import Tensor

from metamem.adaptation.session import Observed, Session
from metamem.training.loop import interruptible

ROWS = 16
HEADINGS = ("bytes", "bits/byte", "so far", "gain", "updates", "refused", "bytes/s")
WIDTH = 11
Tokens = Callable[..., Int[Tensor, "1 tokens"]]


@dataclass
class Tally:
    """Sums along a stream, of nats and bytes."""

    bytes: int = 0
    tokens: int = 0
    nats: float = 0.0
    gained: float = 0.0
    compared: float = 0.0  # bytes where the frozen model ran
    updates: int = 0
    refused: int = 0
    since: tuple[int, float] = (0, 0.0)
    started: float = field(default_factory=time.perf_counter)

    def add(self, count: int, observed: Observed, frozen: Float[Tensor, "1 tokens"]) -> None:
        """What was observed of so many bytes; `frozen`: the frozen model's losses, nan where they are not known."""
        losses, known = observed.losses[0].double(), ~frozen[0].isnan()
        self.bytes, self.tokens = self.bytes + count, self.tokens + losses.numel()
        self.nats += float(losses.sum())
        self.gained += float((frozen[0].double() - losses)[known].sum())
        if losses.numel():
            self.compared += count * float(known.double().mean())
        self.updates, self.refused = self.updates + observed.updates, self.refused + len(observed.refused)

    def row(self, keep: bool = True) -> list[str]:
        """A row of the table; where it is to `keep`, the next one's own figures begin here."""
        bits = math.log(2)
        here, nats = self.bytes - self.since[0], self.nats - self.since[1]
        if keep:
            self.since = self.bytes, self.nats
        gain = f"{self.gained / self.compared / bits:+.3f}" if self.compared else "–"
        own = f"{nats / max(1, here) / bits:.3f}"
        so_far = f"{self.nats / max(1, self.bytes) / bits:.3f}"
        rate = f"{self.bytes / (time.perf_counter() - self.started):,.0f}"
        return [f"{self.bytes:,}", own, so_far, gain, str(self.updates), str(self.refused), rate]


class Show(Protocol):
    """Where rows go."""

    def row(self, cells: list[str]) -> None:
        """One more row."""

    def now(self, cells: list[str]) -> None:
        """How it stands between two rows."""


class Lines:
    """Rows as lines, for a pipe."""

    def __init__(self, title: str) -> None:
        print(title, flush=True)
        self.row(list(HEADINGS))

    def row(self, cells: list[str]) -> None:
        """A line."""
        print(" ".join(f"{cell:>{WIDTH}}" for cell in cells), flush=True)

    def now(self, cells: list[str]) -> None:
        """Nothing: a line cannot be taken back."""


class LiveTable:
    """A table in a terminal: the last rows, and how it stands now."""

    def __init__(self, title: str, live: Live) -> None:
        self.title, self.live = title, live
        self.rows: deque[list[str]] = deque(maxlen=ROWS)

    def row(self, cells: list[str]) -> None:
        """A row that stays until others push it out."""
        self.rows.append(cells)
        self.live.update(self._table([]))

    def now(self, cells: list[str]) -> None:
        """A last row that the next one replaces."""
        self.live.update(self._table([cells]))

    def _table(self, last: list[list[str]]) -> Table:
        table = Table(title=self.title)
        for heading in HEADINGS:
            table.add_column(heading, justify="right")
        for cells in [*self.rows, *last]:
            table.add_row(*cells)
        return table


def watch(
    session: Session,
    source: Iterable[bytes],
    tokens: Tokens,
    title: str,
    total: int | None = None,
    jsonl: Path | None = None,
    beside: Session | None = None,
) -> bool:
    """Feeds bytes to a session as they come, and shows what it makes of them; `beside`: a frozen one that reads the
    same. True where Ctrl-C stopped it before the end: the session is whole."""
    console, tally = Console(), Tally()
    every = math.ceil(total / ROWS) if total else 1
    due = every
    live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
    with live or nullcontext(), interruptible() as pressed, ExitStack() as files:
        rows = files.enter_context(jsonl.open("a", buffering=1)) if jsonl else None
        show: Show = Lines(title) if live is None else LiveTable(title, live)

        def observe(data: bytes, last: bool = False) -> None:
            read = tokens(data, last)
            if last and not read.numel():
                return
            observed = session.observe(read)
            frozen = observed.frozen if beside is None else beside.observe(read).losses
            tally.add(len(data), observed, frozen)
            if rows is not None and len(data):
                rows.write(json.dumps(_json(tally, session, observed, frozen, len(data))) + "\n")

        for data in source:
            if data:
                observe(data)
            if pressed:
                break
            if tally.bytes >= due:
                show.row(tally.row())
                if total is None and tally.bytes >= ROWS * every:
                    every *= 2  # of what never ends, rows come ever more rarely
                due = (tally.bytes // every + 1) * every
            else:
                show.now(tally.row(keep=False))
        stopped = bool(pressed) and tally.bytes != total
        observe(b"", last=True)
        if tally.bytes > tally.since[0]:
            show.row(tally.row())
    if stopped:
        print(f"stopped after {tally.bytes:,} bytes")
    return stopped


def _json(tally: Tally, session: Session, observed: Observed, frozen: Tensor, count: int) -> dict[str, Any]:
    """A row of JSON: the piece that was just read, and the sums so far."""
    bits = count * math.log(2)
    known = bool(frozen.numel()) and not bool(frozen.isnan().any())
    return {
        "position": session.position,
        "bytes": tally.bytes,
        "bits_per_byte": float(observed.losses.sum()) / bits,
        "frozen_bits_per_byte": float(frozen.sum()) / bits if known else None,
        "updates": tally.updates,
        "refused": [refusal.reason for refusal in observed.refused],
        "resting": session.resting,
        "bytes_per_second": round(tally.bytes / (time.perf_counter() - tally.started), 1),
    }
