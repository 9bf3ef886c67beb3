"""Task `graph`: read the edges of a graph, then walk the shortest path between two of its nodes (Graves et al. 2016,
Hybrid computing using a neural network with dynamic external memory, figure 2).

    inputs    u_1 v_1  u_2 v_2  …  u_E v_E   ?  s t  ·   ·   …       tokens: labels of nodes, `?`, `·`
    targets                                         p_1 p_2 … t      the path's nodes after s, once t was read

A graph is random and connected, its edges undirected and each told once, in random order; its nodes have random labels,
new in every episode. Of two nodes asked, one path is shorter than all others. Evaluated too on pieces of a real map,
the London Underground (`metamem.tasks.metro`): a station and the nearest to it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from metamem.registry import TASKS
from metamem.targets import IGNORE
from metamem.tasks import metro
from metamem.tasks.episodic import Episodes, Episodic, check_length, check_range, pad, shuffler
from metamem.tasks.text import TaskError

Neighbours = Sequence[Sequence[int]]


@TASKS.register("graph")
class Graph(Episodic):
    """Shortest paths.

    Args:
        nodes: the fewest and the most nodes of a training graph, at least 2.
        extra: edges beyond those of a tree.
        labels: that nodes can have.
        tested: numbers of nodes of random graphs that are evaluated besides the most of training.
        stations: numbers of stations of the pieces of the real map that are evaluated.
        examples: episodes of the evaluation set, for each of them.
        seed: of the evaluation set, which is the same for all models and at all times.

    Raises `TaskError` for settings that cannot be, and where a sequence is too short for the longest episode.
    """

    def __init__(
        self,
        *,
        nodes: tuple[int, int] = (4, 7),
        extra: int = 2,
        labels: int = 16,
        tested: tuple[int, ...] = (10,),
        stations: tuple[int, ...] = (6, 8),
        examples: int = 128,
        seed: int = 0,
    ) -> None:
        self.fewest, self.most = check_range("nodes", nodes, least=2)
        sizes = dict.fromkeys((self.most, *tested))
        if extra < 0 or min((2, *sizes, *stations)) < 2 or max((*sizes, *stations)) > labels:
            raise TaskError(
                f"graphs have from 2 nodes to as many as there are labels, and extra is at least 0, not "
                f"{[*sizes, *stations]}, {labels} and {extra}"
            )
        if max((0, *stations)) > len(metro.STATIONS):
            raise TaskError(f"the map has {len(metro.STATIONS)} stations, not {max(stations)}")
        settings = {f"nodes-{n}": ("random", n) for n in sizes} | {f"metro-{n}": ("metro", n) for n in stations}
        super().__init__(settings, examples, seed)
        self.extra, self.labels, self.vocabulary = extra, labels, labels + 2

    def sample(self, generator: torch.Generator, batch: int, length: int) -> Episodes:
        """`batch` episodes, each of its own number of nodes."""
        edges = _edges_at_most(self.most, self.extra)
        check_length(2 * edges + 1 + self.most, length, f"a path through a graph of {self.most} nodes")
        numbers = shuffler(generator)
        graphs = [random_graph(numbers, numbers.randint(self.fewest, self.most), self.extra) for _ in range(batch)]
        return self._lay_out(numbers, graphs, length)

    def episodes(self, generator: torch.Generator, batch: int, setting: tuple[str, int]) -> Episodes:
        """`batch` episodes on random graphs, or pieces of the map, of one number of nodes."""
        (source, size), numbers = setting, shuffler(generator)
        if source == "random":
            return self._lay_out(numbers, [random_graph(numbers, size, self.extra) for _ in range(batch)])
        whole = metro.neighbours()
        return self._lay_out(numbers, [piece(numbers, whole, size) for _ in range(batch)])

    def _lay_out(self, numbers: random.Random, graphs: Sequence[Neighbours], length: int = 0) -> Episodes:
        rows = [self._episode(numbers, graph) for graph in graphs]
        length = max(length, *(len(tokens) for tokens, _ in rows))
        inputs = torch.cat([pad(torch.tensor([tokens]), length, self.labels + 1) for tokens, _ in rows])
        return inputs, torch.cat([pad(torch.tensor([targets]), length, IGNORE) for _, targets in rows])

    def _episode(self, numbers: random.Random, graph: Neighbours) -> tuple[list[int], list[int]]:
        names = numbers.sample(range(self.labels), len(graph))
        edges = [[one, other] for one, near in enumerate(graph) for other in near if one < other]
        numbers.shuffle(edges)
        for edge in edges:
            numbers.shuffle(edge)
        path = [names[node] for node in question(numbers, graph)]
        told = [names[node] for edge in edges for node in edge]
        tokens = [*told, self.labels, path[0], path[-1], *[self.labels + 1] * (len(path) - 2)]
        return tokens, [*[IGNORE] * (len(told) + 2), *path[1:]]

    def describe(self) -> str:
        """What an episode holds and what is evaluated; one line each."""
        settings = ", ".join(self.settings)
        return (
            f"train: connected graphs of {self.fewest} to {self.most} nodes and {self.extra} edges more than a tree, "
            f"labels of {self.labels}; then a shortest path\n"
            f"evaluation: {self.examples} episodes each of {settings}, seed {self.seed}"
        )


def random_graph(numbers: random.Random, size: int, extra: int) -> list[list[int]]:
    """The neighbours of each node of a random tree with up to `extra` edges more, as far as there is room."""
    tree = [(numbers.randrange(node), node) for node in range(1, size)]
    others = [(one, other) for other in range(size) for one in range(other) if (one, other) not in tree]
    found: list[list[int]] = [[] for _ in range(size)]
    for one, other in [*tree, *numbers.sample(others, min(extra, len(others)))]:
        found[one].append(other)
        found[other].append(one)
    return found


def piece(numbers: random.Random, graph: Neighbours, size: int) -> list[list[int]]:
    """A random node, those nearest to it (of equally near ones, random ones), and the edges between them."""
    nodes = [numbers.randrange(len(graph))]
    border = set(graph[nodes[0]])
    while len(nodes) < size:
        ring = sorted(border)
        numbers.shuffle(ring)
        nodes += ring[: size - len(nodes)]
        border = {near for node in ring for near in graph[node]} - {*nodes}
    place = {node: index for index, node in enumerate(nodes)}
    return [[place[near] for near in graph[node] if near in place] for node in nodes]


def question(numbers: random.Random, graph: Neighbours) -> list[int]:
    """A path that is shorter than all others between its ends: all lengths that there are, alike."""
    paths: dict[int, list[list[int]]] = {}
    for start in range(len(graph)):
        for path in unique_paths(graph, start):
            paths.setdefault(len(path), []).append(path)
    return numbers.choice(paths[numbers.choice(sorted(paths))])


def unique_paths(graph: Neighbours, start: int) -> list[list[int]]:
    """The shortest path from `start` to each other node to which there is but one."""
    distance, came_from, ways, reached = {start: 0}, {start: start}, {start: 1}, [start]
    for node in reached:  # grows as it is read: breadth first
        for near in graph[node]:
            if near not in distance:
                distance[near], came_from[near], ways[near] = distance[node] + 1, node, 0
                reached.append(near)
            if distance[near] == distance[node] + 1:
                ways[near] += ways[node]
    found = []
    for node in reached[1:]:
        if ways[node] == 1:
            path = [node]
            while path[-1] != start:
                path.append(came_from[path[-1]])
            found.append(path[::-1])
    return found


def _edges_at_most(nodes: int, extra: int) -> int:
    return min(nodes - 1 + extra, nodes * (nodes - 1) // 2)
