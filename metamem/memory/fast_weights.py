"""Fast-weight memory: a network whose weights an inner loop changes while it reads.

Per token and head, writers give keys k, values v and gates; every level moves its component of the weights by its
signals (`TokenLevel`); readers query the weights after the token's own writes. `signal_at`

- `chunk`   all signals of a chunk are computed at the chunk's first weights (TTT, Titans)
- `token`   each signal at the weights of its own token (the exact online rule). One layer and a squared error: solved
            in parallel (`delta_rule`). Deeper networks: chunk = 1.

Executors compute the same thing: `dual` (matrix products, the one to use), `recurrence` (token by token, the
reference), `vmap_grad` (token by token, gradients by torch.func).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from metamem.memory import chunkwise, delta_rule, recurrence
from metamem.memory.base import Memory, Out
from metamem.memory.component import (
    Carry,
    Learner,
    LevelState,
    by_layer,
    fold,
    fresh_state,
    from_state,
    in_order,
    to_state,
    unfold,
)
from metamem.memory.level import TokenLevel
from metamem.memory.networks import ACTIVATIONS, Network, Weights
from metamem.memory.reader import Reader
from metamem.memory.schedule import Run, schedule
from metamem.memory.writer import Writer, Writes
from metamem.state import State

Executor = Callable[[Learner, Run, Writes, Tensor, Carry], tuple[Tensor, Tensor, Carry]]


class FastWeightsState(TypedDict, total=False):
    """`position`: tokens read; `levels`: each level's component; `anchor`: the weights at the chunk's start, at which
    the signals of a half-read chunk go on (`signal_at: chunk`)."""

    position: Int[Tensor, "batch"]
    levels: dict[str, LevelState]
    anchor: dict[str, Float[Tensor, "batch heads d_in d_out"]]


class FastWeights(Memory):
    """A fast-weight memory of `heads` networks `d_key -> hidden … -> d_value`, written by the inner loop.

    - `hidden`      widths of the hidden layers; empty for a linear memory
    - `chunk`       tokens per chunk
    - `writers`     writes of a token and head, all at once; `readers` queries
    - `levels`      the token levels of the hierarchy that address this memory, fast to slow

    Raises ValueError for settings that exclude each other.
    """

    def __init__(
        self,
        dim: int,
        levels: Sequence[TokenLevel],
        heads: int = 4,
        d_key: int | None = None,
        d_value: int | None = None,
        hidden: Sequence[int] = (),
        activation: Literal["silu", "gelu", "tanh", "relu"] = "silu",
        chunk: int = 64,
        signal_at: Literal["chunk", "token"] = "chunk",
        writers: int = 1,
        readers: int = 1,
        executor: Literal["dual", "recurrence", "vmap_grad"] = "dual",
    ) -> None:
        super().__init__()
        d_key, d_value = d_key or dim // heads, d_value or dim // heads
        self.dim, self.heads, self.chunk, self.executor = dim, heads, chunk, executor
        self.dim_in = self.dim_out = dim
        self.signal_at, self.readers = signal_at, readers
        self.levels = tuple(levels)
        self.writing = True  # switched off, a forward only reads (`metamem.adaptation.writing`)
        self.network = Network((d_key, *hidden, d_value), activation)
        check(self.network, self.levels, chunk, signal_at)
        self.writer = Writer(dim, heads, d_key, d_value, self.levels, writers)
        self.reader = Reader(dim, heads, d_key, d_value, readers)
        self.init = nn.ParameterList(self.network.initial_weights(heads))

    def init_state(self, batch: int) -> State:
        """The state before the first token: components at zero, weights at W_init."""
        init = self._init()
        state: State = {"position": torch.zeros(batch, dtype=torch.long, device=init[0].device)}
        state["levels"] = {level.name: fresh_state(level, init, batch) for level in self.levels}
        if self.signal_at == "chunk":
            state["anchor"] = by_layer([weight.new_zeros(batch, *weight.shape) for weight in init])
        return state

    def forward(self, x: Float[Tensor, "batch tokens dim"], state: State | None = None) -> Out:
        """Writes each token, then reads it. aux: `surprise` [batch, tokens], the fastest level's objective before
        the write, mean over heads and writers."""
        if state is not None and state["position"].shape[0] != x.shape[0]:  # one row would broadcast, silently
            raise ValueError(f"the state has {state['position'].shape[0]} rows, the input {x.shape[0]}")
        if not self.writing:
            state = self.init_state(x.shape[0]) if state is None else state
            return Out(*self.read(x, state), {})
        positions = [0] if state is None else self._positions(state)
        state = self.init_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return Out(x.clone(), state, {"surprise": x.new_zeros(x.shape[:2])})
        with torch.autocast(x.device.type, enabled=False):
            init = self._init()
            x = x.to(self.init[0].dtype)  # under autocast, a layer before may give less
            writes, queries = self.writer(x, init[0].dtype), self.reader.query(x, init[0].dtype)
            components = [from_state(state["levels"][level.name]) for level in self.levels]
            rest, components = fold(self.levels, init, components)
            anchor = in_order(state["anchor"]) if "anchor" in state else None
            carry = Carry(rest, components, anchor)
            learner, run = Learner(self.network, self.levels, self.chunk), self._executor()
            reads, surprises = [], []
            for span in self._schedule(positions, x.shape[1]):
                read, surprise, carry = run(learner, span, writes, queries, carry)
                reads.append(read)
                surprises.append(surprise)
            components = unfold(self.levels, init, carry.components)
            after: State = {"position": state["position"] + x.shape[1]}
            named = zip(self.levels, components, strict=True)
            after["levels"] = {level.name: to_state(level, component) for level, component in named}
            if carry.anchor is not None and self.signal_at == "chunk":
                after["anchor"] = by_layer(carry.anchor)
        y = self.reader(torch.cat(reads, 2))
        return Out(y, after, {"surprise": torch.cat(surprises, 2).mean((1, 3))})

    def write(self, x: Float[Tensor, "batch tokens dim"], state: State) -> State:
        """The state after x was written."""
        return self(x, state).state

    def read(self, x: Float[Tensor, "batch tokens dim"], state: State) -> tuple[Tensor, State]:
        """What the weights of now hold for x; the state is unchanged."""
        with torch.autocast(x.device.type, enabled=False):
            init = self._init()
            components = [from_state(state["levels"][level.name]) for level in self.levels]
            weights = Carry(init, components, None).now()
            queries = self.reader.query(x.to(self.init[0].dtype), init[0].dtype)
            recalled = self.network.forward(queries.flatten(2, 3), lambda layer, a: a @ weights[layer]).output
        return self.reader(recalled.unflatten(2, queries.shape[2:4])), state

    def _init(self) -> Weights:
        """W_init in the type of the fast weights: at least float32."""
        dtype = torch.promote_types(self.init[0].dtype, torch.float32)
        return [weight.to(dtype) for weight in self.init]

    def _executor(self) -> Executor:
        if self.executor == "recurrence":
            return partial(recurrence.run, recurrence.written_out)
        if self.executor == "vmap_grad":
            return partial(recurrence.run, recurrence.vmap_grad)
        # A deep network with token signals has chunks of one token.
        return delta_rule.run if self.signal_at == "token" and self.network.depth == 1 else chunkwise.run

    def _schedule(self, positions: Sequence[int], tokens: int) -> list[Run]:
        periods = {level.name: level.period for level in self.levels if level.period > 1}
        return schedule(positions, tokens, self.chunk, periods)

    def _positions(self, state: State) -> list[int]:
        """Each row's position, one entry where all agree. A compiled graph has no host values: there a state must
        stand at a boundary of chunks and periods, which is asserted at run time."""
        position = state["position"]
        if torch.compiler.is_compiling():
            for clock in (self.chunk, *(level.period for level in self.levels)):
                torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
                    (position % clock == 0).all(), f"compiled memory: the state must stand at a multiple of {clock}"
                )
            return [0]
        positions = position.tolist()
        return positions[:1] if len(set(positions)) == 1 else positions


def check(network: Network, levels: Sequence[TokenLevel], chunk: int, signal_at: str) -> None:
    """Raises ValueError, with the nearest valid setting, where settings exclude each other."""
    if not levels:
        raise ValueError("a fast-weight memory needs at least one level with clock 'token' that names its group")
    if min(chunk, *network.dims) < 1:
        raise ValueError(f"chunk and all widths must be at least 1, not {chunk} and {list(network.dims)}")
    if network.activation not in ACTIVATIONS:
        raise ValueError(f"there is no activation {network.activation!r} ({', '.join(ACTIVATIONS)})")
    names = [level.name for level in levels]
    if len(set(names)) < len(names):
        raise ValueError(f"levels need different names: {names}")
    for level in levels:
        if level.signal != "backprop":
            raise ValueError(
                f"level {level.name!r}: fast_weights takes the signal 'backprop', not {level.signal!r}; "
                f"the kind mnm takes 'predicted_targets'"
            )
        if level.period > 1 and level.period % chunk and chunk % level.period:
            raise ValueError(
                f"level {level.name!r}: period {level.period} and chunk {chunk} do not divide one another; "
                f"the nearest period that does is {max(1, round(level.period / chunk)) * chunk}"
            )
    if signal_at == "token":
        if network.depth > 1 and chunk > 1:
            raise ValueError(
                f"signal_at 'token' with {network.depth} layers cannot run in parallel; "
                f"set chunk to 1, signal_at to 'chunk', or hidden to []"
            )
        delta_rule.check(levels)
