"""What may happen to a file: bytes lost, changed or put in, another file in its place, or something that is no file.

- `BYTES`    name -> what it makes of a file's bytes, at random
- `PLACES`   name -> what it does with the file
- `WHOLE`    those that a checksum sees
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save

from experiments.config_mutations import TREE_MUTATIONS


def _flip(data: bytes, random: Random) -> bytes:
    flipped = bytearray(data)
    for _ in range(random.choice([1, 1, 8])):
        flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
    return bytes(flipped)


def _put_in(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.choice([1, 8, 300])) + data[at:]


def _taken_out(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + data[at + random.choice([1, 8, 300]) :]


def _foreign(data: bytes, random: Random) -> bytes:
    """A file of its own kind, and of something else."""
    tensors = {"a": torch.zeros(random.choice([0, 1, 3])), "b/c": torch.ones(2, dtype=torch.long)}
    names = json.dumps(random.choice([["a", "b/c"], ["a", "a/b"], [1], "a", {}, None]))
    told = {"keys": names, "step": "x", "checksum": "0", "position": "-1"}
    others = [save(tensors), save(tensors, told), b"{}", b"[]", b"null\n", b"3", b"\xff\xfe", b"a: 1\n", b'{"a": 1}\n']
    return random.choice([*others, b"[" * 100_000 + b"\n", b"9" * 6000 + b"\n", len(data).to_bytes(8, "little") * 9])


def _values(data: bytes, random: Random) -> bytes:
    """JSON with another value at a random place."""
    lines = data.splitlines(keepends=True) or [b""]
    at = random.randrange(len(lines))
    try:
        whole = json.loads(data)
        lines, at = [data], 0
    except ValueError:
        try:
            whole = json.loads(lines[at])
        except ValueError:
            return _flip(data, random)
    name = random.choice(list(TREE_MUTATIONS))
    return b"".join([*lines[:at], json.dumps(TREE_MUTATIONS[name](whole, random)).encode() + b"\n", *lines[at + 1 :]])


BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    "empty": lambda data, random: b"",
    "cut off": lambda data, random: data[: random.randrange(len(data))],
    "bits flipped": _flip,
    "bytes put in": _put_in,
    "bytes taken out": _taken_out,
    "noise": lambda data, random: random.randbytes(random.choice([1, 100, len(data)])),
    "foreign": _foreign,
    "other values": _values,
}


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


PLACES: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "a folder": _folder,
    "a link to itself": _link_to_itself,
    "not readable": lambda path: path.chmod(0),  # root reads it all the same
}
DAMAGES = (*BYTES, *PLACES)
WHOLE = ("empty", "cut off", "bits flipped", "bytes put in", "bytes taken out", "noise")  # what a checksum sees


def put_right(path: Path, right: bytes) -> None:
    """The right bytes, whatever is in their place."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    path.write_bytes(right)
