"""Modules of the few-shot literature, by `kind`.

- `perceptron`           layers of these widths; a plain nn.Sequential, which runs batched by hand
- `context_perceptron`   the same with context parameters beside its input (CAVIA; Zintgraf et al. 2019)
- `convolution`          blocks of convolution, batch norm, ReLU and pooling (Vinyals et al. 2016)
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metamem.episodes.batched import part, rule, run
from metamem.episodes.level import Parameters
from metamem.episodes.registry import EPISODE_MODULES

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}
Activation = Literal["relu", "tanh", "gelu", "silu"]


@EPISODE_MODULES.register("perceptron")
def perceptron(
    widths: tuple[int, ...], activation: Activation = "relu", weight_std: float | None = None
) -> nn.Sequential:
    """Linear layers with an activation between them, inputs flattened.

    `weight_std`: normal weights of this deviation, cut at two of it, and biases 0 (Finn et al. 2017 have 0.01); None:
    torch's own.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths must be two or more numbers of at least 1, not {list(widths)}")
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), ACTIVATIONS[activation]()]
        if weight_std is not None:
            nn.init.trunc_normal_(layers[-2].weight, std=weight_std, a=-2 * weight_std, b=2 * weight_std)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layers[-2].bias)  # pyright: ignore[reportArgumentType]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


@EPISODE_MODULES.register("context_perceptron")
class ContextPerceptron(nn.Module):
    """A perceptron over its input and `context` numbers more, which are 0 before a task and which no outer level moves:
    what they start from, a bias of the first layer says already."""

    def __init__(self, widths: tuple[int, ...], context: int = 5, activation: Activation = "relu") -> None:
        super().__init__()
        if context < 1:
            raise ValueError(f"context must be at least 1, not {context}")
        self.context = nn.Parameter(torch.zeros(context), requires_grad=False)
        self.body = perceptron((widths[0] + context, *widths[1:]), activation)

    def forward(self, x: Float[Tensor, "examples features"]) -> Float[Tensor, "examples out"]:
        """The perceptron of [x, context]."""
        return self.body(torch.cat([x, self.context.expand(*x.shape[:-1], -1)], -1))


@rule(ContextPerceptron)
def context_perceptron(
    module: nn.Module, parameters: Parameters, x: Float[Tensor, "tasks examples features"]
) -> Float[Tensor, "tasks examples out"]:
    """The same with the context of each task."""
    context = parameters["context"]
    context = context[:, None] if context.dim() == 2 else context
    body = module.get_submodule("body")
    return run(body, part(parameters, "body"), torch.cat([x, context.expand(*x.shape[:-1], -1)], -1))


@EPISODE_MODULES.register("convolution")
class Convolution(nn.Sequential):
    """`blocks` of 3×3 convolution, batch norm over the examples at hand, ReLU and 2×2 pooling; then a linear layer.

    The norm keeps no running statistics, which tasks could not share: in evaluation too, it is that of the examples.
    """

    def __init__(self, classes: int, size: int = 16, channels: int = 32, blocks: int = 3) -> None:
        if size >> blocks < 1:
            raise ValueError(f"{blocks} blocks halve {size} pixels to nothing: at most {size.bit_length() - 1}")
        layers: list[nn.Module] = []
        for index in range(blocks):
            layers += [
                nn.Conv2d(1 if index == 0 else channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels, track_running_stats=False),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * (size >> blocks) ** 2, classes))
