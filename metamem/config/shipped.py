"""The configs that ship with metamem, wherever it is installed: `metamem:memory/titans.yaml` names one.

A checkout has them in `configs/`, a wheel inside the package.
"""

from __future__ import annotations

from pathlib import Path

PREFIX = "metamem:"


def shipped_configs() -> Path:
    """The folder of the shipped configs."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "shipped_configs"
    return inside if inside.is_dir() else package.parent / "configs"


def locate(name: Path | str, folder: Path | str = "") -> Path:
    """The file that a config or a command line names: `metamem:FILE` ships, any other is relative to `folder`."""
    text = str(name)
    return shipped_configs() / text.removeprefix(PREFIX) if text.startswith(PREFIX) else Path(folder, name)


def shipped_name(path: Path) -> str | None:
    """`metamem:FILE` for a file in the folder of the shipped configs."""
    folder = shipped_configs()
    return PREFIX + path.relative_to(folder).as_posix() if path.is_relative_to(folder) else None


def shipped_like(path: Path) -> Path | None:
    """The shipped config that a path ends in the name of, such as `my/memory/titans.yaml`."""
    tails = [path.parts[start:] for start in range(len(path.parts))]
    found = (shipped_configs().joinpath(*tail) for tail in tails if ".." not in tail)
    return next((file for file in found if file.is_file()), None)
