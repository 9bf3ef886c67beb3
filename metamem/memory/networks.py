"""Memory networks: the function from key to value whose weights are fast.

A network is a few matrices: matrix l is applied to an input in^l and gives `z^l = in^l W^l`; the signal of a write is
`δ^l = ∂ loss / ∂ z^l`, so that its step on W^l is `in^l ⊗ δ^l`. How a matrix is applied is the caller's: a plain
product for the signals, the dual form for the reads. So one `forward` serves both, and `backward` needs no autograd.

    mlp      z^l = in^l W^l,  in^{l+1} = φ(z^l); one matrix makes a linear memory
    swiglu   y = (φ(x W^0) ⊙ (x W^1)) W^2                                     (LaCT, Zhang et al. 2025)

Around either, `residual_norm` gives `y = x + LN(f(x))`                        (TTT, Sun et al. 2024, section 2.4)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from metamem.memory.activations import ACTIVATIONS
from metamem.memory.layer_norm import Normalised, normalise, normalise_backward
from metamem.memory.product import product_transposed

Tokens = Float[Tensor, "*batch tokens _features"]  # _: each layer has its own
Weights = list[Float[Tensor, "*_batch _d_in _d_out"]]
Apply = Callable[[int, Tokens], Tokens]


class Pass(NamedTuple):
    """What a forward pass leaves for the signals: the input of each matrix, what it gave, the network's output, and,
    under a norm, the last matrix's output normalised."""

    inputs: list[Tokens]
    preactivations: list[Tokens]
    output: Tokens
    normalised: Normalised | None = None

    def split(self, tokens: int) -> tuple[Pass, Pass]:
        """The passes of the first `tokens` tokens and of the others."""
        sizes = [tokens, self.output.shape[-2] - tokens]
        inputs, preactivations, output, normalised = (
            [x.split(sizes, -2) for x in part]
            for part in (self.inputs, self.preactivations, [self.output], self.normalised or ())
        )
        first, second = (
            Pass(
                [x[side] for x in inputs],
                [x[side] for x in preactivations],
                output[0][side],
                Normalised(*(x[side] for x in normalised)) if normalised else None,
            )
            for side in (0, 1)
        )
        return first, second


class ResidualNorm(NamedTuple):
    """The slow weights of `y = x + gain ⊙ normalise(z) + shift`."""

    gain: Float[Tensor, "*heads one features"]
    shift: Float[Tensor, "*heads one features"]

    def forward(self, x: Tokens, normalised: Normalised) -> Tokens:
        """x + LN(z)."""
        return torch.addcmul(x + self.shift, self.gain, normalised.unit)

    def backward(self, error: Tokens, z: Tokens, normalised: Normalised) -> Tokens:
        """∂/∂z of what has the gradient `error` at y."""
        return normalise_backward(self.gain * error, z, normalised)


@runtime_checkable
class MemoryNetwork(Protocol):
    """What every memory network is: `Network` here, a user's module in `metamem.memory.module_network`."""

    @property
    def dims(self) -> tuple[int, ...]:
        """d_key, …, d_value."""
        ...

    @property
    def linear(self) -> bool:
        """Whether what is recalled is linear in the fast weights."""
        ...

    @property
    def norm(self) -> ResidualNorm | None:
        """The slow weights of the residual norm, where there is one."""
        ...

    def initial_weights(self, heads: int) -> Weights:
        """W_init, to learn from."""
        ...

    def recall(self, weights: Weights, x: Tokens) -> Tokens:
        """The output for x at the given weights."""
        ...

    def with_norm(self, norm: Sequence[Tensor]) -> MemoryNetwork:
        """The same network with these slow weights of its norm."""
        ...


