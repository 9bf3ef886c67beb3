"""Drift: walks have the half-lives and jumps that they should; inputs hold the past; ratios are to the optimum."""

import math

import pytest
import torch
from small_models import CONFIGS

from metamem import Session, UserError, build, build_task, load_config
from metamem.targets import asked
from metamem.tasks import Drift, TaskError
from metamem.tasks.drift import inputs, rank_correlation, walk

SMALL = {"half_lives": (5.0, 50.0, None), "features": 4, "stream": 200, "examples": 3}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("time", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("jumps", [0.0, 0.1])
def test_a_walk_is_its_recurrence(time, jumps):
    decay, steps = torch.tensor([0.5, 0.9, 1.0]).double(), torch.randn(2, time, 3, 4).double()
    redrawn = torch.rand(2, time, 3) < jumps
    w, expected = steps[:, 0], []
    for t in range(time):
        if t:
            drifted = decay[:, None] * w + (1 - decay**2).sqrt()[:, None] * steps[:, t]
            w = torch.where(redrawn[:, t, :, None], steps[:, t], drifted)
        expected.append(w)
    torch.testing.assert_close(walk(steps, decay, redrawn), torch.stack(expected, 1))


def test_weights_have_variance_one_and_lose_half_of_themselves_in_a_half_life():
    half_life, rows = 8, 4000
    weights = walk(torch.randn(rows, 41, 1, 1), 0.5 ** (1 / torch.tensor([8.0])), torch.zeros(rows, 41, 1).bool())
    first, later = weights[:, 20].flatten(), weights[:, 20 + half_life].flatten()
    assert float(later.var()) == pytest.approx(1, abs=0.1)
    assert float((first * later).mean()) == pytest.approx(0.5, abs=0.06)


def test_a_position_sees_its_x_and_the_pair_before_it():
    task = Drift(**SMALL)
    drawn = task.draw(generator(), 2, 9)
    seen = inputs(drawn)
    assert torch.equal(seen[:, :, :4], drawn.x)
    assert torch.equal(seen[:, 1:, 4:8], drawn.x[:, :-1]) and torch.equal(seen[:, 1:, 8:], drawn.y[:, :-1])
    assert (seen[:, 0, 4:] == 0).all()
    assert float((drawn.y - drawn.clean).std()) == pytest.approx(0.5, abs=0.15)


def test_the_first_part_of_a_sequence_is_not_asked():
    seen, targets = Drift(**SMALL, asked_from=0.25).sample(generator(), 2, 12)
    again = Drift(**SMALL, asked_from=0.25).sample(generator(), 2, 12)
    assert asked(targets).tolist() == 2 * [3 * [False] + 9 * [True]]
    assert torch.equal(again[0], seen) and torch.equal(again[1][:, 3:], targets[:, 3:])
    assert seen.isfinite().all() and seen.dtype == targets.dtype == torch.get_default_dtype()


def test_the_optimum_has_ratio_one_and_nothing_predicted_that_of_all_there_is():
    task = Drift(**SMALL)
    best = task.evaluate(lambda seen, targets: task.optimum.predictions)
    rows = {f"ratio/row-{row}": 1.0 for row in range(3)} | {f"excess/row-{row}": 0.0 for row in range(3)}
    assert best == pytest.approx({"ratio": 1.0, "optimum/ratio": 1.0, **rows})
    nothing = task.evaluate(lambda seen, targets: torch.zeros_like(targets))
    second = slice(100, None)
    error = (task.optimum.predictions - task.evaluation.clean)[:, second].square().mean((0, 1))
    whole = task.evaluation.clean[:, second].square().mean((0, 1))
    assert nothing["ratio"] == pytest.approx(float(whole.sum() / error.sum()))
    assert nothing["ratio/row-2"] == pytest.approx(float(whole[2] / error[2]))
    assert sum(nothing[f"excess/row-{row}"] for row in range(3)) == pytest.approx(nothing["ratio"] - 1)


def test_a_model_that_knows_when_the_weights_jump_is_better_than_one_that_does_not():
    task = Drift(**SMALL, jumps=0.05)
    blind = Drift(**SMALL)
    assert task.evaluation.redrawn.float().mean() == pytest.approx(0.05, abs=0.02)
    blind.evaluation = task.evaluation
    assert task.evaluate(lambda seen, targets: blind.optimum.predictions)["ratio"] > 1.2


def test_the_evaluation_is_fixed_by_its_seed():
    one, again, other = Drift(**SMALL), Drift(**SMALL), Drift(**SMALL, seed=1)
    assert torch.equal(one.evaluation.x, again.evaluation.x) and not torch.equal(one.evaluation.x, other.evaluation.x)


def test_the_shipped_memory_with_the_filters_own_gain_is_nearly_the_filter():
    """Of one half-life, with the rate P / σ² of the filter's mean covariance: what is left is P's shape."""
    files = [CONFIGS / "drift.yaml"]
    options = ["task.half_lives=[20]", "task.stream=1500", "task.examples=4", "vars.rows=1", "vars.inputs=33"]
    rule = "hierarchy.levels.regress.rule"
    task = build_task(load_config(files[0], options))
    rate = float(task.optimum.variances[:, 750:].mean()) / 16 / 0.25
    config = load_config(
        files[0], [*options, f"{rule}.forget={1 - 0.5 ** (1 / 20)}", f"{rule}.lr={rate}", f"{rule}.gates=token"]
    )
    model = build(config)
    with torch.no_grad():
        found = task.evaluate(lambda seen, targets: model(seen).y)
    assert 1 < found["ratio"] < 1.12


def test_rank_correlation_is_spearmans():
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2, 2], [1, 2, 3, 4]) == pytest.approx(2 / math.sqrt(5))
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"half_lives": ()}, "half_lives must be numbers above 0, at least one, not []"),
        ({"half_lives": (5.0, 0.0)}, "half_lives must be numbers above 0, at least one, not [5.0, 0.0]"),
        ({"features": 0}, "features and examples must be at least 1 and stream 2, not 0, 4 and 12000"),
        ({"noise": 0.0}, "noise must be above 0, not 0.0"),
        ({"jumps": 1.0}, "jumps must be at least 0 and below 1, not 1.0"),
        ({"asked_from": 1.0}, "asked_from must be at least 0 and below 1, not 1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(TaskError) as error:
        Drift(**options)
    assert str(error.value) == message


def test_no_session_reads_a_model_of_numbers():
    config = load_config(CONFIGS / "drift.yaml")
    with pytest.raises(UserError, match="a session reads tokens, and this model 40 numbers at a time"):
        Session(build(config), config)
