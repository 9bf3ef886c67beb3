"""Results of an ablation: one JSON line a cell, on disk whole as soon as the cell is finished.

A line that a kill cut off is dropped when the file is opened again. Where the disk is full, a reserve that was taken at
the beginning is given up for the line: nothing finished is lost.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from metamem.analysis.plan import Cell
from metamem.config import UserError
from metamem.config.plain import is_mapping
from metamem.json_files import Check, are_numbers, is_text, is_whole, or_null, read_rows

RESULTS, RESERVE = "rows.jsonl", "reserve"
BEGINNING = b'{"cell"'  # of a line
RESERVED = 1 << 20  # bytes; rows of a few hundred cells
FULL = (errno.ENOSPC, errno.EDQUOT)


Status = Literal["done", "diverged", "failed"]


class DiskFull(UserError):
    """There is no space for another row."""


@dataclass(frozen=True)
class Result:
    """One cell's row.

    - `status`   `done`; `diverged` at outer step `step`; `failed`, with the reason in `message`
    - `metrics`  name -> number: the task's evaluation at the end, and what else was measured
    - `curves`   name -> {"x": numbers, "y": numbers}, along training or along a sequence
    - `cost`     seconds, flops, state bytes, peak resident bytes, as far as measured
    - `more`     what a cell function gave beside these
    """

    cell: str
    family: str
    factors: dict[str, Any]
    overrides: dict[str, Any]
    seed: int
    fingerprint: str
    status: Status
    metrics: dict[str, float | None] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    message: str | None = None
    attempts: int = 1


def result_of(cell: Cell, status: Status, **measured: Any) -> Result:
    """The row of a cell, with what was measured."""
    named = (cell.name, cell.family, cell.factors, cell.overrides, cell.seed, cell.fingerprint)
    return Result(*named, status, **measured)


def read_results(folder: Path) -> list[Result]:
    """The rows of an ablation's folder. A last line that is not whole is no row. Raises UserError for a line that is
    something else."""
    path = folder / RESULTS
    if not path.exists():
        return []
    rows = read_rows(path, "a row of an ablation", ROW)
    return [Result(**{key: value for key, value in row.items() if key in FIELDS}) for row in rows]


def _are_curves(value: Any) -> bool:
    return is_mapping(value) and all(
        is_mapping(curve)
        and all(isinstance(curve.get(axis), list) for axis in ("x", "y"))
        and len(curve["x"]) == len(curve["y"])
        for curve in value.values()
    )


FIELDS = tuple(item.name for item in fields(Result))
ROW: dict[str, Check] = {
    **dict.fromkeys(("cell", "family", "fingerprint"), is_text),
    **dict.fromkeys(("factors", "overrides", "more"), is_mapping),
    **dict.fromkeys(("metrics", "cost"), are_numbers),
    **dict.fromkeys(("seed", "attempts"), is_whole),
    "status": lambda value: value in ("done", "diverged", "failed"),
    "curves": _are_curves,
    "step": or_null(is_whole),
    "message": or_null(is_text),
}


class ResultsFile:
    """Appends rows, whole or not at all, for one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.path, self.reserve = folder / RESULTS, folder / RESERVE
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise UserError(f"{folder}: another process is running this ablation") from None
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if not text[whole:].startswith(BEGINNING[: len(text) - whole]):
            self.close()
            raise UserError(f"{self.path}: not the rows of an ablation: its last line is none")
        os.ftruncate(self._descriptor, whole)
        try:
            self.reserve.write_bytes(os.urandom(RESERVED))  # no file system stores it in less
        except OSError as error:
            self.close()
            raise _full(folder, error) from None

    def append(self, result: Result) -> None:
        """One row more, on disk when this returns. Raises DiskFull where not even the reserve has space for it."""
        line = (json.dumps(_finite(asdict(result)), allow_nan=False) + "\n").encode()
        try:
            self._write(line)
        except OSError as error:
            if not is_full(error) or not self.reserve.exists():
                raise _full(self.path.parent, error) from None
            self.reserve.unlink()
            try:
                self._write(line)
            except OSError as again:
                raise _full(self.path.parent, again) from None

    @property
    def full(self) -> bool:
        """Whether the reserve has been given up: the disk is full."""
        return not self.reserve.exists()

    def close(self) -> None:
        """Closes the file and gives the reserve back."""
        self.reserve.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _write(self, line: bytes) -> None:
        before = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise


def is_full(error: Exception) -> bool:
    """Whether an error says that the disk is full; safetensors says it in words only."""
    return getattr(error, "errno", None) in FULL or os.strerror(errno.ENOSPC) in str(error)


def _full(folder: Path, error: OSError) -> DiskFull:
    return DiskFull(f"{folder}: cannot be written: {error.strerror}")


def _finite(value: Any) -> Any:
    """Plain values; what JSON has no number for is null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value
