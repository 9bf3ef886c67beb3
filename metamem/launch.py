"""How this process was started: by itself, or by torchrun as one of several."""

from __future__ import annotations

import os
import time

from metamem.config.errors import UserError

GRACE = 60.0  # seconds in which one process that failed ends, and torchrun, which looks ten times a second, the others


class PeerLost(UserError):
    """Another process of a training ended in the midst of the work."""


def launched() -> int:
    """How many processes were started together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def first() -> bool:
    """Whether this process is the first of them, which writes files and speaks."""
    return int(os.environ.get("RANK", 0)) == 0


def refuse_many(command: str) -> None:
    """Raises UserError where several processes were started for a command that is one process's."""
    if launched() > 1:
        raise UserError(f"torchrun started {launched()} processes, and `metamem {command}` is one: start it by itself")


def wait_to_be_ended(error: UserError) -> None:
    """Before an error is told that another process may be telling: all meet it, and the first tells it; or one ended of
    another, and the rest lost it. torchrun ends who waits."""
    if launched() > 1 and (isinstance(error, PeerLost) or not first()):
        time.sleep(GRACE)
