"""What the soak and the study of adaptation measure, on numbers written down."""

import numpy as np
import pytest
import torch
from scripts import script

from metamem import Session, build, load_config


@pytest.fixture
def soak(monkeypatch):
    yield from script("soak", monkeypatch)


@pytest.fixture
def study(monkeypatch):
    yield from script("test_time_adaptation", monkeypatch)


def test_the_worst_ratio_is_that_of_the_worst_window(soak):
    generator = np.random.default_rng(0)
    ours, frozen = generator.random((2, 300)) + 0.5
    expected = max(ours[at : at + 70].sum() / frozen[at : at + 70].sum() for at in range(231))
    assert soak.worst(ours, frozen, 70) == pytest.approx(expected)


def test_the_hostile_stream_is_what_it_says(soak):
    clean = torch.arange(100, 200, dtype=torch.uint8).repeat(200)
    code = torch.full((20_000,), 50, dtype=torch.uint8)
    parts = soak.hostile_stream(clean, code, 4000, seed=0)
    assert {name: len(text) for name, text in parts.items()} == dict.fromkeys(parts, 4000)
    assert parts["repeated"].unique().numel() == 1 and parts["random"].unique().numel() == 256
    broken = torch.isin(parts["not finite"], torch.tensor(list(soak.SILENT), dtype=torch.uint8))
    assert int(broken.sum()) == 40
    assert torch.equal(parts["not finite"][~broken], clean[:4000][~broken])
    fifties = parts["alternating"].view(-1, 50)
    assert (fifties[1::2] == 50).all() and torch.equal(fifties[::2].flatten(), clean[4000:6000])


def test_a_session_is_back_where_its_mean_is(soak):
    ratios = np.concatenate([np.full(3000, 1.5), np.full(5000, 0.9)])
    assert soak._back(ratios, 1.0, window=100) == pytest.approx(3000 - 100 / 6, abs=2)
    assert soak._back(ratios, 0.5) == 8000


def test_half_of_a_gain_is_where_it_is_first_there(study):
    gain = np.concatenate([np.zeros(10_000), np.full(30_000, 0.4)])
    assert study.half_of_gain(gain) == pytest.approx(10_000, abs=2)
    assert study.half_of_gain(-gain) is None


def test_equal_bytes_are_equal(study):
    overrides = ("vars.dim=16",)
    window = study.equal_window(overrides)
    light = load_config(study.CONFIGS / "quickstart_light.yaml", overrides)
    attention = load_config(study.CONFIGS / "quickstart_memoryless.yaml", [*overrides, f"vars.window={window}"])
    wanted = Session(build(light), light).state_bytes
    cache = build(attention).init_state(1)
    have = sum(
        part[key].numel() * 4
        for block in cache["blocks"].values()
        for part in [block["attention"]]
        for key in part
        if key != "count"
    )
    assert 0.99 * wanted < have <= wanted


def test_the_streams_shift_where_they_say(study):
    found = study.streams(400)
    assert list(found) == ["kjv", "tyn", "wyc", "python", "home", "stayed"]
    for name, stream in found.items():
        assert stream.shift == 200 and stream.end == len(stream.text) == {"home": 1000, "stayed": 600}.get(name, 600)
    assert torch.equal(found["home"].text[600:], found["stayed"].text[200:])
    assert not torch.equal(found["tyn"].text[200:], found["kjv"].text[200:])
