"""The random states of a process: torch's own, also on GPUs, Python's and NumPy's, as tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from metamem.state import State


def seed_all(seed: int) -> None:
    """Starts every global generator at a seed: a task, or a module, may draw from any of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_states() -> State:
    """Where all global generators stand. The generator of the batches is a training's own."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = numpy
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": {str(index): state for index, state in enumerate(gpus)},
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), int(position), int(has_gauss)]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }


def set_random_states(states: State) -> None:
    """Goes on from there; a GPU that was not there has no state to go on from."""
    torch.set_rng_state(states["torch"])
    for index, state in states["cuda"].items():
        if torch.cuda.is_available() and int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(index))
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), next(iter(states["python_gauss"].tolist()), None)))
    *keys, position, has_gauss = states["numpy"].tolist()
    cached = float(states["numpy_gauss"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is done in it, whatever it draws, leaves the random states as they were: a run that does it, and one that
    does not, have the same numbers after it."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
