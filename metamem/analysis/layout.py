"""Layout of a directed graph in layers, from top to bottom, as pure geometry (after Sugiyama, Tagawa and Toda 1981).

1. A node's layer is the longest path that leads to it.
2. An edge over several layers passes each through a place of its own, so that it crosses no node.
3. Layers are ordered by the mean place of neighbours, swept down and up; the order with the fewest crossings is kept.
4. In its layer a node comes as near to its neighbours as those beside it let it: an isotonic regression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Node = str
Edge = tuple[Node, Node]
Pass = tuple[Node, Node, int]  # where an edge passes a layer: its ends, and the layer
Place = Node | Pass
SWEEPS, SETTLING = 8, 16
PASS_WIDTH = 10.0


@dataclass(frozen=True)
class Box:
    """A rectangle by its centre; y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> float:
        """Its left side."""
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        """Its right side."""
        return self.x + self.width / 2

    @property
    def top(self) -> float:
        """Its upper side."""
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        """Its lower side."""
        return self.y + self.height / 2


@dataclass(frozen=True)
class Layout:
    """Where nodes stand, the boxes that each edge passes between its ends, and upper and lower side of a node's layer,
    in which an edge goes straight down; all from (0, 0) to (width, height)."""

    nodes: dict[Node, Box]
    passes: dict[Edge, list[Box]]
    bands: dict[Node, tuple[float, float]]
    width: float
    height: float


def layout(
    sizes: Mapping[Node, tuple[float, float]], edges: Sequence[Edge], gap_x: float = 24.0, gap_y: float = 34.0
) -> Layout:
    """The layout of nodes of these (width, height) and of edges that form no cycle."""
    layer = layers(sizes, edges)
    places, links = _with_passes(layer, edges)
    rows = _ordered(places, links)
    widths = {place: sizes[place][0] if isinstance(place, str) else PASS_WIDTH for row in rows for place in row}
    x = _across(rows, links, widths, gap_x)
    heights = [max([sizes[place][1] for place in row if isinstance(place, str)], default=0.0) for row in rows]
    tops = [sum(heights[:row]) + gap_y * row for row in range(len(rows))]
    boxes: dict[Place, Box] = {}
    for row, top, height in zip(rows, tops, heights, strict=True):
        for place in row:
            tall = sizes[place][1] if isinstance(place, str) else height
            boxes[place] = Box(x[place], top + height / 2, widths[place], tall)
    left = min(box.left for box in boxes.values())
    boxes = {place: Box(box.x - left, box.y, box.width, box.height) for place, box in boxes.items()}
    return Layout(
        {place: box for place, box in boxes.items() if isinstance(place, str)},
        {(a, b): [boxes[a, b, between] for between in range(layer[a] + 1, layer[b])] for a, b in edges},
        {node: (tops[row], tops[row] + heights[row]) for node, row in layer.items()},
        max(box.right for box in boxes.values()),
        tops[-1] + heights[-1],
    )


def layers(nodes: Mapping[Node, object], edges: Sequence[Edge]) -> dict[Node, int]:
    """The longest path that leads to each node."""
    found = dict.fromkeys(nodes, 0)
    for _ in nodes:
        for source, target in edges:
            found[target] = max(found[target], found[source] + 1)
    return found


def _with_passes(
    layer: Mapping[Node, int], edges: Sequence[Edge]
) -> tuple[list[list[Place]], list[tuple[Place, Place]]]:
    """The places of each layer, and the links of neighbouring layers that edges are made of."""
    rows: list[list[Place]] = [[] for _ in range(max(layer.values()) + 1)]
    for node, row in layer.items():
        rows[row].append(node)
    links: list[tuple[Place, Place]] = []
    for source, target in edges:
        between: list[Place] = [(source, target, row) for row in range(layer[source] + 1, layer[target])]
        for row, place in enumerate(between, start=layer[source] + 1):
            rows[row].append(place)
        links += zip([source, *between], [*between, target], strict=True)
    return rows, links


def _ordered(rows: list[list[Place]], links: Sequence[tuple[Place, Place]]) -> list[list[Place]]:
    """The rows, each in the order that crosses fewest links of all that the sweeps try."""
    above, below = _neighbours(links)
    best, fewest = rows, crossings(rows, links)
    for sweep in range(SWEEPS):
        rows = [list(row) for row in rows]
        near, sequence = (above, range(1, len(rows))) if sweep % 2 == 0 else (below, range(len(rows) - 2, -1, -1))
        for number in sequence:
            at = {place: index for row in rows for index, place in enumerate(row)}
            mean = {
                place: _mean([float(at[other]) for other in near.get(place, [])], at[place]) for place in rows[number]
            }
            rows[number].sort(key=mean.__getitem__)
        if (now := crossings(rows, links)) < fewest:
            best, fewest = rows, now
    return best


def crossings(rows: Sequence[Sequence[Place]], links: Sequence[tuple[Place, Place]]) -> int:
    """How many pairs of links cross."""
    at = {place: (number, index) for number, row in enumerate(rows) for index, place in enumerate(row)}
    ends = [(at[source], at[target][1]) for source, target in links]
    return sum(
        one[0][0] == other[0][0] and (one[0][1] - other[0][1]) * (one[1] - other[1]) < 0
        for index, one in enumerate(ends)
        for other in ends[:index]
    )


def _across(
    rows: Sequence[Sequence[Place]], links: Sequence[tuple[Place, Place]], widths: Mapping[Place, float], gap: float
) -> dict[Place, float]:
    """The x of every place: down and up, each row settles under, then over, its neighbours."""
    above, below = _neighbours(links)
    x: dict[Place, float] = {}
    for row in rows:
        x |= dict(zip(row, _apart([0.0] * len(row), [widths[place] for place in row], gap), strict=True))
    for turn in range(SETTLING):
        near, sequence = (above, rows) if turn % 2 == 0 else (below, rows[::-1])
        for row in sequence:
            wanted = [_mean([x[other] for other in near.get(place, [])], x[place]) for place in row]
            x |= dict(zip(row, _apart(wanted, [widths[place] for place in row], gap), strict=True))
    return x


def _apart(wanted: Sequence[float], widths: Sequence[float], gap: float) -> list[float]:
    """The places nearest to those wanted, in squares, at which boxes in this order stand `gap` apart: less the room
    that those before need, places must not fall, and neighbours that would are pooled (Ayer et al. 1955)."""
    room = [0.0]
    for one, other in pairwise(widths):
        room.append(room[-1] + (one + other) / 2 + gap)
    pools: list[list[float]] = []  # [sum, count]
    for place, needed in zip(wanted, room, strict=True):
        pools.append([place - needed, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    level = [total / count for total, count in pools for _ in range(int(count))]
    return [place + needed for place, needed in zip(level, room, strict=True)]


def _neighbours(links: Sequence[tuple[Place, Place]]) -> tuple[dict[Place, list[Place]], dict[Place, list[Place]]]:
    """Those above and those below each place."""
    above: dict[Place, list[Place]] = {}
    below: dict[Place, list[Place]] = {}
    for source, target in links:
        above.setdefault(target, []).append(source)
        below.setdefault(source, []).append(target)
    return above, below


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
