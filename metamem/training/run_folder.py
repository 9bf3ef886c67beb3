"""Run folders: `runs/<name>/` holds the resolved config, the metrics and the checkpoints of one run.

A folder appears only when a run begins, and no run writes into another's: a second run of one name is `<name>-2`.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from metamem.atomic import replacing
from metamem.config import Config, RunConfig, UserError, load_config, to_yaml

CONFIG, METRICS, CHECKPOINT = "config.yaml", "metrics.jsonl", "checkpoint.safetensors"


class WriteError(UserError):
    """A run's folder that cannot be written: a full disk."""


def create_run(config: RunConfig, root: Path = Path("runs")) -> Path:
    """A new folder for a run of this config, with the resolved config in it."""
    folder = new_folder(root, config.name)
    try:
        write_config(config, folder)
    except WriteError:
        folder.rmdir()
        raise
    return folder


def write_config(config: RunConfig, folder: Path) -> None:
    """The resolved config of a run, in place of what its folder had."""
    try:
        with replacing(folder / CONFIG) as path:
            path.write_text(to_yaml(config))
    except OSError as error:
        raise WriteError(f"{folder / CONFIG}: cannot be written: {error.strerror}") from error


def new_folder(root: Path, name: str) -> Path:
    """`root/name`, or the first of `name-2`, `name-3`, … that is not there: nothing is overwritten."""
    number = 1
    while True:
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.exists():  # a link that leads nowhere stands in the way
                raise UserError(f"{root}: cannot be made a folder; something else has its name") from None
            number += 1
        except OSError as error:
            raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
        else:
            return folder


def check_run_folder(folder: Path) -> None:
    """Raises UserError where the folder is none of a run."""
    if not (folder / CONFIG).is_file():
        hint = runs_within(folder) or "; give one that `metamem train` made"
        raise UserError(f"{folder}: no run folder (it has no {CONFIG}){hint}")


def runs_within(folder: Path) -> str:
    """`; in it are a/b, a/c`: the runs in a folder that is none itself, such as a study's; empty without any."""
    inside = [str(path.parent) for path in sorted(folder.glob(f"*/{CONFIG}"))]
    return f"; in it are {', '.join(inside[:3])}{', …' * (len(inside) > 3)}" if inside else ""


def run_config(folder: Path) -> Config:
    """The config of a run. Raises UserError where the folder is none of a run."""
    check_run_folder(folder)
    return load_config(folder / CONFIG)


class Metrics:
    """Rows of a run, one JSON object a line, there for every reader as soon as they are logged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    def log(self, **row: Any) -> None:
        """Writes one row, whole or not at all."""
        line = (json.dumps(row) + "\n").encode()
        before = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), before)
            raise WriteError(f"{self.path}: cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """All rows so far are on disk when it returns."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class NoMetrics(Metrics):
    """Those of a process that writes none."""

    def __init__(self) -> None:
        pass

    def log(self, **row: Any) -> None:
        """Writes nothing."""

    def sync(self) -> None:
        """Has nothing to write."""

    def close(self) -> None:
        """Has nothing to close."""


def cut_metrics(path: Path, step: int) -> None:
    """Drops the rows that came after a step, which a run that goes on from there makes again, and one that a kill cut
    off."""
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], start=1):
        if not line.endswith(b"\n") and line.startswith(b"{"):
            break
        try:
            row = json.loads(line)
            after = row["step"] > step or (row["step"] == step and row["kind"] == "resume")
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: not a row of metrics; take the line out") from None
        if not after:
            kept.append(line)
    with replacing(path) as partial:
        partial.write_bytes(b"".join(kept))
