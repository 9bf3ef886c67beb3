"""The reader: turns the input into queries, and what was read into an output."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from metamem.memory.feature_maps import FEATURE_MAPS, FeatureMap
from metamem.memory.norms import rms
from metamem.memory.product import Projection
from metamem.memory.projections import Part, Projections

Queries = Float[Tensor, "batch heads tokens readers d_key"]


class Reader(nn.Module):
    """`readers` readers per head: q = φ(x W_q), y = RMSNorm(read) W_o over all heads and readers; φ the feature map.
    Without projections q is a part of x, and y what was read."""

    def __init__(
        self,
        dim: int,
        heads: int,
        d_key: int,
        d_value: int,
        readers: int = 1,
        feature_map: FeatureMap = "unit",
        projections: Projections = "learned",
    ) -> None:
        super().__init__()
        self.feature_map: FeatureMap = feature_map
        self.heads, self.readers = heads, readers
        self.projects = projections == "learned"
        if not self.projects:
            self.queries = Part(0, d_key, heads)
            return
        self.queries = Projection(dim, heads * readers * d_key)
        self.norm = nn.RMSNorm(d_value)
        self.output = Projection(heads * readers * d_value, dim)

    def query(self, x: Float[Tensor, "batch tokens dim"], dtype: torch.dtype) -> Queries:
        """The queries for x, in `dtype`."""
        queries = rearrange(self.queries(x), "b t (h r d) -> b t h r d", h=self.heads, r=self.readers)
        return rearrange(FEATURE_MAPS[self.feature_map](queries.to(dtype)), "b t h r d -> b h t r d").contiguous()

    def forward(self, read: Float[Tensor, "b h t readers d_value"]) -> Float[Tensor, "batch tokens dim"]:
        """The output for what was read."""
        if not self.projects:
            return rearrange(read, "b h t r d -> b t (h r d)")
        dtype = self.output.weight.dtype
        read = rearrange(read, "b h t r d -> b t h r d").to(dtype)
        return self.output((rms(read) * self.norm.weight).flatten(2))
