"""What a network consists of, as nested graphs: nodes, and edges with the widths of what passes along them.

`inside` says what is in a module; a kind of module that holds others registers its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

from torch import nn

from metamem.memory.cell import MemoryCell
from metamem.memory.context import MemoryAsContext
from metamem.memory.gated_residual import GatedResidual
from metamem.memory.persistent_tokens import PersistentTokens
from metamem.network import Network, Repeat

SIGNS = {"sum": "+", "gate": "gate", "concat": "concat", "moe": "mixture", "feed": ""}


@dataclass(frozen=True)
class Edge:
    """What goes from a node to another, and how wide it is; `back`: at the next token."""

    source: str
    target: str
    dim: int | None = None
    back: bool = False


@dataclass
class Graph:
    """A module: what it is called, what it is, and what is inside. A node without a name is a junction."""

    name: str
    kind: str
    nodes: dict[str, Graph] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)

    def add(self, key: str, node: Graph) -> str:
        """A node of this graph."""
        self.nodes[key] = node
        return key

    def link(self, source: str, target: str, dim: int | None = None, back: bool = False) -> None:
        """An edge of this graph."""
        self.edges.append(Edge(source, target, dim, back))


def graph_of(name: str, module: nn.Module) -> Graph:
    """The graph of a module."""
    return inside(module, Graph(name, type(module).__name__))


@singledispatch
def inside(module: Any, drawn: Graph) -> Graph:
    """`drawn` with what is inside of the module; of most nothing is shown."""
    return drawn


@inside.register
def _(module: Network, drawn: Graph) -> Graph:
    ends(drawn)
    for name in module.names:
        drawn.add(name, graph_of(name, getattr(module, name)))
    for step in module.steps:
        target = step.to
        if len(step.needs) > 1:
            sign = SIGNS[step.by]
            target = drawn.add(f"{step.to} {step.by}", Graph("" if step.to in drawn.nodes else step.to, sign))
            if step.to in drawn.nodes:
                drawn.link(target, step.to, _joined(step, module.dims))
            else:
                drawn.nodes[step.to] = drawn.nodes.pop(target)
                target = step.to
        elif step.to not in drawn.nodes:
            drawn.add(step.to, Graph(step.to, ""))
        for source in step.needs:
            drawn.link(source, target, module.dims[source])
    return drawn


def _joined(step: Any, dims: dict[str, int | None]) -> int | None:
    widths = [dims[source] for source in step.source]
    known = [width for width in widths if width is not None]
    if step.by == "concat":
        return sum(known) if len(known) == len(widths) else None
    return known[0] if known else None


@inside.register
def _(module: Repeat, drawn: Graph) -> Graph:
    drawn.kind = f"{module.count} copies, one after the other"
    first = getattr(module, "0")
    assert isinstance(first, Network)
    return inside(first, drawn)


@inside.register
def _(module: MemoryCell, drawn: Graph) -> Graph:
    ends(drawn)
    read, controller = sum(module.reads.values()), module.controller
    drawn.add("given", Graph("", "concat" if isinstance(module.input, nn.Identity) else "concat, linear"))
    drawn.add("controller", graph_of("controller", controller))
    drawn.add("answer", Graph("", "concat" if isinstance(module.output, nn.Identity) else "concat, linear"))
    drawn.link("in", "given", module.dim_in)
    drawn.link("given", "controller", controller.dim_in)
    drawn.link("controller", "answer", controller.dim_out)
    for name, memory in module.memories.items():
        key = drawn.add(f"memories.{name}", graph_of(name, memory))
        drawn.link("controller", key, controller.dim_out)
        drawn.link(key, "answer", module.reads[name])
    drawn.link("answer", "given", read, back=True)
    drawn.link("answer", "out", module.dim_out)
    return drawn


@inside.register
def _(module: GatedResidual, drawn: Graph) -> Graph:
    ends(drawn)
    drawn.add("memory", graph_of("memory", module.memory))
    drawn.add("gate", Graph("", "gate"))
    for source, target in (("in", "memory"), ("in", "gate"), ("memory", "gate"), ("gate", "out")):
        drawn.link(source, target, module.dim_in)
    return drawn


@inside.register(PersistentTokens)
@inside.register(MemoryAsContext)
def _(module: Any, drawn: Graph) -> Graph:
    ends(drawn)
    drawn.add("memory", graph_of("memory", module.memory))
    drawn.link("in", "memory", module.dim_in)
    drawn.link("memory", "out", module.dim_out)
    return drawn


def ends(drawn: Graph) -> None:
    """What goes in and comes out."""
    drawn.add("in", Graph("in", ""))
    drawn.add("out", Graph("out", ""))
