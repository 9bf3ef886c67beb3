"""Network: a graph of modules, built from the `network:` part of a config, with one state for all of them.

    modules:      name -> kind and options (`metamem.registry.MODULES`); kind `network` nests, `repeat` stacks copies
    connections:  {from: a, to: b}, or several sources joined `by` concat, sum, gate or moe; `in` and `out` are the ends

A name that only connections use is a junction: it passes on what was joined there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from metamem import attention, controllers  # noqa: F401  (they register their kinds)
from metamem.config import Config, NetworkConfig, Where, check_measured, measured_objectives, network_config
from metamem.config.convert import Range
from metamem.config.schema import ConnectionConfig, RouterConfig
from metamem.globs import matches
from metamem.hierarchy import learned_rates, token_levels
from metamem.layers import Gate
from metamem.low_rank import add_low_rank
from metamem.memory import cell, context, gated_residual, persistent_tokens, slots  # noqa: F401  (they register kinds)
from metamem.memory.base import Out
from metamem.memory.fast_weights import FastWeights
from metamem.memory.level import TokenLevel
from metamem.memory.mnm import MNM
from metamem.out_of_memory import fits
from metamem.registry import MODULES
from metamem.routing import Mixture, Router
from metamem.state import State, Stateful

MODULES.register("fast_weights")(FastWeights)
MODULES.register("mnm")(MNM)

# Names of a Network's own attributes.
TAKEN = ("training", "names", "steps", "dims", "dim_in", "dim_out", "inner_rates")


def build(config: Config) -> Network:
    """The network of a config, each memory with the token levels that address it.

    Raises ConfigError for dims that do not meet, a cycle, a module kind or option that does not exist, a token level
    that no memory has, and an objective `aux.<glob>` of something that nothing measures.
    """
    torch.manual_seed(config.seed)
    with fits():
        network = _Builder(config).network(config.network, "")
    used = {level.name for module in network.modules() for level in getattr(module, "levels", ())}
    for level in config.hierarchy.levels:
        if level.clock == "token" and level.name not in used:
            raise (level.where / "groups").error(
                f"no memory's weights are in the groups of the token level {level.name!r}"
            )
    router = config.hierarchy.router
    if router is not None and not any(isinstance(module, Router) for module in network.modules()):
        raise router.where.error(
            "gates what fast_weights write, and no such memory is in its groups; set hierarchy.router to null"
        )
    _check_length(config, network)
    if config.adaptation.low_rank is not None:
        add_low_rank(network, config.adaptation.low_rank, config.seed)
    if rates := learned_rates(config, network):
        network.add_module("inner_rates", rates)
    if any(measured_objectives(config).values()):
        check_measured(config, network.measures())
    return network


def _check_length(config: Config, network: Network) -> None:
    """Raises ConfigError where a training sequence ends before a chunk, or a level's period, ever does."""
    length, where = config.training.length, config.training.where / "length"
    for name, module in network.named_modules():
        if isinstance(module, FastWeights) and module.signal_at == "chunk" and module.chunk > length:
            raise where.error(
                f"a sequence of {length} tokens is shorter than the chunk of {name}, {module.chunk}: no signal would "
                f"see a write; make it at least {module.chunk}, or the chunk smaller"
            )
    for level in config.hierarchy.levels:
        unrolled = level.clock == "token" or (level.clock == "inner" and level.unroll != 0)
        if unrolled and level.period > length:
            raise where.error(
                f"a sequence of {length} tokens is shorter than the period of level {level.name!r}, {level.period}: it "
                f"would never move in training; make it at least {level.period}"
            )


