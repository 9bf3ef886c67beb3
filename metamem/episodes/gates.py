"""Masks and routers over inner rates: a mixture whose experts are rates, over units of parameters.

    multiplier[unit] = Σ_e gate_e[unit] · expert_e

- sparse-MAML (von Oswald et al. 2021): `binary` gates of every `element`, one expert, 1: an element moves or does not
- routed MAML: `dense` or `topk` gates of every tensor over experts such as 0.1, 1, 10 times the rate, and *hold*, which
  moves nothing

What the logits are of: nothing (`static`, learned), or the task (`task`): the logarithms of its support loss and of its
gradient's norm in each tensor, at this update. Everything starts at zero: `binary` open, the others undecided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metamem.episodes.level import Losses
from metamem.episodes.rates import layout
from metamem.gating import binary, dense, top_k
from metamem.hierarchy.rates import RatesPer

FLOOR = 1e-12  # under a loss or a squared norm, whose logarithm is a feature


class RateRouter(nn.Module):
    """Gates over (unit × expert): `(step, losses, gradients) -> multiplier of each parameter's rate`.

    - `parameters`   those that move, by name; `groups`: the group of each, for `per: group`
    - `kind`     `dense`, `topk` (its `k` largest) or `binary`; the first two with *hold* unless `hold` is false
    - `experts`  what they multiply the rate by
    - `input`    `static` or `task`
    """

    experts: Float[Tensor, "choices"]

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        kind: Literal["dense", "topk", "binary"],
        *,
        experts: Sequence[float] = (1.0,),
        per: RatesPer = "tensor",
        k: int = 1,
        hold: bool = True,
        input: Literal["static", "task"] = "static",
        groups: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        choices = len(experts) + (hold and kind != "binary")
        if kind != "binary" and choices < 2:
            raise ValueError(f"a softmax over one choice is always 1: give more than {list(experts)}, or hold")
        if kind == "topk" and k >= choices:
            raise ValueError(f"the {k} largest of {choices} choices are all of them: take the kind 'dense'")
        if input == "task" and per in ("row", "element"):
            raise ValueError(f"gates of the task are per level, group or tensor, not per {per}")
        self.kind, self.k, self.reads_gradients = kind, k, input == "task"
        self.ranks = {name: parameter.dim() for name, parameter in parameters.items()}
        self.layout = layout(parameters, per, groups)
        self.register_buffer("experts", torch.tensor([*experts, *[0.0] * (choices - len(experts))]), persistent=False)
        self.logits = nn.Parameter(torch.zeros(self.layout.size, choices))
        if input == "task":
            self.weights = nn.Parameter(torch.zeros(1 + len(parameters), self.layout.size, choices))

    def forward(self, step: int, losses: Float[Tensor, "*tasks"], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The multiplier of each parameter's rate, which broadcasts against [tasks, *shape]."""
        factors = self.gates(losses, gradients) @ self.experts
        if not self.reads_gradients:
            return dict(zip(self.ranks, self.layout.of_each(factors), strict=True))
        parts = zip(self.ranks.items(), self.layout.parts, strict=True)
        return {name: factors[:, part].view(-1, *(1,) * rank) for (name, rank), part in parts}

    def gates(
        self, losses: Float[Tensor, "*_tasks"], gradients: Mapping[str, Tensor]
    ) -> Float[Tensor, "*tasks units choices"]:
        """The gates of each unit over the experts and hold; of a task, where they read it."""
        logits = self.logits
        if self.reads_gradients:
            features = task_features(losses, [gradients[name] for name in self.ranks])
            logits = logits + torch.einsum("tf,fuc->tuc", features, self.weights)
        if self.kind == "topk":
            return top_k(logits, self.k)
        return dense(logits) if self.kind == "dense" else binary(logits)


def task_features(
    losses: Losses, gradients: Sequence[Float[Tensor, "tasks *_shape"]]
) -> Float[Tensor, "tasks features"]:
    """log of the support loss and of the norm of each gradient, [tasks, 1 + gradients]."""
    squares = [losses.square(), *(gradient.flatten(1).square().sum(1) for gradient in gradients)]
    return 0.5 * (torch.stack(squares, 1) + FLOOR).log()