@dataclass(frozen=True, eq=False)
class Network:
    """A multi-layer perceptron `dims[0] -> … -> dims[-1]`; two dims make a linear memory.

    With a `bias`, an input has a last feature of 1 and a matrix a last row, the bias: it is fast as the rest is.
    """

    dims: tuple[int, ...]
    activation: str = "silu"
    bias: bool = False
    norm: ResidualNorm | None = None

    @property
    def depth(self) -> int:
        """Number of matrices."""
        return len(self.shapes)

    @property
    def linear(self) -> bool:
        """Whether what is recalled is linear in the fast weights."""
        return self.depth == 1 and self.norm is None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """`(d_in, d_out)` of each matrix."""
        return [(d_in + self.bias, d_out) for d_in, d_out in self._sizes()]

    def _sizes(self) -> list[tuple[int, int]]:
        return list(zip(self.dims[:-1], self.dims[1:], strict=True))

    def initial_weights(self, heads: int) -> Weights:
        """W_init: normal, of variance 1 / d_in, so that what is recalled before any write has the scale of a key;
        biases at zero."""
        matrices = [torch.randn(heads, d_in, d_out) / math.sqrt(d_in) for d_in, d_out in self._sizes()]
        return [functional.pad(matrix, (0, 0, 0, 1)) for matrix in matrices] if self.bias else matrices

    def forward(self, x: Tokens, layer: Apply, ones: bool = True) -> Pass:
        """`z^l = layer(l, in^l)`, `in^{l+1} = φ(z^l)`; without `ones` the inputs lack the 1 that a bias multiplies, and
        the layers are to add it."""
        inputs, preactivations = [self.given(x, ones)], []
        for index in range(self.depth):
            preactivations.append(layer(index, inputs[index]))
            if index + 1 < self.depth:
                inputs.append(self.given(ACTIVATIONS[self.activation].function(preactivations[index]), ones))
        return self._pass(x, inputs, preactivations)

    def recall(self, weights: Weights, x: Tokens) -> Tokens:
        """The output for x at the given weights."""
        return self.forward(x, lambda index, a: a @ weights[index]).output

    def backward(self, error: Tokens, weights: Weights, forward: Pass) -> list[Tokens]:
        """Signals by backpropagation: `δ^L = error` (through the norm), `δ^l = (δ^{l+1} W^{l+1}ᵀ) ⊙ φ'(z^l)`."""
        signals = [self._last(error, forward)]
        for index in range(self.depth - 1, 0, -1):
            back, z = self._back(signals[0], weights[index]), forward.preactivations[index - 1]
            signals.insert(0, ACTIVATIONS[self.activation].backward(back, z))
        return signals

    def given(self, x: Tokens, ones: bool = True) -> Tokens:
        """What a matrix is applied to: x, and the 1 that its bias multiplies; without `ones` x alone."""
        return functional.pad(x, (0, 1), value=1.0) if self.bias and ones else x

    def with_norm(self, norm: Sequence[Tensor]) -> Network:
        """The same network with the slow weights of its residual norm (gain and shift; none for no norm)."""
        return replace(self, norm=ResidualNorm(*norm) if norm else None)

    def _pass(self, x: Tokens, inputs: list[Tokens], preactivations: list[Tokens]) -> Pass:
        if self.norm is None:
            return Pass(inputs, preactivations, preactivations[-1])
        normalised = normalise(preactivations[-1])
        return Pass(inputs, preactivations, self.norm.forward(x, normalised), normalised)

    def _last(self, error: Tokens, forward: Pass) -> Tokens:
        if self.norm is None or forward.normalised is None:
            return error
        return self.norm.backward(error, forward.preactivations[-1], forward.normalised)

    def _back(self, signal: Tokens, weight: Tensor) -> Tokens:
        return product_transposed(signal, weight[..., :-1, :] if self.bias else weight)


@dataclass(frozen=True, eq=False)
class SwiGLU(Network):
    """`y = (φ(x W^0) ⊙ (x W^1)) W^2`, of dims (d_key, hidden, d_value)."""

    def _sizes(self) -> list[tuple[int, int]]:
        d_key, hidden, d_value = self.dims
        return [(d_key, hidden), (d_key, hidden), (hidden, d_value)]

    def forward(self, x: Tokens, layer: Apply, ones: bool = True) -> Pass:
        """Both inner matrices see x; the outer one sees their gated product."""
        inner = self.given(x, ones)
        gate, up = layer(0, inner), layer(1, inner)
        hidden = self.given(ACTIVATIONS[self.activation].function(gate) * up, ones)
        z = layer(2, hidden)
        return self._pass(x, [inner, inner, hidden], [gate, up, z])

    def backward(self, error: Tokens, weights: Weights, forward: Pass) -> list[Tokens]:
        """`δ^2 = error`, `δ^1 = h ⊙ φ(z^0)`, `δ^0 = h ⊙ z^1 ⊙ φ'(z^0)`, h = δ^2 W^2ᵀ."""
        gate, up, _ = forward.preactivations
        activation = ACTIVATIONS[self.activation]
        last = self._last(error, forward)
        back = self._back(last, weights[2])
        return [activation.backward(back * up, gate), back * activation.function(gate), last]


NETWORKS: dict[str, type[Network]] = {"mlp": Network, "swiglu": SwiGLU}
