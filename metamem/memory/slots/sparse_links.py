"""Temporal links of a sparse memory: of every row of the link matrix, and of every column, the largest few entries.

The equations are those of `links`. A write of S slots changes the entries in their rows and columns alone; they are
found from either side, as each slot knows what it was written after (its row) and what was written after it (its
column). A write costs S rows and columns, whatever the number of slots (after Rae et al. 2016, arXiv 1610.09027, who
keep a sparse matrix and its transpose too).

Links have no gradient here; what is read along them has, by the read weights and modes. They are written in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Entries = Int[Tensor, "batch rows writes _entries"]
Values = Float[Tensor, "batch rows writes _entries"]
Written = Int[Tensor, "batch written"]
WriteWeights = Float[Tensor, "batch writes written"]
Places = Int[Tensor, "batch rows writes"]


class Sparse(NamedTuple):
    """The largest entries of each row: where they are, and what."""

    slots: Entries
    values: Values

    def rows(self, at: Places) -> Sparse:
        """Some rows."""
        places = at.unsqueeze(-1).expand(-1, -1, -1, self.slots.shape[-1])
        return Sparse(self.slots.gather(1, places), self.values.gather(1, places))

    def put(self, at: Places, rows: Sparse) -> None:
        """Replaces rows; of a row that comes twice, both must be alike."""
        places = at.unsqueeze(-1).expand(-1, -1, -1, self.slots.shape[-1])
        self.slots.scatter_(1, places, rows.slots)
        self.values.scatter_(1, places, rows.values)


class SparseLinks(NamedTuple):
    """Rows L_i· (what slot i was written after), columns L_·j (what was written after slot j), and precedence."""

    rows: Sparse
    columns: Sparse
    last: Int[Tensor, "batch writes entries"]
    precedence: Float[Tensor, "batch writes entries"]


@torch.no_grad()
def links_after(links: SparseLinks, slots: Written, weights: WriteWeights) -> SparseLinks:
    """The links after a write: rows and columns in place, the precedence anew."""
    rows, columns, last, precedence = links
    kept = last.shape[-1]
    at = slots.unsqueeze(-1).expand(-1, -1, weights.shape[1])
    own = weight_of(at.unsqueeze(-1), slots, weights)
    row, column = rows.rows(at), columns.rows(at)
    _fade(rows, column, slots, own)
    _fade(columns, row, slots, own)
    row = _faded(row, own, slots, weights)
    columns.put(at, _faded(column, own, slots, weights))

    before = last.unsqueeze(1).expand(-1, slots.shape[1], -1, -1)
    new = own * precedence.unsqueeze(1) * (before != at.unsqueeze(-1))
    rows.put(at, _merged(row, before, new, kept))

    at = last.mT
    column = columns.rows(at)
    earlier = ((at.unsqueeze(-1) == last.unsqueeze(1)) * precedence.unsqueeze(1)).sum(-1, keepdim=True)
    after = slots[:, None, None].expand(-1, kept, weights.shape[1], -1)
    new = earlier * weights.unsqueeze(1) * (after != at.unsqueeze(-1))
    columns.put(at, _merged(column, after, new, kept))

    places = torch.cat([last, slots.unsqueeze(1).expand_as(weights)], -1)
    shares = torch.cat([(1 - weights.sum(-1, keepdim=True)) * precedence, weights], -1)
    return SparseLinks(rows, columns, *strongest(places, shares, kept))


def strongest(
    slots: Int[Tensor, "*batch candidates"], weights: Float[Tensor, "*batch candidates"], k: int
) -> tuple[Int[Tensor, "*batch k"], Float[Tensor, "*batch k"]]:
    """The k largest weights, those of a slot that comes more than once added up."""
    same = slots.unsqueeze(-1) == slots.unsqueeze(-2)
    total = (same * weights.unsqueeze(-2)).sum(-1).masked_fill(same.tril(-1).any(-1), 0.0)
    largest, at = total.topk(k)
    return slots.gather(-1, at), largest


def weight_of(entries: Entries, slots: Written, weights: WriteWeights) -> Values:
    """How much each write head writes to the slots of some entries."""
    return ((entries.unsqueeze(-1) == slots[:, None, None, None]) * weights[:, None, :, None]).sum(-1)


def _faded(rows: Sparse, own: Values, slots: Written, weights: WriteWeights) -> Sparse:
    """(1 − w_i − w_j) L_ij of the rows that were written."""
    return rows._replace(values=(1 - own - weight_of(rows.slots, slots, weights)) * rows.values)


def _fade(target: Sparse, across: Sparse, slots: Written, own: Values) -> None:
    """(1 − w_j) L_ij in the rows i that were not written: those that the other side of each written slot j names."""
    batch, written, writes, kept = across.slots.shape
    first = ~(slots.unsqueeze(-1) == slots.unsqueeze(-2)).tril(-1).any(-1)
    elsewhere = ~(across.slots.unsqueeze(-1) == slots[:, None, None, None]).any(-1)
    there = (across.values > 0) & elsewhere & first[:, :, None, None]
    at = across.slots.transpose(2, 3).reshape(batch, written * kept, writes)
    entries = target.rows(at).slots.unflatten(1, (written, kept))
    hit = (entries == slots[:, :, None, None, None]) & there.transpose(2, 3).unsqueeze(-1)
    factors = torch.where(hit, 1 - own.unsqueeze(2), 1.0).flatten(1, 2)
    places = at.unsqueeze(-1).expand_as(factors)
    target.values.scatter_reduce_(1, places, factors, "prod")


def _merged(rows: Sparse, slots: Entries, values: Values, kept: int) -> Sparse:
    return Sparse(*strongest(torch.cat([rows.slots, slots], -1), torch.cat([rows.values, values], -1), kept))
