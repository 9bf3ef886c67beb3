"""Nearest neighbours: the k words of a memory that are most like a key.

- `exact`   all words beside the key: the cosine with each, and the k largest
- `faiss`   an inverted file of FAISS (Douze et al. 2024, arXiv 2401.08281) for every row of a batch: words in the cells
            of random directions, of which a search looks through the nearest few. Approximate. An extra:
            `pip install metamem-torch[faiss]`

A search only orders words; the weights of those that it finds are computed, and differentiated, from the words.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from metamem.memory.slots.content import Keys, largest, similarity

IndexKind = Literal["exact", "faiss"]
Words = Float[Tensor, "batch slots word"]
Found = Int[Tensor, "batch heads k"]

PROBED = 8  # cells that a search looks through
PER_CELL = 32  # words in a cell, about


@runtime_checkable
class Index(Protocol):
    """What finds words."""

    def changed(self, words: Words, slots: Int[Tensor, "batch rows"]) -> None:
        """Takes note that these slots hold other words now."""
        ...

    def search(self, words: Words, keys: Keys, k: int, among: Int[Tensor, "batch"] | None = None) -> Found:
        """The slots of the k words that are most like each key, of equal ones the lowest, in ascending order. `among`:
        how many slots of each row come into question, the first; then, where they are fewer than k, the next."""
        ...


class Exact:
    """All words beside the key."""

    def changed(self, words: Words, slots: Int[Tensor, "batch rows"]) -> None:
        """Nothing: it looks at the words themselves."""

    @torch.no_grad()
    def search(self, words: Words, keys: Keys, k: int, among: Int[Tensor, "batch"] | None = None) -> Found:
        """The k largest cosines, exactly."""
        alike = similarity(words, keys).nan_to_num()  # of a model that diverged any k will do
        if among is not None:
            there = torch.arange(words.shape[1], device=words.device) < among[:, None, None]
            alike = alike.masked_fill(~there, -torch.inf)
        found = largest(alike, k).nonzero()[:, -1]
        return found.view(*keys.shape[:2], k)


class Faiss:
    """An inverted file for every row."""

    def __init__(self, words: Words, touched: int) -> None:
        faiss = _faiss()
        slots, word = words.shape[1:]
        cells = max(1, slots // PER_CELL)
        directions = np.random.default_rng(0).standard_normal((cells, word), dtype=np.float32)
        self.rows: list[Any] = []
        for row in _unit(words[:, :touched]):
            quantizer = faiss.IndexFlatIP(word)
            quantizer.add(directions / np.linalg.norm(directions, axis=1, keepdims=True))
            # Trained it is by its random directions, whatever the memory holds later.
            index = faiss.IndexIVFFlat(quantizer, word, cells, faiss.METRIC_INNER_PRODUCT)
            index.nprobe = min(PROBED, cells)
            index.set_direct_map_type(faiss.DirectMap.Array)
            index.add(row)
            self.rows.append((quantizer, index))

    def changed(self, words: Words, slots: Int[Tensor, "batch rows"]) -> None:
        """Moves the words to their cells; those that are new come after the ones before them."""
        for (_, index), row, at in zip(self.rows, words, slots.cpu().numpy(), strict=True):
            known, last = index.ntotal, int(at.max())
            if (old := np.unique(at[at < known])).size:
                index.update_vectors(old, _unit(row[torch.from_numpy(old)]))
            if last >= known:
                index.add(_unit(row[known : last + 1]))

    def search(self, words: Words, keys: Keys, k: int, among: Int[Tensor, "batch"] | None = None) -> Found:
        """The k nearest of the cells looked through; those of the lowest number where there are fewer."""
        found = []
        for (_, index), row in zip(self.rows, _unit(keys), strict=True):
            _, slots = index.search(row, k)
            found.append(np.stack([_filled(head, k) for head in slots]))
        return torch.from_numpy(np.stack(found)).to(keys.device)


def index_of(kind: IndexKind, words: Words, touched: int) -> Index:
    """An index of the first `touched` words, the others being empty as yet."""
    return Exact() if kind == "exact" else Faiss(words, touched)


def check_index(kind: IndexKind) -> None:
    """Raises ValueError where the index needs what is not installed."""
    if kind == "faiss":
        _faiss()


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise ValueError(
            "the index 'faiss' needs the package faiss-cpu: pip install 'metamem-torch[faiss]', or set index to 'exact'"
        ) from None


def _unit(words: Tensor) -> np.ndarray:
    return functional.normalize(words.detach().float(), dim=-1).cpu().contiguous().numpy()


def _filled(slots: np.ndarray, k: int) -> np.ndarray:
    """In ascending order; what was not found (−1) is filled up with the lowest other slots."""
    there = slots[slots >= 0]
    others = np.setdiff1d(np.arange(2 * k), there)[: k - len(there)]
    return np.sort(np.concatenate([there, others]))
