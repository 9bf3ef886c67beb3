"""Text as bytes: the vocabulary is 256, and every UTF-8 text in any language is in it.

- `load_text`       a UTF-8 file, or all files of a folder, as one tensor of bytes
- `split_text`      the first part to train on, then validation, then test
- `sample_windows`  random windows, as inputs and next-byte targets
- `respell`         gives every window a spelling of its own
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from metamem.config.errors import UserError

VOCABULARY = 256


class TaskError(UserError):
    """A task that cannot be had as asked for; the message is one line that says what to do."""


def to_bytes(text: str | bytes) -> UInt8[Tensor, "bytes"]:
    """The UTF-8 bytes of a text."""
    data = bytearray(text.encode() if isinstance(text, str) else text)
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def load_text(path: str | Path) -> UInt8[Tensor, "bytes"]:
    """The bytes of a UTF-8 file, or of all files below a folder, joined by newlines.

    A folder's files come in the order of their paths, hidden ones left out. Raises `TaskError` on a missing path,
    an unreadable file, bytes that are no UTF-8 (naming the file and the offset), and a text that is empty.
    """
    path = Path(path)
    parts = [_read(file) for file in _files(path)]
    text = b"\n".join(part for part in parts if part)
    if not text.strip():
        raise TaskError(f"{path}: there is no text in it; give a UTF-8 file, or a folder of them")
    return to_bytes(text)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        visible = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
        return sorted(file for file in visible if file.is_file())
    if path.is_file():
        return [path]
    problem = "is neither a file nor a folder" if path.exists() else "no such file or folder"
    raise TaskError(f"{path}: {problem}; give a UTF-8 file, or a folder of them")


def _read(file: Path) -> bytes:
    try:
        data = file.read_bytes()
        data.decode()
    except OSError as error:
        raise TaskError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{file}: not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x}); convert the file to UTF-8"
        ) from None
    return data


def split_text(text: UInt8[Tensor, "bytes"], validation: float = 0.05, test: float = 0.05) -> tuple[Tensor, ...]:
    """(train, validation, test), in the text's own order and cut between characters.

    Held out is the end, not random windows: neighbouring windows of one text say nearly the same.
    Raises `TaskError` if a part would be empty.
    """
    ends = [_character_start(text, round(len(text) * share)) for share in (1 - validation - test, 1 - test)]
    parts = text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]
    if not all(len(part) for part in parts):
        raise TaskError(f"a text of {len(text)} bytes is too short to hold out parts of it; give a longer one")
    return parts


def _character_start(text: Tensor, position: int) -> int:
    # Bytes 10xxxxxx continue a character.
    while position < len(text) and text[position] & 0b1100_0000 == 0b1000_0000:
        position += 1
    return position


def sample_windows(
    text: UInt8[Tensor, "bytes"],
    generator: torch.Generator,
    batch: int,
    length: int,
    respell_probability: float = 0.0,
    respell_letters: int = 0,
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """Random windows of the text: `inputs` and, one byte on, their `targets`. See `respell` for its two options.

    Raises `TaskError` if the text is shorter than `length + 1` bytes.
    """
    if len(text) < length + 1:
        raise TaskError(
            f"windows of {length} bytes and the next one need a text of {length + 1} bytes; this one has {len(text)}: "
            f"give a longer text or a smaller training.length"
        )
    starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
    windows = text[starts + torch.arange(length + 1)]
    if respell_probability > 0:
        windows = respell(windows, generator, respell_probability, respell_letters)
    windows = windows.long()
    return windows[:, :-1], windows[:, 1:]


def respell(
    windows: UInt8[Tensor, "batch time"], generator: torch.Generator, probability: float, letters: int
) -> UInt8[Tensor, "batch time"]:
    """With `probability`, a row swaps `letters` random letters of the alphabet around, everywhere in that row.

    The letters trade places in a random cycle, so that each becomes another one: a bijection on bytes, the same for
    capitals, the identity elsewhere. No two rows share a spelling, so a model can lower its loss on such rows only by
    picking the spelling up as it reads: meta-training on them teaches a memory to.
    """
    batch = len(windows)
    cycle = torch.rand(batch, 26, generator=generator).argsort(-1)[:, :letters]
    chosen = torch.rand(batch, 1, generator=generator) < probability
    target = torch.where(chosen, cycle.roll(-1, dims=-1), cycle)
    spelling = torch.arange(VOCABULARY).repeat(batch, 1)
    for first in (ord("a"), ord("A")):
        spelling.scatter_(1, cycle + first, target + first)
    return spelling.gather(1, windows.long()).to(torch.uint8)
