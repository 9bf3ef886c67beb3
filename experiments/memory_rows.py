"""What the algorithmic studies compare: a row is a memory's preset, with an LSTM where it brings no controller.

A cell is a row on a task with a seed: the config that files in configs/ make, trained by the runner of ablations, which
keeps what is finished, so that a study that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from metamem.analysis.ablation import CELLS, AblationProgress, run_ablation
from metamem.analysis.plan import Cell, Plan
from metamem.analysis.results import Result
from metamem.config import Config, load_config, to_dict

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXPERIMENT = "experiment/algorithmic"
COMPILE = "network.modules.blocks.modules.memory.compile_step=true"
COMPILED_FROM = 5000  # updates of a training that make up for the wait for compiled graphs


@dataclass(frozen=True)
class Row:
    """A memory: its preset in configs/memory, if it needs a controller, what of it is changed, and if it compiles."""

    name: str
    preset: str
    controlled: bool = False
    overrides: tuple[str, ...] = ()
    compiles: bool = False


ROWS = {
    row.name: row
    for row in (
        Row("DNC", "dnc", controlled=True, overrides=("vars.memory.read_heads=1",), compiles=True),
        Row("NTM", "ntm", controlled=True, overrides=("vars.memory.read_heads=1",), compiles=True),
        Row("SAM", "sam", controlled=True, overrides=("vars.memory.read_heads=1",)),
        Row("SDNC", "sdnc", controlled=True, overrides=("vars.memory.read_heads=1",)),
        Row("MNM-g", "mnm_g"),
        Row("LSTM", "lstm", overrides=("vars.memory.hidden=256",)),
    )
}


def config_of(row: Row, network: str, task: str, overrides: Iterable[str], seed: int) -> Config:
    """The config of a row on a task."""
    parts = [f"memory/{row.preset}", EXPERIMENT, f"network/{network}", f"task/{task}"]
    if row.controlled:
        parts.insert(3, "network/controlled")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cell.yaml"
        path.write_text("extends: " + json.dumps([f"{CONFIGS}/{part}.yaml" for part in parts]))
        return load_config(path, [*row.overrides, *overrides, f"seed={seed}"])


def cell_of(row: Row, network: str, task: str, overrides: Sequence[str], seed: int) -> Cell:
    """The cell of a row on a task, named after both; its fingerprint is that of all that its config says, but for
    whether it is compiled, which changes the time alone."""
    config = config_of(row, network, task, overrides, seed)
    identity = json.dumps(to_dict(replace(config, name="")), sort_keys=True, default=str)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    if row.compiles and config.training.steps >= COMPILED_FROM:
        config = config_of(row, network, task, [*overrides, COMPILE], seed)
    slug = f"{task}-{row.preset}-seed{seed}-{fingerprint[:6]}"
    factors = {"memory": row.name, "task": task}
    return Cell(f"{row.name} on {task}", task, factors, {}, seed, replace(config, name=slug), fingerprint)


def run_folder(name: str, cell: Cell) -> Path:
    """Where `run_cells` keeps a cell's run."""
    return _kept(name) / CELLS / cell.slug


def _kept(name: str) -> Path:
    return Path("runs") / f"{name}_cells"


def run_cells(name: str, cells: Mapping[str, Sequence[Cell]], processes: int) -> dict[str, list[Result]]:
    """The results of each row's cells, those that are missing trained; kept in runs/<name>_cells. Seed by seed, so that
    a study that is stopped has every row."""
    order = sorted((cell for row in cells.values() for cell in row), key=lambda cell: cell.seed)
    plan = Plan(name, "", "", None, tuple(order), sorted({cell.seed for cell in order}))

    def told(progress: AblationProgress) -> None:
        last = progress.last
        if last is not None:
            print(
                f"{last.cell}, seed {last.seed}: {last.status} in {last.cost.get('seconds', 0.0) / 60:.1f} minutes",
                flush=True,
            )

    found = run_ablation(plan, _kept(name), processes, told)
    by = {(result.fingerprint, result.cell): result for result in found}
    return {row: [by[cell.fingerprint, cell.name] for cell in of_row] for row, of_row in cells.items()}
