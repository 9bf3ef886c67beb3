"""Benchmarks measure what they say, of every preset that there is; how fast it is no test asks."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "experiments" / "benchmarks"


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("rules", None)
    import rules

    yield rules
    sys.modules.pop("rules")


def test_every_preset_is_measured_or_said_not_to_be(rules):
    there = {path.stem for path in (rules.CONFIGS / "memory").glob("*.yaml")}
    measured = {name for name, _, _ in rules.contenders(smoke=False)} - {"projections", "attention"}
    assert measured | (set(rules.NOT_MEASURED) & there) == there
    assert set(rules.LINEAR) <= measured and set(rules.BOUNDS) <= measured and set(rules.OVERRIDES) <= measured


def test_a_measurement_has_seconds_memory_and_the_size_of_the_state(rules):
    found = rules.measure("delta_net", 64, compiled=False, repeats=1)
    assert set(found) == {"first", "forward", "forward+backward", "peak", "state"}
    assert min(found["forward"], found["forward+backward"], found["peak"]) >= 0
    assert found["state"] == 8 + 4 * rules.HEADS * (rules.WIDTH // rules.HEADS) ** 2  # the position, and Δ
    assert rules.measure("projections", 64, compiled=False, repeats=1).keys() == set(found) - {"state"}
