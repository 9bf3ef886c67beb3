"""Trackers: where a run's metrics go beside its `metrics.jsonl`, which is always written.

    training: {trackers: [tensorboard]}
    training: {trackers: {wandb: {project: memories, mode: online}}}

A tracker is whatever has `log(step, numbers)` and `close()`, registered with the options that a config may give it.
What needs a package of its own says which `extra` brings it.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from metamem.config import RunConfig, to_dict
from metamem.config.convert import convert
from metamem.registry import TRACKERS


@runtime_checkable
class Tracker(Protocol):
    """Takes the numbers of a run's rows."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers that were measured after an outer step."""
        ...

    def close(self) -> None:
        """All that was logged is kept."""
        ...


@TRACKERS.register("tensorboard")
class TensorBoard:
    """Event files in the run's folder `tensorboard`, for `tensorboard --logdir runs`."""

    extra: ClassVar[str] = "tensorboard"

    def __init__(self, folder: Path, settings: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What came after the step that the run goes on from is shown no more.
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """A scalar each."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


@TRACKERS.register("wandb")
class WeightsAndBiases:
    """A run of Weights & Biases, kept in the run's folder `wandb` until `wandb sync` sends it, unless `mode` is online.
    A run that is gone on with is the same run there too."""

    extra: ClassVar[str] = "wandb"

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        step: int,
        project: str = "metamem",
        entity: str | None = None,
        mode: Literal["offline", "online"] = "offline",
    ) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        named = folder / "wandb" / "run-id"
        if not named.is_file():
            named.parent.mkdir(parents=True, exist_ok=True)
            named.write_text(uuid.uuid4().hex[:8])
        self._run: Any = wandb.init(
            project=project,
            entity=entity,
            mode=mode,
            dir=str(folder),
            id=named.read_text(),
            resume="allow",
            name=folder.name,
            config=settings,
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """A row."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def check_trackers(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The trackers that a config names, with their options. Raises ConfigError for one that does not exist, an option
    that it does not have, and one whose package is not installed."""
    named, where = config.training.trackers, config.training.where / "trackers"
    asked = named if isinstance(named, dict) else {name: {} for name in named}
    found = {}
    for name, options in asked.items():
        found[name] = TRACKERS.check(name, convert(options or {}, dict[str, Any], where / name), where / name)
        extra = getattr(TRACKERS.get(name), "extra", None)
        if extra is not None and importlib.util.find_spec(extra) is None:
            raise where.error(f"{name} is not installed: pip install 'metamem-torch[{extra}]'")
    return found


def open_trackers(config: RunConfig, folder: Path, step: int) -> list[Tracker]:
    """The trackers of a run, which goes on after a step."""
    where = config.training.where / "trackers"
    return [
        TRACKERS.build(name, options, where / name, folder=folder, settings=to_dict(config), step=step)
        for name, options in check_trackers(config).items()
    ]
