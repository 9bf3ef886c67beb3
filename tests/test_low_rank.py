"""Low-rank deltas: the model as it was at first, their gradient that of the matrix, moved by a level alone."""

import pytest
import torch
from small_models import inner_level, recurrent, shaken, tiny

from metamem import ConfigError, Session, build
from metamem.config import LowRankConfig
from metamem.low_rank import LowRank, add_low_rank

pytestmark = pytest.mark.usefixtures("float64")
DELTAS = "hierarchy.groups.middle.match=['**.parametrizations.*.0.*']"
LOW_RANK = "adaptation.low_rank={match: ['mlp.*.weight'], rank: 2, scale: 0.5}"


def test_a_delta_is_a_product_of_rank_r():
    delta = LowRank(torch.randn(5, 4), rank=2, scale=0.5)
    weight, b = torch.randn(5, 4), torch.randn(5, 2)
    assert torch.equal(delta(weight), weight), "it starts at nothing"
    with torch.no_grad():
        delta.b.copy_(b)
    torch.testing.assert_close(delta(weight), weight + 0.5 * b @ delta.a)
    assert torch.linalg.matrix_rank(delta(weight) - weight) == 2


def test_deltas_leave_the_model_as_it_was_and_come_once():
    model, tokens = shaken(tiny()), torch.randint(7, (1, 9))
    before = model(tokens).y
    settings = LowRankConfig(["mlp.*.weight"], rank=2)
    assert add_low_rank(model, settings) == ["mlp.up.weight", "mlp.down.weight"]
    assert torch.equal(model(tokens).y, before)
    names = dict(model.named_parameters())
    assert {"mlp.up.parametrizations.weight.original", "mlp.up.parametrizations.weight.0.a"} <= set(names)
    assert add_low_rank(model, settings) == ["mlp.up.weight", "mlp.down.weight"]
    assert set(dict(model.named_parameters())) == set(names)


def test_a_level_moves_deltas_by_their_own_gradient():
    """One step of SGD is dW A and B dW of the matrix's gradient dW, written out."""
    config = recurrent(inner_level(period=8, optimizer="{name: sgd, lr: 0.3}"), LOW_RANK, DELTAS)
    model, tokens = shaken(config), torch.randint(7, (1, 8))
    session = Session(model, config)
    assert len(session.inner["stream"].fast) == 4
    originals = [p for name, p in model.named_parameters() if name.endswith("original")]
    y = model(tokens[:, :-1]).y
    loss = torch.nn.functional.cross_entropy(y[0], tokens[0, 1:], reduction="sum") / 8
    slopes = torch.autograd.grad(loss, originals)
    session.observe(tokens)
    parameters = dict(model.named_parameters())
    for name, slope in zip(("up", "down"), slopes, strict=True):
        a, b = (parameters[f"mlp.{name}.parametrizations.weight.0.{part}"] for part in "ab")
        fast = session.inner["stream"].fast
        torch.testing.assert_close(
            fast[f"mlp.{name}.parametrizations.weight.0.b"], b - 0.3 * 0.5 * slope @ a.mT, rtol=1e-6, atol=1e-9
        )
        torch.testing.assert_close(
            fast[f"mlp.{name}.parametrizations.weight.0.a"], a - 0.3 * 0.5 * b.mT @ slope, rtol=1e-6, atol=1e-9
        )
    assert not torch.equal(session.predict(), Session(model, config, inner=False).predict())


def test_a_config_builds_them_the_same_for_the_same_seed():
    config = tiny(inner_level(), LOW_RANK, DELTAS)
    one, other = (dict(build(config).named_parameters()) for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert len({float(value.detach().flatten()[0]) for name, value in one.items() if name.endswith("0.a")}) == 2


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("mlp.upp.weight", "matches no parameter; the nearest are mlp.up"),
        ("norm.weight", "norm.weight has the shape [6]"),
    ],
)
def test_what_takes_no_delta_is_refused(match, message):
    with pytest.raises(ConfigError) as error:
        build(tiny(inner_level(), f"adaptation.low_rank={{match: [{match}]}}"))
    assert message in str(error.value) and "adaptation.low_rank.match" in str(error.value)
