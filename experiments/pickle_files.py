"""Files that run code where something unpickles them; and Python's own audit of what is unpickled."""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

MARK = "marked"  # the folder that a file makes where it is run


class _Payload:
    """Unpickled, it leaves the mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


def pickles() -> dict[str, bytes]:
    """Files that leave the mark where something unpickles them, or runs their YAML or JSON."""
    archive = io.BytesIO()
    torch.save({"weights": _Payload()}, archive)
    legacy = io.BytesIO()
    torch.save(_Payload(), legacy, _use_new_zipfile_serialization=False)
    arrays = io.BytesIO()
    np.savez(arrays, a=np.array([_Payload()], dtype=object))
    array = io.BytesIO()
    np.save(array, np.array([_Payload()], dtype=object), allow_pickle=True)
    found = {f"pickle, protocol {number}": pickle.dumps(_Payload(), number) for number in (0, 2, 5)}
    yaml = f"seed: !!python/object/apply:os.mkdir [{MARK}]\n"
    code = '{"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": ["marked"]}]}\n'
    return found | {
        "torch.save": archive.getvalue(),
        "torch.save, legacy": legacy.getvalue(),
        "numpy.savez": arrays.getvalue(),
        "numpy.save": array.getvalue(),
        "YAML tag": yaml.encode(),
        "YAML tag in a sequence": f"- !!python/object/new:os.mkdir [{MARK}]\n".encode(),
        "jsonpickle": code.encode(),
    }


_unpickled: list[str] = []
_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "pickle.find_class":
        _unpickled.append(".".join(map(str, arguments)))


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What is unpickled within, as Python's own audit sees it."""
    global _watching
    _unpickled.clear()
    _watching = True
    try:
        yield _unpickled
    finally:
        _watching = False
