"""Errors of the user's own making, each of them one line that says where, what, and what would be right.

`Where` is a place in a config: a key path together with the file and line that it was read from. Every config node
carries one (`level.where`), and `/` goes one key down, so that code far from the loader can still point at the line:

    raise config.network.where.at("modules", "embed", "dim").error("must be divisible by heads")
    # ConfigError: configs/x.yaml:7: network.modules.embed.dim: must be divisible by heads
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

Key = str | int
Path = tuple[Key, ...]
LISTED = 12  # a longer list of choices is cut: the error stays a line that a terminal shows whole


class UserError(ValueError):
    """Something that the user can put right; its text is one line, and the command line exits with 2 on it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ConfigError(UserError):
    """A config that cannot be used: `FILE:LINE: key.path: problem; did you mean 'x'? (accepted values)`."""


class Sources:
    """Where each key path of a loaded config was written, and what its list items are called."""

    def __init__(self, places: Mapping[Path, str] | None = None, labels: Mapping[Path, str] | None = None) -> None:
        self.places = dict(places or {})
        self.labels = dict(labels or {})

    def copy(self, source: Path, target: Path) -> None:
        """What is below `source` stands at `target` too, and was written where it was."""
        for known in (self.places, self.labels):
            below = {path[len(source) :]: text for path, text in known.items() if path[: len(source)] == source}
            known.update({(*target, *path): text for path, text in below.items() if path})


class Where:
    """A key path of a config, and the file and line that it came from (those of the nearest parent that has one)."""

    __slots__ = ("path", "sources")

    def __init__(self, sources: Sources | None = None, path: Path = ()) -> None:
        self.sources = sources if sources is not None else Sources()
        self.path = path

    @classmethod
    def of(cls, where: Where | str) -> Where:
        """A `Where` from a plain description, for callers that have no config file."""
        return where if isinstance(where, Where) else cls(Sources({(): where}))

    def __truediv__(self, key: Key) -> Where:
        return Where(self.sources, (*self.path, key))

    def at(self, *keys: Key) -> Where:
        """The place some keys further down."""
        return Where(self.sources, self.path + keys)

    @property
    def place(self) -> str:
        """`FILE:LINE`, `command line`, or an empty string for a config that was built in Python."""
        for end in range(len(self.path), -1, -1):
            if self.path[:end] in self.sources.places:
                return self.sources.places[self.path[:end]]
        return ""

    @property
    def key(self) -> str:
        """The dotted key path, list items with index and name: `hierarchy.levels[1] (stream).clock`."""
        text = ""
        for end, part in enumerate(self.path, start=1):
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
            label = self.sources.labels.get(self.path[:end])
            text += f" ({label})" if label else ""
        return text

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, self.key) if part)

    def __repr__(self) -> str:
        return f"Where({str(self)!r})"

    def error(self, problem: str) -> ConfigError:
        """The error that says `problem` of this place."""
        prefix = str(self)
        return ConfigError(f"{prefix}: {problem}" if prefix else problem)

    def unknown(self, problem: str, value: object, choices: Iterable[str]) -> ConfigError:
        """The error that says `problem`, the choice nearest to `value`, and all choices."""
        return self.error(problem + suggest(value, choices))


def nearest(value: object, choices: Iterable[str], count: int = 1, cutoff: float = 0.5) -> list[str]:
    """The choices that look most like `value`, best first; none where none comes near."""
    return difflib.get_close_matches(str(value), list(dict.fromkeys(choices)), n=count, cutoff=cutoff)


def suggest(value: object, choices: Iterable[str]) -> str:
    """`; did you mean 'x'? (x, y, z)`, as much of it as there is to say."""
    names = list(dict.fromkeys(choices))
    guess = nearest(value, names)
    text = f"; did you mean {guess[0]!r}?" if guess else ""
    if names:
        more = f", … {len(names) - LISTED} more" if len(names) > LISTED else ""
        text += f" ({', '.join(names[:LISTED])}{more})"
    return text


def show(value: object, width: int = 60) -> str:
    """A value as the user would recognise it, cut to one short line."""
    text = {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
