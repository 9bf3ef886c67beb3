"""The writer: turns the input into what a memory stores (key, value) and the gates of each write (η, β, α)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from metamem.memory.feature_maps import FEATURE_MAPS, FeatureMap
from metamem.memory.level import TokenLevel
from metamem.memory.product import Projection
from metamem.memory.projections import Part, Projections

LEARNED_MOMENTUM = 0.5  # where a learned β starts


class Gates(NamedTuple):
    """One level's gates: η per write, and log α, log β per token (None where the level has none); `parts`: what a
    router multiplies the writes into each layer and block of columns by, where that is not one number for the head."""

    lr: Float[Tensor, "batch heads tokens writers"]
    log_keep: Float[Tensor, "batch heads tokens"] | None
    log_momentum: Float[Tensor, "batch heads tokens"] | None
    parts: Float[Tensor, "batch #heads tokens layers blocks"] | None = None


class Writes(NamedTuple):
    """What the writers ask for, token by token; the writes of one token happen at once."""

    keys: Float[Tensor, "batch heads tokens writers d_key"]
    values: Float[Tensor, "batch heads tokens writers d_value"]
    gates: dict[str, Gates]


class _StaticGate(nn.Module):
    """A linear layer without its matrix: the same logits for every token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens width"]:
        """The bias, for every token."""
        return self.bias.expand(*x.shape[:-1], -1)


class Writer(nn.Module):
    """`writers` writers per head: k = φ(x W_k), v = x W_v, η, β, α = gates of x per level; φ the feature map."""

    def __init__(
        self,
        dim: int,
        heads: int,
        d_key: int,
        d_value: int,
        levels: Sequence[TokenLevel],
        writers: int = 1,
        feature_map: FeatureMap = "unit",
        projections: Projections = "learned",
    ) -> None:
        super().__init__()
        self.feature_map: FeatureMap = feature_map
        self.heads, self.writers, self.levels = heads, writers, tuple(levels)
        if projections == "none":
            self.keys, self.values = Part(d_key, d_key, heads), Part(2 * d_key, heads * d_value)
        else:
            self.keys = Projection(dim, heads * writers * d_key)
            self.values = Projection(dim, heads * writers * d_value)
        self.gates = nn.ModuleDict({level.name: self._gate_projection(dim, level) for level in self.levels})

    def _gate_projection(self, dim: int, level: TokenLevel) -> nn.ModuleDict:
        """Learned gates start constant (zero weights), at the bias that gives their starting value."""
        starts = {
            "lr": (level.lr, self.heads * self.writers, 0.0),
            "momentum": (level.momentum, self.heads, _logit(LEARNED_MOMENTUM)),
            "forget": (level.forget, self.heads, _logit(level.forget_start)),
        }
        projections = nn.ModuleDict()
        for gate, (setting, width, start) in starts.items():
            if setting == "learned":
                projections[gate] = _StaticGate(width) if level.gates == "static" else nn.Linear(dim, width)
                for name, parameter in projections[gate].named_parameters():
                    nn.init.constant_(parameter, start if name == "bias" else 0.0)
        return projections

    def forward(self, x: Float[Tensor, "batch tokens dim"], dtype: torch.dtype) -> Writes:
        """What is written for x, with keys, values and gates in `dtype` (fast weights keep at least float32)."""
        split = {"h": self.heads, "w": self.writers}
        keys = rearrange(self.keys(x), "b t (h w d) -> b t h w d", **split).to(dtype)
        keys = rearrange(FEATURE_MAPS[self.feature_map](keys), "b t h w d -> b h t w d").contiguous()
        values = rearrange(self.values(x), "b t (h w d) -> b h t w d", **split).to(dtype).contiguous()
        return Writes(keys, values, {level.name: self._gates(x, level, dtype) for level in self.levels})

    def _gates(self, x: Tensor, level: TokenLevel, dtype: torch.dtype) -> Gates:
        batch, tokens, _ = x.shape
        projections = self.gates[level.name]

        def logits(gate: str) -> Tensor:
            return projections[gate](x).to(dtype)  # pyright: ignore[reportIndexIssue, reportCallIssue]

        def constant(value: float) -> Tensor:
            return torch.full((batch, self.heads, tokens), value, dtype=dtype, device=x.device)

        if level.lr == "learned":
            lr = level.lr_max * torch.sigmoid(rearrange(logits("lr"), "b t (h w) -> b h t w", h=self.heads))
        else:
            lr = constant(level.lr).unsqueeze(-1).expand(-1, -1, -1, self.writers)
        if level.reduction == "mean":
            lr = lr / level.period
        keep = momentum = None
        if level.forget == "learned":
            keep = rearrange(functional.logsigmoid(-logits("forget")), "b t h -> b h t")
        elif level.forgets:
            keep = constant(math.log1p(-level.forget))
        if level.momentum == "learned":
            momentum = rearrange(functional.logsigmoid(logits("momentum")), "b t h -> b h t")
        elif level.has_momentum:
            momentum = constant(math.log(level.momentum))
        return Gates(lr, keep, momentum)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
