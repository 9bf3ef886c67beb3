"""JSON from disk, as what it should be: whatever else is in a file is one line that names it.

- `read_json`   a file that is one value
- `read_rows`   a file of one object a line; a last line that a kill cut off is none
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from metamem.config.errors import UserError, show
from metamem.config.plain import is_mapping

Check = Callable[[Any], bool]


def read_json(path: Path, what: str, parts: Mapping[str, Check]) -> dict[str, Any]:
    """The object in a file. Raises UserError where it is no `what`: an object with all of `parts`."""
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not {what}: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: not {what}: nested too deeply") from None
    return _checked(value, f"{path}", what, parts)


def read_rows(path: Path, what: str, parts: Mapping[str, Check]) -> Iterator[dict[str, Any]]:
    """The objects in a file, one a line. Raises UserError at the first line that is no `what`."""
    for number, line in enumerate(_text(path).split("\n")[:-1], start=1):
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not {what}: {error}") from None
        except RecursionError:
            raise UserError(f"{place}: not {what}: nested too deeply") from None
        yield _checked(value, place, what, parts)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _checked(value: Any, place: str, what: str, parts: Mapping[str, Check]) -> dict[str, Any]:
    if not is_mapping(value):
        raise UserError(f"{place}: not {what}: it is {show(value)}")
    for name, check in parts.items():
        if name not in value:
            raise UserError(f"{place}: not {what}: it has no {name!r}")
        if not check(value[name]):
            raise UserError(f"{place}: not {what}: its {name} is {show(value[name])}")
    return value


def is_text(value: Any) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def is_whole(value: Any) -> bool:
    """Whether it is an integer."""
    return type(value) is int


def is_number(value: Any) -> bool:
    """Whether it is a number; null stands for one that was not finite."""
    return value is None or isinstance(value, int | float)


def are_numbers(value: Any) -> bool:
    """Whether it is an object of numbers."""
    return is_mapping(value) and all(map(is_number, value.values()))


def list_of(check: Check) -> Check:
    """Whether it is a list of what passes a check."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def or_null(check: Check) -> Check:
    """Whether it is null, or passes a check."""
    return lambda value: value is None or check(value)
