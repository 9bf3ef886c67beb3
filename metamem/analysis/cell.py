"""One cell of an ablation: a training, measured. It runs in a process of its own, on one thread.

- `train_cell`   trains the cell's config and measures it: what a cell is where the ablation names no function
- `run_cell`     either of the two, whatever comes of it, with its cost
"""

from __future__ import annotations

import math
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from metamem.analysis.cost import training_cost
from metamem.analysis.plan import Cell, resolve_function
from metamem.analysis.results import DiskFull, Result, is_full, result_of
from metamem.analysis.spectrum import lags_up_to, memory_inputs, memory_spectrum
from metamem.analysis.trace import trace_levels
from metamem.config import Config, UserError
from metamem.json_files import is_number, is_text, is_whole, read_rows
from metamem.network import Network
from metamem.registry import TASKS
from metamem.training import Diverged, build_task, train
from metamem.training.loop import batches
from metamem.training.run_folder import METRICS

MEASURED = ("metrics", "curves", "cost")
NOT_MEASURED, NORMS = ("kind", "step", "seconds", "tokens_per_second"), "gradient_norm/"
ROWS = 4  # sequences of a batch on which a spectrum is measured
LAST = 0.1  # share of a training whose losses are averaged to its final one


def run_cell(cell: Cell, function: str | None, folder: Path) -> Result:
    """Runs a cell; `folder` is where trainings leave their run folders. A divergence, a number that is not finite or
    an exception is a result too."""
    started = time.perf_counter()
    found: Mapping[str, Any] = {}
    status, step, message = "done", None, None
    try:
        if function is None:
            found = train_cell(cell.config, folder)
        else:
            found = _as_measured(resolve_function(function)(cell.config, cell.seed))
    except Diverged as error:
        status, step, message = "diverged", error.step, str(error)
    except MemoryError:
        raise  # as when the system ends the process: it may fit the next time
    except Exception as error:
        if is_full(error):
            raise DiskFull(f"{folder}: cannot be written: the disk is full") from error
        status, message = "failed", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    unfit = [name for name, value in found.get("metrics", {}).items() if not _is_finite(value)]
    if status == "done" and unfit:
        status, message = "diverged", f"{', '.join(unfit)}: not finite"
        step = cell.config.training.steps if function is None else None
    cost = {
        "seconds": time.perf_counter() - started,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
        **found.get("cost", {}),
    }
    return result_of(
        cell,
        status,
        metrics=dict(found.get("metrics", {})),
        curves=dict(found.get("curves", {})),
        cost=cost,
        more={key: value for key, value in found.items() if key not in MEASURED},
        step=step,
        message=message,
    )


_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def train_cell(config: Config, root: Path) -> dict[str, Any]:
    """Trains a config and measures it: the task's evaluation and the final losses (metrics); losses and what memories
    measured along training, and along a sequence each level's ‖Δ‖ and update, and gates (curves); cost."""
    shutil.rmtree(root / config.name, ignore_errors=True)  # what an earlier try left
    if config.training.evaluate_every is None and hasattr(TASKS.get(config.task["name"]), "evaluate"):
        config = replace(config, training=replace(config.training, evaluate_every=config.training.steps))
    task = build_task(config)
    trained = train(config, root, task=task)
    metrics, curves = run_rows(trained.folder)
    inputs, targets = next(batches(replace(config, seed=config.seed + 1), task))
    curves |= trace_levels(trained.model, inputs)
    curves |= spectra(trained.model, inputs)
    return {"metrics": metrics, "curves": curves, "cost": training_cost(trained, config, task, inputs, targets)}


def run_rows(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The metrics of a training's last evaluation and its final losses, and its curves, from its run folder."""
    rows = list(read_rows(folder / METRICS, "a row of a training", {"kind": is_text, "step": is_whole}))
    logged, evaluated = ([row for row in rows if row["kind"] == kind] for kind in ("train", "evaluation"))
    for row in (*logged, *evaluated):
        if not all(is_number(value) for key, value in row.items() if key != "kind"):
            raise UserError(f"{folder / METRICS}: a row of step {row['step']} has more than numbers in it")
    metrics = _numbers(evaluated[-1]) if evaluated else {}
    if logged:
        late = [row for row in logged if row["step"] > (1 - LAST) * logged[-1]["step"]]
        metrics |= {key: _mean(late, key) for key in logged[-1] if key.startswith("loss/")}
    return metrics, _curves(logged) | (_curves(evaluated) if len(evaluated) > 1 else {})


def spectra(model: Network, inputs: Shaped[Tensor, "batch time *dims"]) -> dict[str, dict[str, Any]]:
    """`spectrum/<memory>/<level>`, on what memories read of a batch; `period` is the level's."""
    curves = {}
    for path, (memory, x) in memory_inputs(model, inputs).items():
        lags = lags_up_to(x.shape[1] // 2)
        periods = {level.name: level.period for level in getattr(memory, "levels", ())}
        for level, values in memory_spectrum(memory, x[:ROWS], lags).items():
            period = periods.get(level, min(periods.values(), default=1))
            curve = {"x": lags, "y": values.tolist(), "period": period}
            curves[f"spectrum/{path}/{level}"] = curve
    return curves


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """The mean of what rows have under a key; None where one has no number there."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if len(values) == len(rows) else None


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of a run's metrics measured."""
    return {key: value for key, value in row.items() if key not in NOT_MEASURED and not key.startswith(NORMS)}


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """What rows measured, by step."""
    curves = {}
    for key in dict.fromkeys(key for row in rows for key in _numbers(row)):
        there = [row for row in rows if key in row]
        curves[key] = {"x": [row["step"] for row in there], "y": [row[key] for row in there]}
    return curves


def _as_measured(found: Any) -> Mapping[str, Any]:
    """What a function gave, as metrics, curves and cost; a flat mapping is one of metrics."""
    if not isinstance(found, Mapping):
        raise TypeError(f"a cell's function gives a mapping, not {type(found).__name__}")
    return found if "metrics" in found else {"metrics": found}


def _is_finite(value: Any) -> bool:
    return value is None or math.isfinite(float(value))
