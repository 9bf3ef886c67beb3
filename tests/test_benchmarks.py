"""Benchmarks measure what they say, of every preset that there is; how fast it is no test asks."""

import pytest
import torch
from scripts import script


@pytest.fixture
def rules(monkeypatch):
    yield from script("benchmarks/rules", monkeypatch)


@pytest.fixture
def slots(monkeypatch):
    yield from script("benchmarks/slots", monkeypatch)


def test_every_preset_is_measured_or_said_not_to_be(rules):
    there = {path.stem for path in (rules.CONFIGS / "memory").glob("*.yaml")}
    measured = {name for name, _, _ in rules.contenders(rules.LENGTHS, smoke=False)} - {"projections", "attention"}
    assert measured | (set(rules.NOT_MEASURED) & there) == there
    assert set(rules.LINEAR) <= measured and set(rules.BOUNDS) <= measured and set(rules.OVERRIDES) <= measured


def test_a_measurement_has_seconds_memory_and_the_size_of_the_state(rules):
    found = rules.measure("delta_net", 64, compiled=False, repeats=1)
    assert set(found) == {"first", "forward", "forward+backward", "peak", "state"}
    assert min(found["forward"], found["forward+backward"], found["peak"]) >= 0
    assert found["state"] == 8 + 4 * rules.HEADS * (rules.WIDTH // rules.HEADS) ** 2  # the position, and Δ
    assert rules.measure("projections", 64, compiled=False, repeats=1).keys() == set(found) - {"state"}


def test_the_longest_call_is_timed_in_turn_with_the_shortest_and_all_that_it_writes_counts(rules, monkeypatch):
    monkeypatch.setattr(rules, "LENGTHS", (16, 64))
    assert rules.measure("lact", 64, compiled=False, repeats=1)["growth"] > 0
    memory = rules.memory("lact", compiled=False)  # one chunk: what it writes no token reads
    rules.learn(memory, torch.randn(1, 16, rules.WIDTH))
    gradient = memory.writer.values.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


@pytest.mark.parametrize("full", [False, True])
def test_a_step_of_sam_is_measured_beside_its_state(slots, full):
    found = slots.measure_sam(1024, full, rounds=1)
    assert found["seconds"] > 0 and found["peak"] >= 0
    words = slots.SAM_BATCH * 1024 * (slots.WORD + 1) * 4  # and when each was last used
    assert words < found["state"] * 2**20 < 1.1 * words


def test_contenders_have_the_sizes_of_the_peer(slots):
    cell = slots.ours(4, compiled=False)
    options = cell.memories["memory"].options
    assert (options.slots, options.word, options.read_heads) == (32, 16, 4)
    assert (cell.dim_in, cell.controller.dim_out, cell.controller.dim_in) == (8, 128, 8 + 4 * 16)
    slots.training_step(cell, torch.randn(2, 3, 8))()
    assert all(parameter.grad is not None for parameter in cell.parameters())
