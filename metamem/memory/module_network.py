"""A user's own `nn.Module` as a memory network: all of its parameters are fast, by `torch.func`.

    class Gated(nn.Module):                       # memory: {kind: fast_weights, network: mypackage.nets.Gated, ...}
        def __init__(self, d_key: int, d_value: int): ...
        def forward(self, x): ...                 # [tokens, d_key] -> [tokens, d_value], each token by itself

Nothing is written out for it, so signals are gradients by `vmap(grad)`. Levels whose periods are whole chunks take one
gradient a chunk; with a faster level, every token's weights are built, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from metamem.config.errors import ConfigError
from metamem.config.resolve import resolve_class
from metamem.memory import recurrence, signals
from metamem.memory.chunkwise import refresh
from metamem.memory.component import Carry, Learner, fire_all
from metamem.memory.networks import Weights
from metamem.memory.reader import Queries
from metamem.memory.schedule import Run
from metamem.memory.writer import Writes


class ModuleNetwork:
    """The module that a dotted path names, made as `path(d_key, d_value)`; its parameters, as matrices, are fast.

    A parameter of one axis is a matrix of one row; of more than two, its first axis against the others. Raises
    ValueError for a module with buffers (whose would they be?), without parameters, or of other shapes.
    """

    def __init__(self, path: str, d_key: int, d_value: int) -> None:
        self.make: Callable[[], nn.Module] = partial(_found(path), d_key, d_value)
        self.module, self.dims = self.make(), (d_key, d_value)
        self.norm, self.linear = None, False
        self.names = [name for name, _ in self.module.named_parameters()]
        self.sizes = [parameter.shape for parameter in self.module.parameters()]
        if not self.names:
            raise ValueError(f"{path} has no parameters: nothing would be fast")
        if buffers := [name for name, _ in self.module.named_buffers()]:
            raise ValueError(f"{path} has buffers ({', '.join(buffers)}), which no sample could have of its own")
        with torch.no_grad():
            shape = tuple(self.module(torch.zeros(3, d_key)).shape)
        if shape != (3, d_value):
            raise ValueError(f"{path} makes {list(shape)} of [3, {d_key}]; it has to make [3, {d_value}]")

    def initial_weights(self, heads: int) -> Weights:
        """Those that the module is made with, made anew for each head."""
        made = [[p.detach() for p in self.make().parameters()] for _ in range(heads)]
        stacked = [torch.stack(of_heads) for of_heads in zip(*made, strict=True)]
        return [w.unsqueeze(1) if w.ndim < 3 else w.flatten(2) for w in stacked]

    def recall(
        self, weights: Weights, x: Float[Tensor, "*batch tokens d_key"]
    ) -> Float[Tensor, "*batch tokens d_value"]:
        """The module's output for x, each leading index with weights of its own."""
        leading = x.shape[:-2]
        weights = [weight.expand(*leading, *weight.shape[-2:]) for weight in weights]
        call = self._call
        for _ in leading:
            call = vmap(call)
        return call(weights, x)

    def with_norm(self, norm: object) -> ModuleNetwork:
        """Itself: a norm is the module's own affair."""
        return self

    def _call(self, weights: Weights, x: Tensor) -> Tensor:
        shaped = {n: w.reshape(size) for n, w, size in zip(self.names, weights, self.sizes, strict=True)}
        return functional_call(self.module, shaped, (x,))


def _found(path: str) -> Callable[..., nn.Module]:
    try:
        return resolve_class(path, nn.Module, "network")
    except ConfigError as error:  # the builder knows the place: file and key
        raise ValueError(str(error).removeprefix("network: ")) from error


def run(learner: Learner, span: Run, writes: Writes, queries: Queries, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
    """As `chunkwise.run`, of any network."""
    levels = learner.levels
    lagging = all(level.period > 1 and level.period % learner.chunk == 0 and level.window == 1 for level in levels)
    if not lagging or learner.signal_at != "chunk":
        return recurrence.run(recurrence.by_autograd, learner, span, writes, queries, carry)
    reads, surprises = [], []
    for segment in span.segments:
        here = slice(segment.start, segment.start + segment.length)
        carry = carry._replace(anchor=(at := refresh(segment, carry)))
        keys, values = writes.keys[:, :, here].flatten(2, 3), writes.values[:, :, here].flatten(2, 3)
        reads.append(learner.network.recall(carry.now(), queries[:, :, here].flatten(2, 3)))
        surprises.append(signals.value(levels[0].objectives, learner.network.recall(at, keys), values))
        components = []
        for level, component in zip(levels, carry.components, strict=True):
            gates = writes.gates[level.name]
            rates, parts = gates.lr[:, :, here].flatten(2, 3), gates.parts
            if parts is not None:
                parts = parts[:, :, here].repeat_interleave(writes.keys.shape[3], 2)
            step = [-product for product in recurrence.by_autograd(learner, level, at, keys, values, rates, parts)]
            components.append(recurrence.add_step(level, component, step))
        last = here.stop - 1
        steps = {name: recurrence.boundary_gates(writes.gates[name], last) for name in segment.fire}
        carry = fire_all(learner, segment, steps, carry._replace(components=components))
    shape = (span.length, -1)
    read_out = torch.cat([read.unflatten(2, shape) for read in reads], 2)
    return read_out, torch.cat([surprise.unflatten(2, shape) for surprise in surprises], 2), carry
