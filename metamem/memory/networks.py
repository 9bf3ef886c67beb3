"""Memory networks: the function from key to value whose weights are fast.

A network is layers `z^l = in^l W^l` with an activation between them, `in^{l+1} = φ(z^l)`. How a layer applies its
weights is the caller's: a plain product for the signals, the dual form for the reads. So one `forward` serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from metamem.memory.product import product

Tokens = Float[Tensor, "*batch tokens _features"]  # _: each layer has its own
Weights = list[Float[Tensor, "*_batch _d_in _d_out"]]


class Activation(NamedTuple):
    """φ and its derivative, written out."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _silu_derivative(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _gelu_derivative(z: Tensor) -> Tensor:
    cumulative = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return cumulative + z * torch.exp(-0.5 * z.square()) * (1 / math.sqrt(2 * math.pi))


ACTIVATIONS = {
    "silu": Activation(functional.silu, _silu_derivative),
    "gelu": Activation(functional.gelu, _gelu_derivative),
    "tanh": Activation(torch.tanh, lambda z: 1 - torch.tanh(z).square()),
    "relu": Activation(functional.relu, lambda z: (z > 0).to(z.dtype)),
}


class Pass(NamedTuple):
    """What a forward pass leaves for the signals: each layer's input and its output before the activation."""

    inputs: list[Tokens]
    preactivations: list[Tokens]

    @property
    def output(self) -> Tokens:
        """The last layer's output, which has no activation."""
        return self.preactivations[-1]

    def split(self, tokens: int) -> tuple[Pass, Pass]:
        """The passes of the first `tokens` tokens and of the others."""
        halves = [[x.split([tokens, x.shape[-2] - tokens], -2) for x in part] for part in self]
        first, second = ([[pair[side] for pair in part] for part in halves] for side in (0, 1))
        return Pass(*first), Pass(*second)


@dataclass(frozen=True)
class Network:
    """A multi-layer perceptron without biases: `dims[0] -> … -> dims[-1]`; two dims make a linear memory."""

    dims: tuple[int, ...]
    activation: str = "silu"

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.dims) - 1

    def initial_weights(self, heads: int) -> Weights:
        """W_init: normal, of variance 1 / d_in, so that what is recalled before any write has the scale of a key."""
        return [torch.randn(heads, d_in, d_out) / math.sqrt(d_in) for d_in, d_out in self.shapes]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """`(d_in, d_out)` of each layer."""
        return list(zip(self.dims[:-1], self.dims[1:], strict=True))

    def forward(self, x: Tokens, layer: Callable[[int, Tokens], Tokens]) -> Pass:
        """`z^l = layer(l, in^l)`, `in^{l+1} = φ(z^l)`."""
        inputs, preactivations = [x], []
        for index in range(self.depth):
            preactivations.append(layer(index, inputs[index]))
            if index + 1 < self.depth:
                inputs.append(ACTIVATIONS[self.activation].function(preactivations[index]))
        return Pass(inputs, preactivations)

    def backward(self, error: Tokens, weights: Weights, preactivations: list[Tokens]) -> list[Tokens]:
        """Signals by backpropagation: `δ^L = error`, `δ^l = (δ^{l+1} W^{l+1}ᵀ) ⊙ φ'(z^l)`."""
        signals = [error]
        for index in range(self.depth - 1, 0, -1):
            slope = ACTIVATIONS[self.activation].derivative(preactivations[index - 1])
            signals.insert(0, product(signals[0], weights[index].mT) * slope)
        return signals
