"""Checkpoints of two kinds, both safetensors with a checksum, whole or not at all.

runs/x/checkpoint.safetensors             weights, which everything but a training reads
runs/x/checkpoints/step-200.safetensors   all that going on exactly needs: weights, optimizers, what levels have
                                          gathered, random states; its JSON has the config and the versions
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from metamem.config import RunConfig, UserError
from metamem.state import State, StateError, check_like, load_state, save_state

FOLDER, NAME = "checkpoints", re.compile(r"step-(\d+)\.safetensors")
FORMAT = "1"


class CheckpointError(UserError):
    """A checkpoint that cannot be used: missing, damaged, or of another config."""


def fingerprint(config: RunConfig) -> str:
    """What a checkpoint must agree on with the config that it is loaded under: what has weights."""
    return hashlib.sha256(json.dumps(config.shape, sort_keys=True).encode()).hexdigest()[:16]


def save_checkpoint(model: nn.Module, config: RunConfig, step: int, path: Path) -> None:
    """Writes the weights of a model, whole or not at all."""
    save_weights(dict(model.state_dict()), config, step, path)


def save_weights(weights: State, config: RunConfig, step: int, path: Path) -> None:
    """Writes weights, whole or not at all."""
    save_state(weights, path, {"step": str(step), "fingerprint": fingerprint(config)})


def load_checkpoint(model: nn.Module, config: RunConfig, path: Path) -> int:
    """Loads the weights into the model and gives their step. Raises CheckpointError, the model untouched."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; its run ended before the first one: train again")
    weights, metadata = _read(path)
    check_weights_of(model, config, weights, metadata.get("fingerprint"), path)
    model.load_state_dict(weights)
    return int(metadata["step"])


def check_weights_of(model: nn.Module, config: RunConfig, weights: State, made_for: str | None, path: Path) -> None:
    """Raises CheckpointError where weights that were read from `path` are not those of such a model."""
    try:
        check_like(weights, dict(model.state_dict()), str(path))
    except StateError as error:
        raise CheckpointError(str(error)) from None
    if made_for != fingerprint(config):
        raise CheckpointError(f"{path}: the checkpoint was made under another config; its run folder has the right one")


@dataclass(frozen=True)
class Resumable:
    """A checkpoint that a training goes on from: its tensors, and its JSON."""

    path: Path
    step: int
    state: State
    about: dict[str, Any]


def save_resumable(state: State, about: dict[str, Any], step: int, folder: Path) -> None:
    """Writes the checkpoint of a step into a run's folder, whole or not at all."""
    metadata = {"format": FORMAT, "step": str(step), "about": json.dumps(about)}
    save_state(state, folder / FOLDER / f"step-{step}.safetensors", metadata)


def resumable(folder: Path) -> dict[int, Path]:
    """The checkpoints that a run's folder holds, step -> file, oldest first."""
    found = {int(match[1]): path for path in (folder / FOLDER).glob("*") if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def load_resumable(folder: Path, step: int | None = None) -> Resumable | None:
    """The checkpoint of a step, or the last one; None where there is none yet.

    Raises CheckpointError for one that is damaged or foreign, and says which other can be gone on from.
    """
    there = resumable(folder)
    if step is None:
        step = max(there, default=None)
    if step is None:
        return None
    if step not in there:
        have = f"those of steps {', '.join(map(str, there))}" if there else "none"
        raise CheckpointError(f"{folder}: there is no checkpoint of step {step}; it has {have}")
    try:
        return _resumable(there[step], step)
    except CheckpointError as error:
        sound = next((other for other in sorted(there, reverse=True) if other != step and _sound(there, other)), None)
        advice = "no other can be gone on from" if sound is None else f"go on from the one before with --step {sound}"
        raise CheckpointError(f"{error}; {advice}") from None


def _resumable(path: Path, step: int) -> Resumable:
    state, metadata = _read(path)
    if metadata.get("format") != FORMAT or metadata.get("step") != str(step):
        raise CheckpointError(f"{path}: not a checkpoint that a training can go on from")
    return Resumable(path, step, state, json.loads(metadata["about"]))


def _sound(there: dict[int, Path], step: int) -> bool:
    try:
        _resumable(there[step], step)
    except CheckpointError:
        return False
    return True


def _read(path: Path) -> tuple[State, dict[str, str]]:
    try:
        return load_state(path)
    except StateError as error:
        raise CheckpointError(str(error).replace("state file", "checkpoint")) from None
