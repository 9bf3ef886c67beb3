"""Drawings of networks: the layout keeps its rules on any graph, a graph is the network that it is of, and the
command writes what it is asked for."""

import re
import xml.etree.ElementTree as xml
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from small_models import CONFIGS
from typer.testing import CliRunner

from metamem import build, load_config
from metamem.analysis.graph_drawing import draw_network, size
from metamem.analysis.layout import _apart, crossings, layers, layout
from metamem.analysis.module_graph import Edge, graph_of
from metamem.cli import app

WIRINGS = sorted(path.stem for path in (CONFIGS / "wiring").glob("*.yaml"))


@st.composite
def graphs(draw):
    """Nodes of any size, and edges that go up in number, and so in no cycle."""
    count = draw(st.integers(1, 8))
    names = [f"n{number}" for number in range(count)]
    sizes = {name: (draw(st.floats(5, 200)), draw(st.floats(5, 200))) for name in names}
    pairs = [(one, other) for index, other in enumerate(names) for one in names[:index]]
    return sizes, draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []


def overlap(one, other, gap=0.0):
    return (
        one.left < other.right + gap - 1e-9
        and other.left < one.right + gap - 1e-9
        and one.top < other.bottom - 1e-9
        and other.top < one.bottom - 1e-9
    )


@settings(max_examples=60)
@given(graphs())
def test_no_box_covers_another_and_no_edge_a_box(graph):
    sizes, edges = graph
    placed = layout(sizes, edges)
    boxes = list(placed.nodes.items())
    for number, (name, one) in enumerate(boxes):
        assert (one.width, one.height) == sizes[name]
        assert one.left >= -1e-9 and one.top >= -1e-9
        assert one.right <= placed.width + 1e-9 and one.bottom <= placed.height + 1e-9
        top, bottom = placed.bands[name]
        assert top - 1e-9 <= one.top and one.bottom <= bottom + 1e-9
        assert not any(overlap(one, other, gap=24) for _, other in boxes[:number])
    passes = [one for edge in edges for one in placed.passes[edge]]
    assert not any(overlap(one, other) for one in passes for other in placed.nodes.values())


@settings(max_examples=60)
@given(graphs())
def test_edges_go_down_a_layer_at_a_time(graph):
    sizes, edges = graph
    placed, found = layout(sizes, edges), layers(sizes, edges)
    for source, target in edges:
        assert found[target] > found[source]
        assert len(placed.passes[source, target]) == found[target] - found[source] - 1
        sides = [placed.bands[source], *((one.top, one.bottom) for one in placed.passes[source, target])]
        sides.append(placed.bands[target])
        assert all(one[1] < other[0] for one, other in pairwise(sides))
    for node in sizes:  # as far up as can be
        above = [found[source] for source, target in edges if target == node]
        assert found[node] == (max(above) + 1 if above else 0)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(1, 20)), min_size=1, max_size=6), st.integers(0, 9))
def test_boxes_stand_apart_and_nowhere_nearer_to_where_they_want_to_be(wanted, gap):
    places, widths = ([float(one) for one in side] for side in zip(*wanted, strict=True))
    found = _apart(places, widths, gap)
    needed = [(a + b) / 2 + gap for a, b in pairwise(widths)]
    assert all(b - a >= room - 1e-9 for a, b, room in zip(found, found[1:], needed, strict=False))

    def far(x):
        return sum((one - want) ** 2 for one, want in zip(x, places, strict=True))

    generator = torch.Generator().manual_seed(0)
    for _ in range(60):  # no allowed step from it comes nearer: the problem is convex
        moved = (torch.tensor(found, dtype=torch.float64) + torch.randn(len(found), generator=generator)).tolist()
        if all(b - a >= room for a, b, room in zip(moved, moved[1:], needed, strict=False)):
            assert far(moved) >= far(found) - 1e-9


def test_an_order_without_crossings_is_found():
    sizes = dict.fromkeys("abcdxyzw", (10.0, 10.0))
    edges = [("a", "w"), ("b", "z"), ("c", "y"), ("d", "x")]
    placed = layout(sizes, edges)
    order = {name: box.x for name, box in placed.nodes.items()}
    rows = [sorted("abcd", key=order.get), sorted("xyzw", key=order.get)]
    assert crossings(rows, edges) == 0 and crossings([list("abcd"), list("xyzw")], edges) == 6
    assert all(order[one] == pytest.approx(order[other]) for one, other in edges)


