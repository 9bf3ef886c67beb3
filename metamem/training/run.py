"""The folder of a training while it runs: its rows of metrics, its checkpoints, and what to say when it ends badly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from metamem.state import State, StateError
from metamem.training.checkpoint import resumable, save_resumable, save_weights
from metamem.training.divergence import Diverged, check_weights
from metamem.training.random_states import undisturbed
from metamem.training.run_folder import CHECKPOINT, METRICS, Metrics, NoMetrics, WriteError
from metamem.training.snapshot import Training
from metamem.training.tracking import open_trackers


class Run:
    """A training's folder, which this process holds; of several processes the first does, and writes."""

    def __init__(self, folder: Path, training: Training) -> None:
        self.folder, self.training = folder, training
        self.saved = max(resumable(folder), default=0)
        self.metrics = Metrics(folder / METRICS) if training.world.first else NoMetrics()
        self.trackers = []
        if training.world.first:
            with undisturbed():
                self.trackers = open_trackers(training.config, folder, training.reached.step)

    def log(self, kind: str, **row: Any) -> None:
        """A row of metrics at the step that the training has reached; its numbers go to the trackers too."""
        step = self.training.reached.step
        self.metrics.log(kind=kind, step=step, **row)
        prefix = "" if kind == "train" else f"{kind}/"
        numbers = {prefix + name: value for name, value in row.items() if isinstance(value, int | float)}
        with undisturbed() if self.trackers else nullcontext():
            for tracker in self.trackers if numbers else ():
                tracker.log(step, numbers)

    def log_step(self, losses: Mapping[str, float], norms: Mapping[str, float], **row: Any) -> None:
        """The row of an outer step: the loss and the gradient's norm of each level, and more."""
        named = {f"loss/{name}": loss for name, loss in losses.items()}
        named |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        self.log("train", seconds=round(self.training.reached.seconds, 3), **row, **named)

    @undisturbed()
    def save(self) -> None:
        """A checkpoint of the step that the training has reached; then those that need not be kept any more go.

        Raises Diverged where a weight is not finite: the checkpoints before are better to go on from.
        """
        training, reached = self.training, self.training.reached
        check_weights(training.outer, training.config.hierarchy, reached.step)
        self.metrics.sync()
        state = training.state()
        if training.world.first:
            self._write(state)
        self.saved = reached.step

    def _write(self, state: State) -> None:
        training, reached = self.training, self.training.reached
        save_resumable(state, training.about(), reached.step, self.folder)
        if reached.best in (0, reached.step):
            save_weights(state["model"], training.config, reached.step, self.folder / CHECKPOINT)
        there = resumable(self.folder)
        for step in sorted(there)[: -training.config.training.keep_last]:
            if step != reached.best:
                there[step].unlink()

    @property
    def kept(self) -> str:
        """What stays where the training ends before its end."""
        if not self.saved:
            return "no checkpoint was made yet"
        return f"the checkpoint of step {self.saved} stays in {self.folder}"


@contextmanager
def writing(folder: Path, training: Training) -> Iterator[Run]:
    """The run in a folder that this process holds; what ends it badly is told with what stays of it."""
    run = Run(folder, training)
    with ExitStack() as ending:
        for part in (run.metrics, *run.trackers):
            ending.callback(part.close)
        try:
            yield run
        except Diverged as error:
            message = f"step {error.step}: {error}; {run.kept}; lower the level's lr, or gradient_clip"
            raise Diverged(message, error.step) from None
        except (StateError, WriteError) as error:
            raise WriteError(f"{error}; {run.kept}") from error