class Network(Stateful):
    """Modules and the connections between them, run in an order in which every input is there."""

    def __init__(
        self, modules: Mapping[str, nn.Module], connections: Sequence[ConnectionConfig], dim_in: int | None = None
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.names = tuple(modules)
        self.steps = tuple(_ordered(connections))
        self.dim_in, self.dim_out = dim_in, None
        self._meet({"in": dim_in})

    def init_state(self, batch: int) -> State:
        """The states of the stateful modules, by name."""
        children = ((name, getattr(self, name)) for name in self.names)
        return {name: module.init_state(batch) for name, module in children if isinstance(module, Stateful)}

    def reset_state(self, state: State, rows: Bool[Tensor, "batch"] | None = None) -> State:
        """Each module's own reset."""
        return {name: getattr(self, name).reset_state(part, rows) for name, part in state.items()}

    def forward(self, x: Shaped[Tensor, "batch time *dims"], state: State | None = None) -> Out:
        """Runs the graph on `in` = x; aux: what the modules measured, by path."""
        values, after, aux = {"in": x}, {}, {}
        for step in self.steps:
            value, measured = self._join(step, values)
            aux.update(measured)
            if step.to in self.names:
                module = getattr(self, step.to)
                if isinstance(module, Stateful):
                    value, after[step.to], *rest = module(value, None if state is None else state[step.to])
                    aux.update({f"{step.to}.{key}": item for part in rest for key, item in part.items()})
                else:
                    value = module(value)
            values[step.to] = value
        return Out(values["out"], after, aux)

    @torch.no_grad()
    def measures(self) -> list[str]:
        """The names of what its modules measure, those in `aux`: found by running one token."""
        weight = next(self.parameters())
        token = weight.new_zeros(1, 1, self.dim_in) if self.dim_in else weight.new_zeros(1, 1).long()
        return list(self(token).aux)

    def _join(self, step: ConnectionConfig, values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What a connection's sources make, and what a mixture measures."""
        sources = [values[source] for source in step.source]
        if step.by == "gate":
            return getattr(self, f"{step.to}_gate")(*sources), {}
        if step.by == "moe":
            by = torch.cat(sources, -1) if step.input is None else values[step.input]
            mixed, measured = getattr(self, f"{step.to}_router")(by, sources)
            return mixed, {f"{step.to}_router.{name}": value for name, value in measured.items()}
        if step.by == "concat":
            return torch.cat(sources, -1), {}
        return sources[0] if len(sources) == 1 else torch.stack(sources).sum(0), {}

    def _meet(self, dims: dict[str, int | None]) -> None:
        """Follows the dims through the graph, and makes the gates, whose dim is known only now."""
        for step in self.steps:
            sources = {source: dims[source] for source in step.source}
            known = {source: dim for source, dim in sources.items() if dim is not None}
            joined = " + ".join(f"{source} ({dims[source]})" for source in step.source)
            if step.by in ("sum", "gate", "moe") and len(set(known.values())) > 1:
                raise (step.where / "from").error(f"cannot {step.by} {joined}: the dims differ")
            dim = next(iter(known.values()), None)
            if step.by == "concat":
                dim = sum(known[source] for source in step.source) if len(known) == len(sources) else None
            if step.by == "gate":
                if len(step.source) != 2 or dim is None:
                    raise (step.where / "by").error(f"gate takes two sources of a known dim, not {joined}")
                self._add(step, "gate", Gate(dim))
            if step.by == "moe":
                by = dims[step.input] if step.input else sum(known.values())
                if dim is None or not by or len(known) < len(sources):
                    gated = f", gated by {step.input} ({by})" if step.input else ""
                    raise (step.where / "by").error(
                        f"moe takes sources and an input of known dims, not {joined}{gated}"
                    )
                self._add(step, "router", Mixture(by, step.source, step.k))
            if step.to in self.names:
                module = getattr(self, step.to)
                wanted = getattr(module, "dim_in", None)
                if wanted is not None and dim is not None and wanted != dim:
                    raise (step.where / "to").error(f"{joined} has dim {dim}, and {step.to!r} takes {wanted}")
                if wanted is not None and step.source == ["in"]:
                    dims["in"] = self.dim_in = wanted  # unknown until now: what is fed decides
                dim = getattr(module, "dim_out", dim)
            dims[step.to] = dim
        self.dims, self.dim_out = dims, dims["out"]

    def _add(self, step: ConnectionConfig, part: str, module: nn.Module) -> None:
        """A part of a connection, as a module of the network: named after where it leads."""
        if (name := f"{step.to}_{part}") in self.names:
            raise (step.where / "to").error(f"the {part} of {step.to!r} is called {name!r}, and so is a module")
        self.add_module(name, module)


class Repeat(Stateful):
    """Copies of a network one after the other, named by number, each with its own weights and state."""

    def __init__(self, networks: Sequence[Network]) -> None:
        super().__init__()
        for index, network in enumerate(networks):
            self.add_module(str(index), network)
        self.count = len(networks)
        self.dim_in, self.dim_out = networks[0].dim_in, networks[-1].dim_out

    def init_state(self, batch: int) -> State:
        """The copies' states, by number."""
        return {str(index): getattr(self, str(index)).init_state(batch) for index in range(self.count)}

    def reset_state(self, state: State, rows: Bool[Tensor, "batch"] | None = None) -> State:
        """Each copy's own reset."""
        return {index: getattr(self, index).reset_state(part, rows) for index, part in state.items()}

    def forward(self, x: Shaped[Tensor, "batch time *dims"], state: State | None = None) -> Out:
        """The copies, one after the other."""
        after, aux = {}, {}
        for index in map(str, range(self.count)):
            x, after[index], measured = getattr(self, index)(x, None if state is None else state[index])
            aux.update({f"{index}.{key}": item for key, item in measured.items()})
        return Out(x, after, aux)


Repeats = Annotated[int, Range(low=1, high=1000)]


@MODULES.register("network")
def _nested(modules: dict[str, Any], connections: list[Any], repeat: Repeats | None = None) -> nn.Module:
    """A graph within a graph; `repeat` copies of it, one after the other. Built by `build`, which knows its place."""
    raise NotImplementedError


class _Builder:
    """Builds modules top down; a memory's path decides which token levels it has."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.levels = token_levels(config)

    def network(self, graph: NetworkConfig, path: str) -> Network:
        modules: dict[str, nn.Module] = {}
        for name, options in graph.modules.items():
            where = graph.where.at("modules", name)
            if hasattr(Network, name) or name in TAKEN:
                raise where.error(f"{name!r} is a name that torch modules use; choose another")
            modules[name] = self.module(dict(options), where, f"{path}{name}")
        return Network(modules, graph.connections)

    def module(self, options: dict[str, Any], where: Where, path: str) -> nn.Module:
        kind = options.pop("kind")
        if kind != "network":
            levels = self.levels_at(path)
            if not levels and MODULES.needs(kind, "levels"):
                groups = self.config.hierarchy.groups
                globs = [glob for level, _ in self.levels for group in level.groups for glob in groups[group].match]
                raise where.error(
                    f"no token level names the weights of this memory, {path}.init.*; "
                    f"the globs of the token levels are {', '.join(dict.fromkeys(globs)) or 'none'}"
                )

            def nested(keys: tuple[str, ...], entry: dict[str, Any]) -> nn.Module:
                return self.module(entry, where.at(*keys), ".".join((path, *keys)))

            return MODULES.build(kind, options, where, nested, levels=levels, router=self.router_at(path))
        options = MODULES.check(kind, options, where)
        graph, repeat = network_config(options, where), options.get("repeat")
        if repeat is None:
            return self.network(graph, f"{path}.")
        copies = [self.network(graph, f"{path}.{index}.") for index in range(repeat)]
        ends = copies[0].dim_in, copies[0].dim_out
        if repeat > 1 and None not in ends and ends[0] != ends[1]:
            raise (where / "repeat").error(f"a copy gives dim {ends[1]}, and the next takes {ends[0]}")
        return Repeat(copies)

    def levels_at(self, path: str) -> list[TokenLevel]:
        """The token levels with a group that matches the initial weights of a memory at this path."""
        return [level for config, level in self.levels if self._match(config.groups, path)]

    def router_at(self, path: str) -> RouterConfig | None:
        """The router, where the initial weights of a memory at this path are in the groups that it is over."""
        router = self.config.hierarchy.router
        return router if router is None or router.over is None or self._match(router.over, path) else None

    def _match(self, groups: Iterable[str], path: str) -> bool:
        known = self.config.hierarchy.groups
        return any(matches(glob, f"{path}.init.0") for group in groups for glob in known[group].match)


def _ordered(connections: Sequence[ConnectionConfig]) -> list[ConnectionConfig]:
    """Connections in an order in which every source is there (Kahn); a ConfigError that prints the cycle if none is."""
    ordered: list[ConnectionConfig] = []
    there, left = {"in"}, list(connections)
    while left:
        ready = [step for step in left if there.issuperset(step.needs)]
        if not ready:
            raise left[0].where.error(f"the connections form a cycle: {_cycle(left)}")
        ordered += ready
        there |= {step.to for step in ready}
        left = [step for step in left if step not in ready]
    return ordered


def _cycle(left: Sequence[ConnectionConfig]) -> str:
    """One cycle among connections that all wait for one another, as `a -> b -> a`."""
    waits = {
        step.to: next(source for source in step.needs if any(source == other.to for other in left)) for step in left
    }
    path = [left[0].to]
    while waits[path[-1]] not in path:
        path.append(waits[path[-1]])
    start = path.index(waits[path[-1]])
    return " -> ".join(reversed([*path[start:], path[start]]))
