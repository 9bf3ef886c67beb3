"""Globs over dotted parameter names.

`*` stands for one segment or a part of one (`blocks.*.memory`, `blocks.0.mem*`), `**` for any number of segments, none
included (`blocks.**.weight` also matches `blocks.weight`).
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable


@functools.lru_cache(maxsize=1024)
def _compile(pattern: str) -> re.Pattern[str]:
    # Every segment brings the dot before it, so that `**` can stand for no segment at all; names get a dot in front.
    text = ""
    for segment in pattern.split("."):
        if segment == "**":
            text += r"(?:\.[^.]+)*"
        else:
            text += r"\." + "[^.]*".join(re.escape(part) for part in segment.split("*"))
    return re.compile(text)


def matches(pattern: str, name: str) -> bool:
    """Whether the glob `pattern` matches the whole of `name`."""
    return _compile(pattern).fullmatch("." + name) is not None


def match_names(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that at least one of the patterns matches, in their own order."""
    patterns = list(patterns)
    return [name for name in names if any(matches(pattern, name) for pattern in patterns)]


def nearest_names(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names that look most like a pattern that matches none: what its author may have meant."""
    names, segments = list(names), pattern.split(".")
    # The longest head of the pattern that leads anywhere narrows the choice to the part of the model that was meant.
    for end in range(len(segments) - 1, 0, -1):
        if below := match_names([".".join([*segments[:end], "**"])], names):
            names = below
            break
    literal = ".".join(segment for segment in segments if segment != "**")
    return difflib.get_close_matches(literal, names, n=count, cutoff=0.0)
