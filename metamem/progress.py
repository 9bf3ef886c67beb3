"""What a person sees while it works: a bar over training steps, over cells, over episodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from metamem.analysis.ablation import AblationProgress
from metamem.episodes.training import EpisodesProgress
from metamem.training import Progress as Step


@contextmanager
def training_bar() -> Iterator[Callable[[Step], None]]:
    """A progress bar over outer steps on stderr: bits per token of the first level, tokens per second."""
    text = "{task.fields[bits]} bits/token, {task.fields[rate]} tokens/s,"
    with _steps_bar(text, bits="-", rate="-") as update:

        def show(step: Step) -> None:
            bits = next(iter(step.losses.values())) / math.log(2)
            update(total=step.steps, completed=step.step, bits=f"{bits:.3f}", rate=f"{step.tokens_per_second:,.0f}")

        yield show


@contextmanager
def episodes_bar() -> Iterator[Callable[[EpisodesProgress], None]]:
    """A progress bar over outer steps on stderr, with the outer loss of the first level."""
    with _steps_bar("loss {task.fields[loss]},", loss="-") as update:

        def show(step: EpisodesProgress) -> None:
            update(total=step.steps, completed=step.step, loss=f"{next(iter(step.losses.values())):.4f}")

        yield show


@contextmanager
def _steps_bar(text: str, **fields: Any) -> Iterator[Callable[..., None]]:
    """A bar that is there from its first update on: an error before the first step is one line, without a bar."""
    columns = (TextColumn("meta-training"), BarColumn(), MofNCompleteColumn(), TextColumn(text), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("train", total=None, **fields)
    with ExitStack() as shown:

        def update(**now: Any) -> None:
            if not bar.live.is_started:
                shown.enter_context(bar)
            bar.update(task, **now)

        yield update


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
