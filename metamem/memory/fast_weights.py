"""Fast-weight memory: a network whose weights an inner loop changes while it reads.

Per token and head, writers give keys k, values v and gates; every level moves its component of the weights by its
signals (`TokenLevel`); readers query the weights after the token's own writes. `signal_at`

- `chunk`    all signals of a chunk are computed at the chunk's first weights (TTT, Titans)
- `token`    each signal at the weights before its own token (the exact online rule). A linear memory and a squared
             error: solved in parallel (`delta_rule`). Other networks: chunk = 1
- `decayed`  as `token`, after what the token forgets is forgotten (gated DeltaNet's order)

Executors compute the same thing: `dual` (matrix products, the one to use), `recurrence` (token by token, the
reference), `vmap_grad` (token by token, gradients by torch.func).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NotRequired, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from metamem.config.schema import RouterConfig
from metamem.memory import chunkwise, compiled, delta_rule, digest, module_network, recurrence, routed
from metamem.memory.base import Memory, Out, check_rows
from metamem.memory.combinations import check, check_router
from metamem.memory.component import (
    Carry,
    Learner,
    LevelState,
    Past,
    by_layer,
    fold,
    fresh_state,
    from_state,
    in_order,
    to_state,
    unfold,
)
from metamem.memory.digest import DigestState
from metamem.memory.feature_maps import FeatureMap
from metamem.memory.level import SignalAt, TokenLevel
from metamem.memory.module_network import ModuleNetwork
from metamem.memory.networks import NETWORKS, MemoryNetwork, Network, Weights
from metamem.memory.projections import Projections
from metamem.memory.projections import check as check_projections
from metamem.memory.reader import Reader
from metamem.memory.routed import Executor
from metamem.memory.schedule import Run, known_positions, schedule
from metamem.memory.signals import check_own
from metamem.memory.step_rule import stepped
from metamem.memory.writer import Writer
from metamem.routing import Router, Routing
from metamem.state import State

PIECE = 1024  # tokens that are taken at once


class PastState(TypedDict):
    """`Past` as a state: the writes that the windows of later tokens reach back to; of rate 0 before the first."""

    keys: Float[Tensor, "batch heads reach writers d_key"]
    values: Float[Tensor, "batch heads reach writers d_value"]
    rates: dict[str, Float[Tensor, "batch heads reach writers"]]
    parts: NotRequired[dict[str, Float[Tensor, "batch #heads reach layers blocks"]]]


class FastWeightsState(TypedDict, total=False):
    """`position`: tokens read; `levels`: each level's component; `anchor`: the weights at the chunk's start, at which
    the signals of a half-read chunk go on (`signal_at: chunk`); `past`: where a level has a window; `router`: where its
    input is the chunk before."""

    position: Int[Tensor, "batch"]
    levels: dict[str, LevelState]
    anchor: dict[str, Float[Tensor, "batch heads d_in d_out"]]
    past: PastState
    router: DigestState


class FastWeights(Memory):
    """A fast-weight memory of `heads` networks `d_key -> hidden … -> d_value`, written by the inner loop.

    - `network`       `mlp` or `swiglu` (`metamem.memory.networks`), with `bias` and `residual_norm` as options; or the
                      dotted path of an nn.Module of your own (`metamem.memory.module_network`)
    - `hidden`        widths of the hidden layers, or `expansion`, the same as multiples of d_key; neither: linear
    - `initial`       W_init starts `normal` or at `zero`; it is a slow weight either way
    - `projections`   to keys, values and queries are `learned`; or `none`: the input is [query, key, value], what is
                      read the output, as it is (`metamem.memory.projections`); all heads have the same key and query
    - `feature_map`   of keys and queries (`metamem.memory.feature_maps`)
    - `chunk`         tokens per chunk
    - `writers`       writes of a token and head, `together` at the same weights or `in_turn`; `readers`: queries
    - `compile_chunk` compiles the work of a few chunks (`executor: dual`, signals of the chunk): small graphs, whatever
                      the length, where compiling the whole module unrolls all chunks
    - `levels`        the token levels of the hierarchy that address this memory, fast to slow
    - `router`        the settings of a router between them (`metamem.routing`)

    Raises ValueError for settings that exclude each other.
    """

    def __init__(
        self,
        dim: int,
        levels: Sequence[TokenLevel],
        heads: int = 4,
        d_key: int | None = None,
        d_value: int | None = None,
        network: str = "mlp",
        hidden: Sequence[int] = (),
        expansion: Sequence[float] = (),
        activation: Literal["silu", "gelu", "tanh", "relu"] = "silu",
        bias: bool = False,
        residual_norm: bool = False,
        initial: Literal["normal", "zero"] = "normal",
        projections: Projections = "learned",
        feature_map: FeatureMap = "unit",
        chunk: int = 64,
        signal_at: SignalAt = "chunk",
        writers: int = 1,
        writes: Literal["together", "in_turn"] = "together",
        readers: int = 1,
        executor: Literal["dual", "recurrence", "vmap_grad"] = "dual",
        compile_chunk: bool = False,
        router: RouterConfig | None = None,
    ) -> None:
        super().__init__()
        d_key, d_value = d_key or dim // heads, d_value or dim // heads
        if hidden and expansion:
            raise ValueError(
                f"hidden {list(hidden)} and expansion {list(expansion)} say the same thing; set expansion to []"
            )
        widths = "expansion" if expansion else "hidden"
        hidden = hidden or [round(share * d_key) for share in expansion]
        self.dim, self.heads, self.chunk, self.executor = dim, heads, chunk, executor
        self.dim_in, self.dim_out = dim, dim if projections == "learned" else heads * d_value
        self.signal_at: SignalAt = signal_at
        self.compile_chunk = compile_chunk
        self.readers, self.in_turn = readers, writes == "in_turn"
        self.levels = tuple(levels)
        dims = (d_key, *hidden, d_value)
        check_projections(projections, dim, heads, d_key, d_value, writers, readers)
        check(network, dims, activation, residual_norm, bias, self.levels, chunk, signal_at, writes, widths)
        self.network: MemoryNetwork = (
            NETWORKS[network](dims, activation, bias) if network in NETWORKS else ModuleNetwork(network, d_key, d_value)
        )
        for level in self.levels:
            if isinstance(self.network, Network):
                check_own(level.signal, self.network)
        self.writer = Writer(dim, heads, d_key, d_value, self.levels, writers, feature_map, projections)
        self.reader = Reader(dim, heads, d_key, d_value, readers, feature_map, projections)
        weights = self.network.initial_weights(heads)
        self.init = nn.ParameterList([torch.zeros_like(w) for w in weights] if initial == "zero" else weights)
        if residual_norm:
            self.norm_gain = nn.Parameter(torch.ones(heads, 1, d_value))
            self.norm_shift = nn.Parameter(torch.zeros(heads, 1, d_value))
        self.residual_norm = residual_norm
        if compile_chunk and self._executor() is not chunkwise.run:
            raise ValueError(
                "compile_chunk compiles the chunks of the executor 'dual' with written-out signals, and this memory "
                "has none: token signals of a linear memory are solved for all chunks at once, other executors go "
                "token by token; set compile_chunk to false"
            )
        if any(level.signal == "predicted_targets" for level in self.levels):
            shapes = [(heads, d_value, weight.shape[-1]) for weight in weights]
            self.feedback = nn.ParameterList([torch.randn(shape) / d_value**0.5 for shape in shapes])
        self.router = None
        if router is not None:
            check_router(router, network)
            shapes = [(weight.shape[-2], weight.shape[-1]) for weight in weights]
            self.router = Router(router, dim, [level.name for level in self.levels], heads, shapes)
        # What a table closes for good is not run: with one level open, a memory computes what that level's does.
        self.running = tuple(level for level in self.levels if self.router is None or self.router.opens(level.name))

    def init_state(self, batch: int) -> State:
        """The state before the first token: components at zero, weights at W_init."""
        init = self._init()
        state: State = {"position": torch.zeros(batch, dtype=torch.long, device=init[0].device)}
        state["levels"] = {level.name: fresh_state(level, init, batch) for level in self.levels}
        if self.signal_at == "chunk":
            state["anchor"] = by_layer([weight.new_zeros(batch, *weight.shape) for weight in init])
        if reach := max(level.window for level in self.levels) - 1:
            at = (batch, self.heads, reach, self.writer.writers)
            state["past"] = {
                "keys": init[0].new_zeros(*at, self.network.dims[0]),
                "values": init[0].new_zeros(*at, self.network.dims[-1]),
                "rates": {level.name: init[0].new_zeros(at) for level in self.levels},
            }
            if self.router is not None and self.router.splits_heads:
                heads, *within = self.router.parts
                parts = init[0].new_zeros(batch, heads, reach, *within)
                state["past"]["parts"] = {level.name: parts for level in self.levels}
        if self.router is not None and self.router.source == "chunk":
            state["router"] = digest.to_state(digest.fresh(init, batch, self.dim, self.router.groups))
        return state

    def forward(self, x: Float[Tensor, "batch tokens dim"], state: State | None = None) -> Out:
        """Writes each token, then reads it. aux: `surprise` [batch, tokens], the fastest level's objective before
        the write, mean over heads and writers."""
        if state is not None:
            check_rows(state["position"], x)
        if not self.writing:
            state = self.init_state(x.shape[0]) if state is None else state
            return Out(*self.read(x, state), {})
        if len(pieces := self._pieces(x, state)) > 1:
            return self._in_pieces(pieces, state)
        clocks = [self.chunk, *(level.period for level in self.running)]
        positions = [0] if state is None else known_positions(state["position"], clocks)
        state = self.init_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            nothing = x.new_zeros(*x.shape[:2], self.dim_out)
            measured = {"surprise": x.new_zeros(x.shape[:2])} | self._measure(self._no_gates(x, state))
            return Out(nothing, state, measured)
        with torch.autocast(x.device.type, enabled=False):
            init = self._init()
            x = x.to(self.init[0].dtype)  # under autocast, a layer before may give less
            writes, queries = self.writer(x, init[0].dtype), self.reader.query(x, init[0].dtype)
            writes = stepped(self.levels, self.network, writes)
            components = [from_state(state["levels"][level.name]) for level in self.running]
            rest, components = fold(self.running, init, components)
            anchor = in_order(state["anchor"]) if "anchor" in state else None
            past = Past(**state["past"]) if "past" in state else None
            executor = self._executor()
            done = routed.run(
                partial(compiled.run, executor) if self.compile_chunk else executor,
                self._learner(init),
                self._schedule(positions, x.shape[1]),
                x,
                writes,
                queries,
                Carry(rest, components, anchor, past),
                self.router,
                digest.from_state(state["router"]) if "router" in state else None,
            )
            carry, components = done.carry, unfold(self.running, init, done.carry.components)
            after: State = {"position": state["position"] + x.shape[1]}
            named = zip(self.running, components, strict=True)
            moved = {level.name: to_state(level, component) for level, component in named}
            after["levels"] = {**state["levels"], **moved}
            if carry.anchor is not None and self.signal_at == "chunk":
                after["anchor"] = by_layer(carry.anchor)
            if carry.past is not None:
                after["past"] = {key: value for key, value in carry.past._asdict().items() if value is not None}
            if done.digest is not None:
                after["router"] = digest.to_state(done.digest)
        y = self.reader(done.read)
        return Out(y, after, {"surprise": done.surprise.mean((1, 3))} | self._measure(done.routing))

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
            recalled = self._learner(init).network.recall(weights, queries.flatten(2, 3))
        return self.reader(recalled.unflatten(2, queries.shape[2:4])), state

    def _pieces(self, x: Tensor, state: State | None) -> list[Tensor]:
        """x cut where chunks end, at most about `PIECE` tokens each; whole in a compiled graph, which fuses as it sees
        fit and knows no position."""
        if torch.compiler.is_compiling() or x.shape[1] <= PIECE:
            return [x]
        longest = max(1, PIECE // self.chunk) * self.chunk
        first = longest - (0 if state is None else int(state["position"][0]) % self.chunk)
        ends = [*range(first, x.shape[1], longest), x.shape[1]]
        return list(x.split([end - start for start, end in zip([0, *ends], ends, strict=False)], 1))

    def _in_pieces(self, pieces: list[Tensor], state: State | None) -> Out:
        """One after the other, which is the same by the streaming law: tensors of all tokens at once stay small enough
        for their memory to be used again, where the system maps and clears larger ones anew each time."""
        outs: list[Out] = []
        for piece in pieces:
            outs.append(self.forward(piece, state))
            state = outs[-1].state
        aux = {name: torch.cat([out.aux[name] for out in outs], 1) for name in outs[0].aux}
        return Out(torch.cat([out.y for out in outs], 1), outs[-1].state, aux)

    def _measure(self, routing: Routing | None) -> dict[str, Tensor]:
        if self.router is None or routing is None:
            return {}
        return {f"router.{name}": value for name, value in self.router.measure(routing).items()}

    def _no_gates(self, x: Tensor, state: State) -> Routing | None:
        """The gates of no tokens."""
        if self.router is None:
            return None
        features = state["router"]["features"].unsqueeze(1)[:, :0] if "router" in state else x
        return self.router(features, self._init()[0].dtype)

    def _init(self) -> Weights:
        """W_init in the type of the fast weights: at least float32."""
        dtype = torch.promote_types(self.init[0].dtype, torch.float32)
        return [weight.to(dtype) for weight in self.init]

    def _learner(self, init: Weights) -> Learner:
        dtype, network, feedback = init[0].dtype, self.network, None
        if self.residual_norm:
            network = network.with_norm([self.norm_gain.to(dtype), self.norm_shift.to(dtype)])
        if any(level.signal == "predicted_targets" for level in self.levels):
            feedback = [matrix.to(dtype) for matrix in self.feedback]
        return Learner(network, self.running, self.chunk, self.signal_at, self.in_turn, init, feedback)

    def _executor(self) -> Executor:
        if self.executor == "recurrence" and not isinstance(self.network, ModuleNetwork):
            return partial(recurrence.run, recurrence.written_out)
        if self.executor != "dual":
            return partial(recurrence.run, recurrence.by_autograd)
        if isinstance(self.network, ModuleNetwork):
            return module_network.run
        # A network that is not linear has chunks of one token where its signals are those of the token.
        linear = self.network.linear and not self.residual_norm
        return delta_rule.run if self.signal_at != "chunk" and linear else chunkwise.run

    def _schedule(self, positions: Sequence[int], tokens: int) -> list[Run]:
        periods = {level.name: level.period for level in self.running if level.period > 1}
        return schedule(positions, tokens, self.chunk, periods)
