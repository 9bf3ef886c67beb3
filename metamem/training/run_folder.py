"""Run folders: `runs/<name>/` holds the resolved config, the metrics and the checkpoint of one run.

A folder appears only when a run begins, and no run writes into another's: a second run of one name is `<name>-2`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metamem.config import Config, RunConfig, UserError, load_config, to_yaml

CONFIG, METRICS, CHECKPOINT = "config.yaml", "metrics.jsonl", "checkpoint.safetensors"


def create_run(config: RunConfig, root: Path = Path("runs")) -> Path:
    """A new folder for a run of this config, with the resolved config in it."""
    folder = new_folder(root, config.name)
    (folder / CONFIG).write_text(to_yaml(config))
    return folder


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


def run_config(folder: Path) -> Config:
    """The config of a run. Raises UserError where the folder is none of a run."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no run folder (it has no {CONFIG}); give one that `metamem train` made")
    return load_config(folder / CONFIG)


class Metrics:
    """Rows of a run, one JSON object a line, on disk as soon as they are there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", buffering=1)

    def log(self, **row: Any) -> None:
        """Writes one row."""
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
