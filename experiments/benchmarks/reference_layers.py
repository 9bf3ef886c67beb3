"""What memories are measured against: the projections that each of them has, and causal attention of the same width."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Projections(nn.Module):
    """The floor: keys, values, queries and output, and nothing between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values, output = self.project
        return output(queries(x) + keys(x) + values(x))


class SelfAttention(Projections):
    """Causal attention, 4 heads of 64."""

    def forward(self, x: Tensor) -> Tensor:
        *inputs, output = self.project
        queries, keys, values = (project(x).unflatten(-1, (4, -1)).transpose(1, 2) for project in inputs)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return output(attended.transpose(1, 2).flatten(2))
