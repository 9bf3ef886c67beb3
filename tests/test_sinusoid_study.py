"""The study of sinusoids and the benchmark of engines: cells measure what they say, contenders compute the same."""

import sys
from pathlib import Path

import pytest
import torch

from experiments.sinusoid import CONFIGS, LEARNERS, PUBLISHED, Cell, bayes_optimum, claims, pooled, run_cell
from metamem.episodes.schema import load_episodes

BENCHMARKS = Path(__file__).parent.parent / "experiments" / "benchmarks"


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("engines", None)
    import engines

    yield engines
    sys.modules.pop("engines")


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_cell_is_its_learners_config_at_its_points(learner):
    config = load_episodes(CONFIGS / f"{LEARNERS[learner]}.yaml", Cell(learner, 20, 3, "finn", 7, 11).overrides)
    assert config.task == {"name": "sinusoid", "shots": 20, "query": 10, "frequency": [1.0, 1.0]}
    assert (config.seed, config.training.steps, config.training.evaluated_tasks) == (3, 7, 11)
    assert config.training.evaluated_steps == [0, 1, 5, 10] and config.training.schedule == "cosine"


def test_a_finished_cell_leaves_its_errors_and_curves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = Cell("Meta-SGD", 5, 0, "li", 2, 3)
    assert cell.result() is None
    run_cell(cell)
    found = cell.result()
    assert set(found["updates"]) == {"0", "1", "5", "10"} and found["updates"]["1"]["tasks"] == 3
    assert len(found["curves"]["x"]) == len(found["curves"]["10"][0]) == len(found["curves"]["truth"][1]) == 200
    assert Cell("Meta-SGD", 5, 0, "li", 3, 3).result() is None
    assert [path.suffix for path in cell.path.parent.iterdir()] == [".json"]


def test_seeds_are_pooled_and_claims_compare_with_the_published_means():
    def result(mse):
        return {"updates": {"1": {"mse": mse, "interval": 0.3, "diverged": 1}}}

    assert pooled([result(1.0), result(2.0)], 1) == pytest.approx((1.5, 0.3 / 2**0.5, 2))
    found = {(learner, shots): [result(0.5)] for learner in PUBLISHED for shots in (5, 10, 20)}
    assert [(claim.bound, claim.holds) for claim in claims(found)] == [
        (1.13, True),
        (0.77, True),
        (0.48, False),
        (0.9, True),
        (0.53, True),
        (0.31, False),
    ]
    assert bayes_optimum((5, 20), "li", 3) == {5: 0.0, 20: 0.0}


@pytest.mark.parametrize("order", ["first", "second"])
def test_what_is_compared_computes_the_same(engines, order):
    engines.agree(engines.contenders(3, order))
    wrong = engines.contenders(2, order)
    wrong["functional"] = engines.contenders(3, order)["functional"]
    with pytest.raises(AssertionError, match="functional: "):
        engines.agree(wrong)


def test_memory_is_counted(engines):
    weight = torch.nn.Parameter(torch.ones(256, 1024))
    assert 1.0 <= engines.peak((lambda: (weight.exp() * 2).sum(), [weight])) < 8.0
