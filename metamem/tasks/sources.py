"""Sources of text that differ: a language's centuries, a programming language, any file; each with a part held out.

web, kjv, gb, tyn, wyc   a translation of one text (`metamem.tasks.english`); held out are the books John, Jonah, Acts
python                   the modules of Python's standard library, read where it is installed; every tenth held out
a path                   a UTF-8 file, its last tenth held out; or a folder of them, every tenth file
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from jaxtyping import UInt8
from torch import Tensor

from metamem.config.errors import suggest
from metamem.tasks.english import TRANSLATIONS, load_translation
from metamem.tasks.text import TaskError, load_text, split_text, to_bytes

HELD_OUT = ("John", "Jonah", "Acts")  # as far as a translation has them
TENTH = 10


class Source(NamedTuple):
    """A text, in the part to learn from and the part to be evaluated on."""

    train: UInt8[Tensor, "bytes"]
    held_out: UInt8[Tensor, "bytes"]


@lru_cache
def load_source(name: str) -> Source:
    """The source of a name, or of a path. Raises `TaskError` for what is neither."""
    if name in TRANSLATIONS:
        books = load_translation(name)
        return _parted([(title in HELD_OUT, text) for title, text in books.items()])
    if name == "python":
        return _numbered(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    path = Path(name)
    if not path.exists():
        raise TaskError(f"there is no source {name!r}{suggest(name, [*TRANSLATIONS, 'python'])}, nor a file or folder")
    if path.is_dir():
        return _numbered(sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")))
    train, validation, test = split_text(load_text(path))
    return Source(train, to_bytes(bytes(validation.tolist()) + bytes(test.tolist())))


def _numbered(files: Sequence[Path]) -> Source:
    if len(files) < 2:
        raise TaskError(f"{len(files)} files hold nothing out; give a folder of several, or one file")
    texts = [bytes(load_text(file).tolist()).decode() + "\n" for file in files if file.stat().st_size]
    return _parted([(number % TENTH == 0, text) for number, text in enumerate(texts)])


def _parted(texts: Sequence[tuple[bool, str]]) -> Source:
    parts = ["".join(text for held_out, text in texts if held_out is which) for which in (False, True)]
    return Source(*(to_bytes(part) for part in parts))
