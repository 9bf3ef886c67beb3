"""What a person sees while it works: a bar over training steps, over cells, over episodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from metamem.analysis.ablation import AblationProgress
from metamem.episodes.training import EpisodesProgress
from metamem.training import Progress as Step


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
