"""A full disk, damaged checkpoints, rates that diverge, damaged data: one line says what it is, nothing good is lost.

Each function tries a fault `count` times and gives how often it was tried, and how often it was survived.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from experiments.kills import equal, same_run
from experiments.small_runs import TEXT, write_inputs
from metamem import UserError, load_config, load_run, train
from metamem.training import CheckpointError, Diverged, Progress, resume
from metamem.training.checkpoint import load_resumable, resumable
from metamem.training.run_folder import CHECKPOINT

RATES = ("hierarchy.levels.task.optimizer.lr", "hierarchy.levels.slow.optimizer.lr")


def full_disk(count: int, folder: Path, seed: int) -> tuple[int, int]:
    """From a random step on no file can grow past a random size: the last checkpoint stays, and is gone on from."""
    random, config = Random(seed), load_config(write_inputs(folder))
    whole, survived = train(config, folder / "whole").folder, 0
    largest = max(path.stat().st_size for path in whole.rglob("*.safetensors"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in range(count):
        at, room, root = (
            random.randint(2, config.training.steps - 1),
            random.randrange(largest),
            folder / f"run-{number}",
        )

        def fill(seen: Progress, at: int = at, room: int = room) -> None:
            if seen.step == at:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))

        try:
            message = _refusal(lambda root=root, fill=fill: train(config, root, progress=fill))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (run,) = root.iterdir()
        stays = f"the checkpoint of step {max(resumable(run))} stays in {run}"
        told = "cannot be written" in message and stays in message
        resume(run)
        survived += told and same_run(run, whole, python=False)
    return count, survived


def damaged_checkpoints(count: int, folder: Path, seed: int) -> tuple[int, int]:
    """A bit flipped, or the end cut off: told with the checkpoint before it, which can be gone on from."""
    random, config = Random(seed), load_config(write_inputs(folder))
    run, survived = train(config, folder / "whole").folder, 0
    *_, before, last = resumable(run)
    path, right = resumable(run)[last], load_resumable(run)
    data = path.read_bytes()
    assert right is not None
    for number in range(count):
        place = random.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]
        path.write_bytes(data[:place] if number % 3 == 0 else flipped)
        try:
            found = load_resumable(run)
            survived += found is not None and equal(found.state, right.state)  # the bit was in the header's padding
        except CheckpointError as error:
            survived += f"--step {before}" in str(error) and "\n" not in str(error)
    return count, survived


def diverging(count: int, folder: Path, seed: int) -> tuple[int, int]:
    """Rates that no weight stands: told with level and group, the last checkpoint finite and gone on from."""
    random, config, survived = Random(seed), write_inputs(folder), 0
    for number in range(count):
        at = random.choice(RATES)
        wild = [f"{at}=1.0e{random.randint(35, 37)}", "training.gradient_clip=null", "training.warmup=0"]
        root = folder / f"run-{number}"
        try:
            train(load_config(config, wild), root)
            continue
        except Diverged as error:
            message = str(error)
        (run,) = root.iterdir()
        told = "of level" in message and "(group" in message and "\n" not in message
        finite = not (run / CHECKPOINT).exists() or all(p.isfinite().all() for p in load_run(run)[0].parameters())
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # its weights are finite, and too large for any rate
        survived += told and bool(finite) and resume(run, [f"{at}=0.001"]).step == 20
    return count, survived


def damaged_data(count: int, folder: Path, seed: int) -> tuple[int, int]:
    """The text of a run gone, empty, too short, or no text: told before anything of the run is touched."""
    random, config = Random(seed), load_config(write_inputs(folder))
    run, survived, text = train(config, folder / "whole").folder, 0, folder / TEXT
    data, before = text.read_bytes(), _files(run)
    for _ in range(count):
        damage = random.choice((b"", data[: random.randrange(17)], None, b"\xff" + data, bytes(range(256))))
        text.unlink()
        if damage is not None:
            text.write_bytes(damage)
        message = _refusal(lambda: resume(run, ["training.steps=30"]))
        survived += TEXT in message and "\n" not in message and _files(run) == before
        text.write_bytes(data)
    return count, survived


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _refusal(act: Callable[[], object]) -> str:
    """The one line that an act is refused with."""
    try:
        act()
    except UserError as error:
        return str(error)
    return "it was not refused"