# Graphs


def drawn(name, *overrides):
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    return graph_of(config.name, build(config))


def kinds(node):
    """(name, kind) of all nodes, at any depth."""
    yield node.name, node.kind
    for child in node.nodes.values():
        yield from kinds(child)


def test_a_graph_has_the_modules_and_connections_of_its_network():
    graph = drawn("quickstart", "vars.dim=16")
    assert [node.kind for node in graph.nodes.values() if node.kind] == [
        "Embedding",
        "3 copies, one after the other",
        "RMSNorm",
        "Linear",
    ]
    block = graph.nodes["blocks"]
    assert Edge("norm_mix", "convolution", 16) in block.edges and Edge("in", "after_mix", 16) in block.edges
    assert block.nodes["mixed"].kind == "gate" and block.nodes["after_mix"].kind == "+"
    assert Edge("head", "out", 256) in graph.edges and Edge("in", "embed", None) in graph.edges


def test_a_cell_shows_what_goes_back_to_its_controller():
    cell = drawn("wiring/dedicated_and_shared", "vars.dim=16").nodes["cell"]
    assert [edge for edge in cell.edges if edge.back] == [Edge("answer", "given", 48, back=True)]
    inner = cell.nodes["memories.dedicated"].nodes["memory"]
    assert (inner.kind, inner.nodes["memories.slots"].kind) == ("MemoryCell", "DNC")
    assert Edge("answer", "given", 16, back=True) in inner.edges
    gated = cell.nodes["memories.shared"]
    assert {(edge.source, edge.target) for edge in gated.edges} == {
        ("in", "memory"),
        ("in", "gate"),
        ("memory", "gate"),
        ("gate", "out"),
    }


def test_a_concatenation_before_a_module_is_a_node_with_the_sum_of_widths():
    graph = drawn("wiring/concatenated")
    assert graph.nodes["controller concat"].kind == "concat"
    assert Edge("slots", "controller concat", 32) in graph.edges
    assert Edge("controller concat", "controller", 64) in graph.edges


def test_a_mixture_is_fed_by_its_sources_and_by_what_weighs_them():
    graph = drawn("wiring/mixture", "vars.dim=16")
    assert graph.nodes["mixed"].kind == "mixture"
    assert {edge.source for edge in graph.edges if edge.target == "mixed"} == {"weights", "slots", "norm"}


# Drawings


@pytest.mark.parametrize("name", WIRINGS)
def test_every_wiring_is_drawn_with_all_of_its_names_and_widths(name, tmp_path):
    config = load_config(CONFIGS / f"wiring/{name}.yaml")
    network, path = build(config), tmp_path / "graph.svg"
    draw_network(network, config.name, path)
    words = [text.text for text in xml.parse(path).iter("{http://www.w3.org/2000/svg}text")]
    for shown, kind in kinds(graph_of(config.name, network)):
        assert shown in words or kind in words or f"{shown}  {kind}" in words, (shown, kind)
    assert "32" in words
    width, height = size(graph_of(config.name, network))
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', path.read_text())
    assert [float(one) for one in box.groups()] == pytest.approx([width + 28, height + 28], abs=0.1)


def test_a_drawing_is_the_same_every_time(tmp_path):
    network = build(load_config(CONFIGS / "wiring/concatenated.yaml"))
    for name in ("one", "other"):
        draw_network(network, "graph", tmp_path / f"{name}.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()


def check(*arguments):
    return CliRunner().invoke(app, ["check", str(CONFIGS / "algorithmic/sort.yaml"), *map(str, arguments)])


@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_check_draws_what_the_suffix_says(suffix, begins, tmp_path):
    path = tmp_path / "new" / f"graph{suffix}"
    result = check("--graph", path)
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip().endswith(f"the network is drawn in {path}")
    assert path.read_bytes().startswith(begins)


@pytest.mark.parametrize("name", ["graph.jpeg", "graph"])
def test_check_refuses_another_format_before_it_does_anything(name, tmp_path):
    result = check("--graph", tmp_path / name)
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert result.stderr.count("\n") == 1 and "a diagram is .svg, .png or .pdf" in result.stderr


def test_check_refuses_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = check("--graph", tmp_path / "file" / "graph.svg")
    assert result.exit_code == 2 and "cannot be written" in result.stderr
