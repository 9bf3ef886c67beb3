"""Documents that are followed to the letter: what a reader would write, type and run, block by block.

A block with a title is a file, one of Python without a title is run after those before it, one of sh has commands.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from typer.testing import CliRunner

import metamem.cli as cli

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    title: str
    text: str


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document, in its order."""
    return [Block(*found) for found in BLOCK.findall(document.read_text())]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block of sh, as words, without comments."""
    for line in text.splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@contextlib.contextmanager
def reader_at(folder: Path) -> Iterator[None]:
    """Within it one is in a folder that has the shipped configs, and whose modules Python finds."""
    (folder / "configs").symlink_to(ROOT / "configs")
    before, paths, modules, threads = os.getcwd(), list(sys.path), set(sys.modules), torch.get_num_threads()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = paths
        torch.set_num_threads(threads)
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
                del sys.modules[name]


def follow(document: Path, folder: Path, running: bool = True) -> str:
    """What a reader sees who does all that a document says, in an empty folder; without `running`, no command is run.
    A command or a block that fails is the reader's failure."""
    seen, names = io.StringIO(), dict[str, Any](__name__="__main__")
    with reader_at(folder):
        for number, block in enumerate(blocks(document)):
            if block.title:
                Path(block.title).write_text(block.text)
            elif block.language == "python":
                with contextlib.redirect_stdout(seen):
                    exec(compile(block.text, f"{document.name}, block {number}", "exec"), names)
            elif block.language == "sh" and running:
                for words in commands(block.text):
                    seen.write(run(words))
    return seen.getvalue()


def run(words: list[str]) -> str:
    """What a `metamem` command prints; others are not for a test to run."""
    if words[0] != "metamem":
        return ""
    result = CliRunner().invoke(cli.app, words[1:], env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == 0, f"{shlex.join(words)}: {result.output}"
    return result.output
