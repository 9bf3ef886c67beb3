"""What does not fit into memory is the user's to make smaller: refused before it is allocated, or told in one line.

- `fits`             within it, what would make a tensor that this machine has no memory for raises `TooLarge` instead
- `told_in_a_line`   an allocation that failed, of any library, as a `UserError`
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from metamem.config.errors import UserError

FACTORIES = frozenset(
    {
        *(torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.arange, torch.linspace),
        *(torch.rand, torch.randn, torch.randint, torch.randperm),
    }
)


class TooLarge(ValueError):
    """A tensor, or all of a model, for which there is not the memory."""


class fits(TorchFunctionMode):
    """Counts what is made in it, before it is made: together no more than the memory of this machine."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit = machine_memory() if limit is None else limit
        self.made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs what makes a tensor on the meta device first, where it takes no memory."""
        kwargs = kwargs or {}
        if func in FACTORIES:
            self.made += self._bytes(func, args, kwargs)
            if self.made > self.limit:
                raise TooLarge(
                    f"takes the network to {_size(self.made)} of memory; this machine has {_size(self.limit)}"
                )
        return func(*args, **kwargs)

    def _bytes(self, func: Any, args: Any, kwargs: Any) -> int:
        without = {key: value for key, value in kwargs.items() if key not in ("device", "generator", "pin_memory")}
        try:
            made = func(*args, **without, device="meta")
        except (RuntimeError, OverflowError, TypeError):
            if all(abs(size) < MOST for size in _integers((args, kwargs))):
                return 0  # not too large: what is wrong with it is told by the call itself
            raise TooLarge("has a weight that is larger than any tensor can be") from None
        return made.numel() * made.element_size()


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count:,} bytes"


MOST = 1 << 31  # no axis of a tensor of a model is longer


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict):
        yield from _integers(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _integers(item)


def machine_memory() -> int:
    """The memory of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """An allocation that fails, of Python, of torch on any device, as a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "lower what a step holds (training.batch, training.length, training.unroll), or the network"
        raise UserError(f"out of memory: {str(error) or 'no more could be had'}; {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch says it of a CPU in words only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
