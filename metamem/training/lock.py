"""The lock of a run's folder: one process at a time writes it.

The lock is the kernel's (flock), which lets go of it however its holder ends, also by `kill -9`; the file `lock` says
who holds it, for the error that anybody else gets.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metamem.config import UserError
from metamem.launch import first

LOCK = "lock"


class RunHeld(UserError):
    """A run's folder that another process is writing."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds a folder for this process, or, where several train together, for all: the first has the lock.

    Raises RunHeld, with the process that has it, where there is one.
    """
    if not first():
        yield
        return
    path = folder / LOCK
    descriptor = _locked(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{path.parent}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass  # its holder ended, and took it away, between the two calls
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another"
            os.close(descriptor)
            message = f"{path.parent}: process {holder} is writing this run; wait until it ends, or end it"
            raise RunHeld(message) from None
        except OSError as error:  # a file system that knows no locks
            os.close(descriptor)
            raise UserError(f"{path}: cannot be locked: {error.strerror}") from None
        os.close(descriptor)
