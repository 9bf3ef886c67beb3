"""What a person sees while it works: a bar over training steps or over cells, a table along a stream."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import UInt8
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from metamem.adaptation import Session
from metamem.analysis.ablation import AblationProgress
from metamem.episodes.training import EpisodesProgress
from metamem.training import Progress as Step
from metamem.training.loop import interruptible

ROWS = 16  # of a stream's table


@contextmanager
def training_bar() -> Iterator[Callable[[Step], None]]:
    """A progress bar over outer steps on stderr: bits per token of the first level, tokens per second."""
    columns = (
        TextColumn("meta-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bits]} bits/token, {task.fields[rate]} tokens/s,"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("train", total=None, bits="-", rate="-")
    with ExitStack() as shown:

        def show(step: Step) -> None:
            if not bar.live.is_started:  # not before: an error before the first step is one line, without a bar
                shown.enter_context(bar)
            bits = next(iter(step.losses.values())) / math.log(2)
            rate = f"{step.tokens_per_second:,.0f}"
            bar.update(task, total=step.steps, completed=step.step, bits=f"{bits:.3f}", rate=rate)

        yield show


@contextmanager
def ablation_bar() -> Iterator[Callable[[AblationProgress], None]]:
    """A progress bar over the cells of an ablation on stderr: done, left, diverged, failed, time to go."""
    columns = (
        TextColumn("cells"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]} left{task.fields[trouble]},"),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("to go"),
    )
    # The speed is that of all cells so far: some take much longer than others.
    bar = Progress(*columns, console=Console(stderr=True), speed_estimate_period=float("inf"))
    task = bar.add_task("cells", total=None, left="-", trouble="")
    with bar:

        def show(now: AblationProgress) -> None:
            trouble = "".join(
                f", {count} {what}" for what, count in (("diverged", now.diverged), ("failed", now.failed)) if count
            )
            bar.update(task, total=now.cells, completed=now.done, left=now.cells - now.done, trouble=trouble)

        yield show


@contextmanager
def episodes_bar() -> Iterator[Callable[[EpisodesProgress], None]]:
    """A progress bar over outer steps on stderr, with the outer loss of the first level."""
    columns = (TextColumn("meta-training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]},"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    task = bar.add_task("train", total=None, loss="-")
    with ExitStack() as shown:

        def show(step: EpisodesProgress) -> None:
            if not bar.live.is_started:  # not before: an error before the first step is one line, without a bar
                shown.enter_context(bar)
            loss = f"{next(iter(step.losses.values())):.4f}"
            bar.update(task, total=step.steps, completed=step.step, loss=loss)

        yield show


def stream_table(session: Session, stream: UInt8[Tensor, "bytes"], title: str) -> bool:
    """Feeds a stream to a session, a table growing as it goes; True where Ctrl-C stopped it (the session is whole)."""
    table = Table(title=title, caption_justify="left")
    for heading in ("bytes", "bits/byte", "so far", "updates", "bytes/s"):
        table.add_column(heading, justify="right")
    piece = session.loop.piece or 512
    every = max(piece, math.ceil(len(stream) / ROWS / piece) * piece)
    losses, updates, started, stopped = [], 0, time.perf_counter(), False
    console = Console() if sys.stdout.isatty() else Console(width=100)
    with Live(table, console=console, refresh_per_second=4), interruptible() as pressed:
        for start in range(0, len(stream), piece):
            observed = session.observe(stream[None, start : start + piece].long())
            losses.append(observed.losses)
            updates += observed.updates
            read = min(start + piece, len(stream))
            stopped = bool(pressed) and read < len(stream)
            if read % every == 0 or read == len(stream) or stopped:
                here = torch.cat(losses, 1)[0] / math.log(2)
                rate = f"{read / (time.perf_counter() - started):,.0f}"
                last = here[-every:].mean()
                table.add_row(f"{read:,}", f"{last:.3f}", f"{here.mean():.3f}", str(updates), rate)
            if stopped:
                table.caption = f"stopped after {session.position:,} bytes"
                break
    if not console.is_terminal:  # there, the table has ended its line
        console.print()
    console.print(f"state: {session.state_bytes:,} bytes")
    return stopped
