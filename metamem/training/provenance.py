"""What a checkpoint was made with: versions, the data, and where metamem runs from a checkout, its commit."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any, cast

import optree
import torch
from torch import Tensor

import metamem

CHECKOUT = Path(__file__).resolve().parents[2]


def made_with(processes: int = 1) -> dict[str, str]:
    """What decides the last bits of a training beside its config: code, libraries, threads, processes."""
    code = f"{metamem.__version__}{commit()}"
    versions = {"metamem": code, "torch": str(torch.__version__), "python": platform.python_version()}
    return versions | {"threads": str(torch.get_num_threads()), "processes": str(processes)}


def data_digest(task: Any) -> str:
    """A digest of all tensors that a task holds, such as the bytes of its texts: what it reads, not what it makes."""
    digest, held = hashlib.blake2b(digest_size=8), cast(Any, getattr(task, "__dict__", {}))
    for leaf in optree.tree_leaves(held):
        if isinstance(leaf, Tensor):
            digest.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@functools.cache
def commit() -> str:
    """`+<commit>`, with `-dirty` where files have changed since; empty for an installed package, or without git."""
    if not (CHECKOUT / ".git").exists():
        return ""
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"+{found.stdout.strip()}" if found.returncode == 0 else ""
