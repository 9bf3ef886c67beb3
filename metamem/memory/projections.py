"""What a memory does with its input to have keys, values and queries of it: projections that are learned, or none.

Without projections the input is the three themselves, side by side: [query, key, value]. A memory then regresses
values on keys online, and nothing of that is learned but its gates and W_init.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

Projections = Literal["learned", "none"]


class Part(nn.Module):
    """The features `start … start + width` of the input, as they are, once for each of `copies` heads."""

    def __init__(self, start: int, width: int, copies: int = 1) -> None:
        super().__init__()
        self.start, self.width, self.copies = start, width, copies

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens width"]:
        """The part of x."""
        part = x[..., self.start : self.start + self.width]
        return part if self.copies == 1 else part.repeat(1, 1, self.copies)


def check(projections: str, dim: int, heads: int, d_key: int, d_value: int, writers: int, readers: int) -> None:
    """Raises ValueError where an input cannot be [query, key, value]."""
    if projections == "learned":
        return
    if writers * readers > 1:
        raise ValueError(
            f"projections 'none' leave one key and one query a token, not {writers} and {readers}; "
            f"set writers to 1 and readers to 1, or projections to 'learned'"
        )
    if dim != (needed := 2 * d_key + heads * d_value):
        raise ValueError(
            f"without projections the input is [query, key, value], {d_key} + {d_key} + {heads} × {d_value} features, "
            f"not {dim}; set projections to 'learned', or make it {needed}"
        )
