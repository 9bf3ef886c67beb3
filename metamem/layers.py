"""Plain layers of a network: embedding, norm, linear, MLP, gate, short convolution. A module says its `dim_in` and
`dim_out`; a gate joins two sources (`by: gate`)."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from metamem.memory.activations import ACTIVATIONS
from metamem.registry import MODULES
from metamem.state import State, Stateful

Tokens = Float[Tensor, "batch time dim"]
Features = Float[Tensor, "*tokens dim"]


@MODULES.register("embedding")
class Embedding(nn.Module):
    """A learned vector for each of `size` tokens."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.dim_in, self.dim_out = None, dim
        self.weight = nn.Parameter(torch.randn(size, dim) * dim**-0.5)

    def forward(self, x: Int[Tensor, "batch time"]) -> Tokens:
        """The tokens' vectors."""
        return functional.embedding(x, self.weight)


@MODULES.register("rms_norm")
class RMSNorm(nn.RMSNorm):
    """x / RMS(x) ⊙ gain."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)
        self.dim_in = self.dim_out = dim

    def forward(self, x: Tokens) -> Tokens:
        """x of length √dim, times the gain."""
        return super().forward(x.to(self.weight.dtype))  # under autocast, a layer before may give less


@MODULES.register("linear")
class Linear(nn.Linear):
    """x W + b."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = False) -> None:
        super().__init__(dim_in, dim_out, bias)
        self.dim_in, self.dim_out = dim_in, dim_out


@MODULES.register("mlp")
class MLP(nn.Module):
    """φ(x W_up) W_down, `expansion` times wider inside."""

    def __init__(
        self, dim: int, expansion: float = 4.0, activation: Literal["silu", "gelu", "tanh", "relu"] = "gelu"
    ) -> None:
        super().__init__()
        self.dim_in = self.dim_out = dim
        self.activation = activation
        self.up = nn.Linear(dim, round(dim * expansion), bias=False)
        self.down = nn.Linear(round(dim * expansion), dim, bias=False)

    def forward(self, x: Tokens) -> Tokens:
        """φ(x W_up) W_down."""
        return self.down(ACTIVATIONS[self.activation].function(self.up(x)))


class Gate(nn.Module):
    """g ⊙ a + (1 − g) ⊙ b with g = σ([a, b] W + bias)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(2 * dim, dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def value(self, a: Features, b: Features) -> Features:
        """g."""
        return torch.sigmoid(self.project(torch.cat([a, b], -1)))

    def forward(self, a: Tokens, b: Tokens) -> Tokens:
        """The gated mean of a and b."""
        gate = self.value(a, b)
        return gate * a + (1 - gate) * b


@MODULES.register("short_convolution")
class ShortConvolution(Stateful):
    """x_t + Σ_i w_i ⊙ x_{t−i} over the last `width` tokens, causal; the state is the last `width − 1` tokens."""

    def __init__(self, dim: int, width: int = 4) -> None:
        super().__init__()
        self.dim_in = self.dim_out = dim
        self.width = width
        self.weight = nn.Parameter(torch.randn(dim, 1, width) * width**-0.5)

    def init_state(self, batch: int) -> State:
        """Zeros before the first token."""
        return {"past": self.weight.new_zeros(batch, self.width - 1, self.weight.shape[0])}

    def forward(self, x: Tokens, state: State | None = None) -> tuple[Tokens, State]:
        """The convolved tokens."""
        past = (self.init_state(x.shape[0]) if state is None else state)["past"]
        seen = torch.cat([past.to(x.dtype), x], 1)
        mixed = functional.conv1d(rearrange(seen, "b t d -> b d t"), self.weight, groups=self.weight.shape[0])
        after = seen[:, seen.shape[1] - (self.width - 1) :]
        return x + rearrange(mixed, "b d t -> b t d"), {"past": after.to(past.dtype)}
