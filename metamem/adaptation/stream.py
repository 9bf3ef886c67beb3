"""Bytes as they arrive: of a file, of all files of a folder, of standard input.

A pipe may be slow, may cut a character in two, may never end. `arriving` yields a whole piece as soon as it is there,
and what there is when nothing more came for a while; where nothing came at all it yields nothing, b"", so that whoever
reads can look at something else. With a tokenizer, text goes on to it up to the last space: a word is not cut.
"""

from __future__ import annotations

import codecs
import os
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from metamem.tasks.text import load_text

STANDARD_INPUT = Path("-")
PATIENCE = 0.2  # seconds without a byte, after which what is there is read
BLOCK = 65_536
LONGEST_WORD = 4_096  # bytes: what has no space is cut there


@runtime_checkable
class Readable(Protocol):
    """A stream of bytes; `fileno` fails where it is no file of the system."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes, b"" at the end."""
        ...

    def fileno(self) -> int:
        """Its number."""
        ...


class Source:
    """Pieces of bytes, `total` where it is known before."""

    def __init__(self, path: Path, piece: int) -> None:
        self.piece = piece
        self.text = None if path == STANDARD_INPUT else bytes(load_text(path).numpy())
        self.total = None if self.text is None else len(self.text)

    def __iter__(self) -> Iterator[bytes]:
        if self.text is None:
            yield from arriving(sys.stdin.buffer, self.piece)
        else:
            yield from (self.text[at : at + self.piece] for at in range(0, len(self.text), self.piece))


def arriving(file: Readable, piece: int, patience: float = PATIENCE) -> Iterator[bytes]:
    """Whole pieces of a pipe; what is left of one when nothing came for `patience` seconds, or nothing, b""."""
    held, read = b"", _reader(file, patience)
    while True:
        came = read()
        if came == b"":  # the end
            break
        held += came or b""
        while len(held) >= piece:
            yield held[:piece]
            held = held[piece:]
        if came is None:
            yield held
            held = b""
    if held:
        yield held


def _reader(file: Readable, patience: float) -> Callable[[], bytes | None]:
    """Reads what there is, waiting at most `patience`; None where nothing came, b"" at the end."""
    try:
        number = file.fileno()
    except (OSError, AttributeError, ValueError):  # no file of the system: it never keeps one waiting
        return lambda: file.read(BLOCK)
    return lambda: os.read(number, BLOCK) if select.select([number], [], [], patience)[0] else None


class Bytes:
    """Tokens that are bytes."""

    def __call__(self, data: bytes, last: bool = False) -> Int[Tensor, "1 tokens"]:
        """The tokens of the bytes that came."""
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()[None] if data else torch.zeros(1, 0).long()


class Words:
    """Tokens of a tokenizer, of text that comes in pieces: up to the last space, the rest waits for more."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.held = tokenizer, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, data: bytes, last: bool = False) -> Int[Tensor, "1 tokens"]:
        """The tokens of the text that came, or, at the end, of what is left of it too."""
        self.held += self.decoder.decode(data, last)
        space = max(self.held.rfind(" "), self.held.rfind("\n"))
        cut = len(self.held) if last or len(self.held) > LONGEST_WORD else max(0, space)  # the space begins a word
        text, self.held = self.held[:cut], self.held[cut:]
        found = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return torch.tensor(found, dtype=torch.long)[None]
