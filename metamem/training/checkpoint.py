"""Checkpoints: a model's weights as safetensors, with the step and the fingerprint of the config that made them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import nn

from metamem.config import Config, UserError, to_dict
from metamem.state import StateError, check_like, load_state, save_state


class CheckpointError(UserError):
    """A checkpoint that cannot be used: missing, truncated, or of another config."""


def fingerprint(config: Config) -> str:
    """What a checkpoint must agree on with the config that it is loaded under: the network."""
    return hashlib.sha256(json.dumps(to_dict(config.network), sort_keys=True).encode()).hexdigest()[:16]


def save_checkpoint(model: nn.Module, config: Config, step: int, path: Path) -> None:
    """Writes the weights, whole or not at all."""
    save_state(dict(model.state_dict()), path, {"step": str(step), "network": fingerprint(config)})


def load_checkpoint(model: nn.Module, config: Config, path: Path) -> int:
    """Loads the weights into the model and gives their step. Raises CheckpointError, the model untouched."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; its run ended before the first one: train again")
    try:
        weights, metadata = load_state(path)
        check_like(weights, dict(model.state_dict()), str(path))
    except StateError as error:
        raise CheckpointError(str(error).replace("state file", "checkpoint")) from None
    if metadata.get("network") != fingerprint(config):
        raise CheckpointError(f"{path}: the checkpoint was made under another config; its run folder has the right one")
    model.load_state_dict(weights)
    return int(metadata["step"])
