"""The router: a mixture of experts whose experts are timescales (DESIGN section 3).

Every write of a memory goes into a component of each level, and into every parameter group: a head, a layer, or a block
of columns. A router has a gate m for each (group × level), and multiplies the write by it,

    S_t = β S_{t−1} − η m (in ⊗ δ)

so that the outer loss trains it through the inner updates. It scales what is written, never the error that goes back
through the memory's network; momentum, forgetting and retention are the level's own. What the gates come from:

    token    logits z_t = x_t W + b of the token that is written
    chunk    the same of the chunk before (`metamem.memory.digest`)
    static   z = b, learned
    fixed    no logits: a table

With `hold` a softmax has one more choice, to write nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from metamem import gating
from metamem.config.check_router import check_settings
from metamem.config.schema import RouterConfig


class Routing(NamedTuple):
    """A router's gates, and the logits that they are of: over the levels (and hold) of each group, or, of a binary
    gate, over open and closed. None where nothing is learned."""

    gates: Float[Tensor, "batch tokens groups levels"]
    logits: Float[Tensor, "batch tokens cases choices"] | None


class Router(nn.Module):
    """Gates of a memory's writes, for each of its parameter groups and levels.

    - `dim`      features of its input
    - `levels`   the memory's levels, fast to slow
    - `heads`, `shapes`   the memory's heads, and the (d_in, d_out) of each of its layers

    Groups are counted head by head, in each layer by layer, in each block by block. Everything starts at zero: all
    choices alike. Raises ConfigError for settings that do not go together, or with the memory.
    """

    costs: Float[Tensor, "groups levels"]
    table: Float[Tensor, "groups levels"]

    def __init__(
        self, config: RouterConfig, dim: int, levels: Sequence[str], heads: int, shapes: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__()
        check_settings(config)
        self.config, self.names = config, tuple(levels)
        by_head, by_layer = config.granularity in ("head", "block"), config.granularity in ("layer", "block")
        self.heads, self.layers = heads if by_head else 1, len(shapes) if by_layer else 1
        self.blocks = (config.blocks or 1) if config.granularity == "block" else 1
        self._check_blocks(shapes)
        sizes = torch.tensor([d_in * d_out for d_in, d_out in shapes], dtype=torch.float)
        sizes = sizes if by_layer else sizes.sum(0, keepdim=True)
        shares = (sizes / sizes.sum() / (self.heads * self.blocks)).repeat_interleave(self.blocks).repeat(self.heads)
        self.register_buffer("costs", shares.unsqueeze(1).repeat(1, len(levels)), persistent=False)
        if config.gating == "fixed":
            self.register_buffer("table", self._table(), persistent=False)
            return
        self.choices = len(levels) + config.holds
        if config.gating == "topk" and self.k > len(levels):
            raise (config.where / "k").error(
                f"{self.k} is more than the memory's levels ({len(levels)}): set k to {len(levels)}, or kind to dense"
            )
        if config.gating != "binary" and self.choices < 2:
            raise (config.where / "kind").error(
                f"a softmax over one choice, level {levels[0]!r}, is always 1: set hold to true, or kind to binary"
            )
        count = self.groups * self.choices
        if config.source != "static":
            features = dim if config.source == "token" else dim + 1 + 2 * self.groups
            self.weight = nn.Parameter(torch.zeros(count, features))
        self.bias = nn.Parameter(torch.zeros(count))

    @property
    def source(self) -> str:
        """What its logits come from: `token`, `chunk`, or nothing (`static`)."""
        return self.config.source

    @property
    def groups(self) -> int:
        """How many parameter groups it tells apart."""
        return self.heads * self.layers * self.blocks

    @property
    def k(self) -> int:
        """How many choices of a group are open at once (`topk`)."""
        return self.config.k or 1

    def forward(self, x: Float[Tensor, "batch tokens _features"], dtype: torch.dtype) -> Routing:
        """The gates of tokens with these features."""
        to_all = (*x.shape[:2], -1, -1)
        if self.config.gating == "fixed":
            return Routing(self.table.to(dtype).expand(to_all), None)
        if self.config.source == "static":
            logits = self.bias.to(dtype).expand(1, 1, -1)
        else:
            logits = functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(dtype)
        logits = logits.unflatten(-1, (self.groups, self.choices))
        gates = self._gates(logits)[..., : len(self.names)]
        if self.config.gating == "binary":
            logits = torch.stack([logits, -logits], -1).flatten(2, 3) / 2
        return Routing(gates.expand(to_all), logits.expand(to_all))

    def measure(self, routing: Routing) -> dict[str, Tensor]:
        """What is known of the gates: for objectives `gates`, `logits` (where any are learned) and `costs`, each
        level's share of the weights that a group has; for the logs, of every token, `gates.<level>` of each group,
        `load.<level>`, the share of groups that are open, and `entropy` in nats, the mean over groups."""
        gates, logits = routing
        aux = {"gates": gates, "costs": self.costs.to(gates.dtype).expand_as(gates)}
        for level, (name, of_level) in enumerate(zip(self.names, gates.unbind(-1), strict=True)):
            aux[f"gates.{name}"] = of_level
            aux[f"load.{name}"] = (gates[..., level] > 0).to(gates.dtype).mean(-1)
        if logits is not None:
            aux |= {"logits": logits, "entropy": gating.entropy(logits).mean(-1)}
        return aux

    def by_part(self, gates: Float[Tensor, "batch tokens groups levels"]) -> Float[Tensor, "b t h l n levels"]:
        """The gates by head, layer and block; of one where it does not tell them apart."""
        return gates.unflatten(2, (self.heads, self.layers, self.blocks))

    def _gates(self, logits: Tensor) -> Tensor:
        if self.config.gating == "topk":
            return gating.top_k(logits, self.k)
        return gating.dense(logits) if self.config.gating == "dense" else gating.binary(logits)

    def _check_blocks(self, shapes: Sequence[tuple[int, int]]) -> None:
        for layer, (_, width) in enumerate(shapes):
            if width % self.blocks:
                whole = [n for n in range(1, width + 1) if all(d_out % n == 0 for _, d_out in shapes)]
                nearest = min(whole, key=lambda n: (abs(n - self.blocks), n))
                raise (self.config.where / "blocks").error(
                    f"the {width} columns of layer {layer} cannot be cut into {self.blocks} blocks: "
                    f"set blocks to {nearest}"
                )

    def _table(self) -> Tensor:
        table, where = self.config.table or {}, self.config.where / "table"
        rows = []
        for name in table:
            if name not in self.names:
                raise (where / name).unknown(f"the memory has no level {name!r}", name, self.names)
        for name in self.names:
            gate = table.get(name, 0.0)
            if isinstance(gate, list) and len(gate) != self.groups:
                raise (where / name).error(
                    f"gives {len(gate)} gates, and the memory has {self.groups} groups: one for each, or one for all"
                )
            rows.append(gate if isinstance(gate, list) else [gate] * self.groups)
        return torch.tensor(rows, dtype=torch.float).T.contiguous()
