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

A `Mixture` gates what several modules of a network made, by the same functions: y = Σ_i m_i y_i.
"""

from __future__ import annotations

import math
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
        sizes = torch.tensor([d_in * d_out for d_in, d_out in shapes], dtype=torch.get_default_dtype())
        sizes = sizes if by_layer else sizes.sum(0, keepdim=True)
        shares = (sizes / sizes.sum() / (self.heads * self.blocks)).repeat_interleave(self.blocks).repeat(self.heads)
        self.register_buffer("costs", shares.unsqueeze(1).repeat(1, len(levels)), persistent=False)
        self.parts = (self.heads, self.layers, self.blocks)
        if config.gating == "fixed":
            self.register_buffer("table", table := self._table(), persistent=False)
            # One number for all groups changes no product: with ones, a memory computes what it does without a router.
            self.parts = (1, 1, 1) if bool((table == table[:1]).all()) else self.parts
            return
        self.choices = len(levels) + config.holds
        if config.gating == "topk" and self.k > len(levels):
            raise (config.where / "k").error(
                f"{self.k} is more than the memory's levels ({len(levels)}); "
                f"set k to {len(levels)}, or kind to 'dense' and k to null"
            )
        if config.gating != "binary" and self.choices < 2:
            raise (config.where / "kind").error(
                f"a softmax over one choice, level {levels[0]!r}, is always 1; "
                f"set hold to true, or kind to 'binary' and hold to null"
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

    def opens(self, level: str) -> bool:
        """Whether a gate of a level is ever open: a table may close it for good."""
        return self.config.gating != "fixed" or bool((self.table[:, self.names.index(level)] > 0).any())

    @property
    def groups(self) -> int:
        """How many parameter groups it tells apart."""
        return self.heads * self.layers * self.blocks

    @property
    def splits_heads(self) -> bool:
        """Whether the parts of a head have gates of their own, which its rate cannot hold."""
        return self.parts[1:] != (1, 1)

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
        costs = self.costs.to(routing.gates.dtype).expand_as(routing.gates)
        return {**_measured(self.names, routing), "costs": costs}

    def by_part(self, gates: Float[Tensor, "batch tokens groups levels"]) -> Float[Tensor, "b t h l n levels"]:
        """The gates by head, layer and block; one along what is gated alike."""
        return gates[:, :, : math.prod(self.parts)].unflatten(2, self.parts)

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
                    f"the {width} columns of layer {layer} cannot be cut into {self.blocks} blocks; "
                    f"set blocks to {nearest}"
                )

    def _table(self) -> Tensor:
        table, where = self.config.table or {}, self.config.where / "table"
        rows = []
        for name in self.names:
            gate = table.get(name, 0.0)
            if isinstance(gate, list) and len(gate) != self.groups:
                raise (where / name).error(
                    f"gives {len(gate)} gates, and the memory has {self.groups} groups: one for each, or one for all"
                )
            rows.append(gate if isinstance(gate, list) else [gate] * self.groups)
        if not any(map(any, rows)):
            raise where.error(
                f"opens none of the memory's levels ({', '.join(self.names)}), and nothing would be written"
            )
        return torch.tensor(rows, dtype=torch.get_default_dtype()).T.contiguous()


class Mixture(nn.Module):
    """y_t = Σ_i m_i y^i_t, m = softmax(x_t W + b), or its `k` largest, straight through to it: a mixture of what the
    modules `names` made of the same tokens (Jacobs et al. 1991; top-k: Shazeer et al. 2017). A mixture may be a source
    of another, and a hierarchy of experts so (Jordan and Jacobs 1994). All of its modules run: those that hold a state
    have to read every token.
    """

    def __init__(self, dim: int, names: Sequence[str], k: int | None = None) -> None:
        super().__init__()
        self.names, self.k = tuple(names), k
        self.weight = nn.Parameter(torch.randn(len(names), dim) / dim**0.5)
        self.bias = nn.Parameter(torch.zeros(len(names)))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], sources: Sequence[Float[Tensor, "batch tokens dim_out"]]
    ) -> tuple[Float[Tensor, "batch tokens dim_out"], dict[str, Tensor]]:
        """The mixture, and what is known of its gates (as of a router of one group: the names are its levels)."""
        logits = functional.linear(x, self.weight, self.bias)
        gates = gating.dense(logits) if self.k is None else gating.top_k(logits, self.k)
        mixed = (torch.stack(list(sources), -1) * gates.to(sources[0].dtype).unsqueeze(-2)).sum(-1)
        return mixed, _measured(self.names, Routing(gates.unsqueeze(2), logits.unsqueeze(2)))


def _measured(names: Sequence[str], routing: Routing) -> dict[str, Tensor]:
    gates, logits = routing
    aux = {"gates": gates}
    for index, (name, of_choice) in enumerate(zip(names, gates.unbind(-1), strict=True)):
        aux[f"gates.{name}"] = of_choice
        aux[f"load.{name}"] = (gates[..., index] > 0).to(gates.dtype).mean(-1)
    if logits is not None:
        aux |= {"logits": logits, "entropy": gating.entropy(logits).mean(-1)}
    return aux
