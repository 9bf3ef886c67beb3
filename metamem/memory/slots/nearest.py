"""Nearest neighbours: the k words of a memory that are most like a key.

- `exact`   all words beside the key: the cosine with each, and the k largest. Of a group of slots only the largest is
            kept, as the k largest of all are in the k groups of the largest such; a search needs no room for the others
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

from metamem.memory.slots.content import EPSILON, Keys, Weights, largest, norm

IndexKind = Literal["exact", "faiss"]
Words = Float[Tensor, "batch slots word"]
Found = Int[Tensor, "batch heads k"]

GROUP = 128  # slots of which the largest cosine is kept
FEW = 16  # groups, up to which looking at every word is as fast
BLOCK = 32 * GROUP  # slots that are looked through at once: what is computed of them stays in a cache
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
    """All words beside the key. The norms of words are kept, and follow those that change."""

    def __init__(self, words: Words) -> None:
        self.norms = torch.cat([norm(block) for block in words.detach().split(BLOCK, 1)], 1)

    @torch.no_grad()
    def changed(self, words: Words, slots: Int[Tensor, "batch rows"]) -> None:
        """The norms of these words."""
        self.norms.scatter_(1, slots, norm(words.gather(1, slots.unsqueeze(-1).expand(-1, -1, words.shape[-1]))))

    @torch.no_grad()
    def search(self, words: Words, keys: Keys, k: int, among: Int[Tensor, "batch"] | None = None) -> Found:
        """The k largest cosines, exactly."""
        whole = words.shape[1] // GROUP * GROUP
        if whole <= max(k, FEW) * GROUP:
            return _positions(self._alike(words, keys, slice(0, words.shape[1]), among), k)
        best = [self._alike(words, keys, at, among).unflatten(-1, (-1, GROUP)).amax(-1) for at in _blocks(whole)]
        slots = _slots_of(_positions(torch.cat(best, -1), k), slice(whole, words.shape[1]))
        rows = words.gather(1, slots.flatten(1).unsqueeze(-1).expand(-1, -1, words.shape[-1]))
        norms = self.norms.gather(1, slots.flatten(1)).unflatten(1, slots.shape[1:])
        dots = (rows.unflatten(1, slots.shape[1:]) @ keys.unsqueeze(-1)).squeeze(-1)
        return slots.gather(-1, _positions(_among(_cosines(dots, keys, norms), slots, among), k))

    def _alike(self, words: Tensor, keys: Tensor, at: slice, among: Tensor | None) -> Weights:
        alike = _cosines(torch.bmm(keys, words[:, at].mT), keys, self.norms[:, at].unsqueeze(1))
        return _among(alike, torch.arange(at.start, at.stop, device=words.device), among)


def _slots_of(groups: Found, rest: slice) -> Int[Tensor, "batch heads _looked"]:
    """The slots of some groups, and those that make no whole one."""
    inside = torch.arange(GROUP, device=groups.device)
    others = torch.arange(rest.start, rest.stop, device=groups.device).expand(*groups.shape[:2], -1)
    return torch.cat([(groups.unsqueeze(-1) * GROUP + inside).flatten(2), others], -1)


def _blocks(slots: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, slots)) for start in range(0, slots, BLOCK)]


def _cosines(dots: Tensor, keys: Keys, norms: Tensor) -> Tensor:
    return dots.div_((norm(keys).unsqueeze(-1) * norms).add_(EPSILON))


def _among(alike: Tensor, slots: Tensor, among: Tensor | None) -> Tensor:
    return alike if among is None else alike.masked_fill_(slots >= among[:, None, None], -torch.inf)


def _positions(alike: Float[Tensor, "batch heads slots"], k: int) -> Found:
    """Where the k largest are, in ascending order; of a model that diverged any k will do."""
    return largest(alike.nan_to_num_(neginf=-torch.inf), k).nonzero()[:, -1].view(*alike.shape[:2], k)


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
    return Exact(words) if kind == "exact" else Faiss(words, touched)


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
