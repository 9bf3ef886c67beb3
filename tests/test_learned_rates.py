"""Learned rates of inner levels, at every granularity: which number a rate moves, and its outer gradient."""

import pytest
import torch
from config_example import error_of
from small_models import close, inner_level, recurrent, shaken, tiny

from losses.outer import next_token
from metamem import InnerLoop, Session, build, inner_levels
from metamem.hierarchy.inner import InnerState

pytestmark = pytest.mark.usefixtures("float64")
VOCABULARY, TIME = 7, 9
PER = ("level", "group", "tensor", "row", "element")
# The level moves mlp.up [6, 6], mlp.down [6, 6], norm [6] and head [7, 6].
SIZES = {"level": 1, "group": 2, "tensor": 4, "row": 6 + 6 + 6 + 7, "element": 36 + 36 + 6 + 42}


def learning(make=tiny, **settings):
    options = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return make(inner_level(groups="[middle, ends]", optimizer=f"{{name: sgd, lr: learned, {options}}}"))


def loop_of(config, vector=None):
    model = shaken(config)
    if vector is not None:
        with torch.no_grad():
            model.get_parameter("inner_rates.stream").copy_(vector)
    return InnerLoop(model, inner_levels(config, model))


@pytest.mark.parametrize("sign", ["positive", "any"])
@pytest.mark.parametrize("per", PER)
def test_each_number_moves_by_the_rate_that_its_place_says(per, sign):
    """The level's step on a gradient, against an index of every number's rate, written out."""
    vector = torch.randn(SIZES[per])
    loop = loop_of(learning(lr_per=per, lr_sign=sign), vector)
    level = loop.levels[0]
    assert level.members == ("mlp.up.weight", "mlp.down.weight", "norm.weight", "head.weight")
    values = [loop.network.get_parameter(name) for name in level.members]
    gradients = [torch.randn_like(value) for value in values]
    moved = loop.apply(level, loop.init()["stream"], gradients)
    row, element = 0, 0
    for tensor, (name, value, gradient) in enumerate(zip(level.members, values, gradients, strict=True)):
        expected = value.detach().clone()
        for index in torch.cartesian_prod(*map(torch.arange, value.shape)).reshape(-1, value.ndim).tolist():
            at = {
                "level": 0,
                "group": 0 if tensor < 3 else 1,
                "tensor": tensor,
                "row": row + index[0],
                "element": element,
            }[per]
            rate = vector[at].exp() if sign == "positive" else vector[at]
            expected[tuple(index)] -= rate * gradient[tuple(index)]
            element += 1
        row += value.shape[0]
        torch.testing.assert_close(moved.fast[name], expected)


@pytest.mark.parametrize("sign", ["positive", "any"])
@pytest.mark.parametrize("per", PER)
def test_the_outer_gradient_of_a_rate_is_that_of_finite_differences(per, sign):
    config = learning(recurrent, lr_per=per, lr_sign=sign, momentum=0.5)
    loop = loop_of(config)
    rates = loop.network.get_parameter("inner_rates.stream")
    with torch.no_grad():
        rates += 0.3 * torch.randn_like(rates)
    inputs, targets = torch.randint(VOCABULARY, (2, 3, TIME))

    def outer():
        return next_token(loop.run(inputs, targets).y, targets).mean()

    slope = torch.autograd.grad(outer(), rates)[0]
    assert slope.shape == (SIZES[per],) and slope.abs().max() > 0
    directions = [*torch.eye(len(slope))[: min(len(slope), 3)], torch.randn_like(slope)]
    for direction in directions:
        values = []
        for step in (1e-6, -2e-6, 1e-6):
            with torch.no_grad():
                rates += step * direction
                values.append(outer().item())
        assert (slope @ direction).item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("per", PER)
def test_rates_of_one_value_are_one_rate(per):
    fixed = tiny(inner_level(groups="[middle, ends]", optimizer="{name: sgd, lr: 0.2, momentum: 0.5}"))
    config = learning(lr_per=per, lr_initial=0.2, momentum=0.5)
    inputs, targets = torch.randint(VOCABULARY, (2, 3, TIME))
    plain = shaken(fixed)
    model = build(config)
    assert model.get_parameter("inner_rates.stream").shape == (SIZES[per],)
    model.load_state_dict(plain.state_dict(), strict=False)
    ours, theirs = (
        InnerLoop(m, inner_levels(c, m)).run(inputs, targets).y for m, c in ((model, config), (plain, fixed))
    )
    close({"y": ours}, {"y": theirs})


def test_a_rate_of_any_sign_can_climb():
    config = learning(lr_sign="any")
    loop = loop_of(config, torch.tensor([-0.5, 0.0, 0.5, 0.5]))
    level, state = loop.levels[0], loop.init()["stream"]
    moved = loop.apply(level, state, [torch.ones_like(value) for value in state.fast.values()])
    change = [(moved.fast[name] - state.fast[name]).mean().item() for name in level.members]
    assert change == pytest.approx([0.5, 0.0, -0.5, -0.5])


def test_a_tensor_of_two_groups_has_the_rate_of_the_first():
    text = inner_level(groups="[ends, all]", optimizer="{name: sgd, lr: learned, lr_per: group}")
    loop = loop_of(tiny(text), torch.tensor([0.0, -50.0]))
    level, state = loop.levels[0], loop.init()["stream"]
    moved: InnerState = loop.apply(level, state, [torch.ones_like(value) for value in state.fast.values()])
    changed = {name for name in level.members if not torch.allclose(moved.fast[name], state.fast[name], atol=1e-9)}
    assert changed == {"head.weight"} and level.members[0] == "embed.weight"


def test_a_session_moves_by_the_rates_that_were_learned():
    config = learning(lr_per="element", lr_sign="any")
    loop = loop_of(config, 0.3 * torch.randn(SIZES["element"]))
    session, tokens = Session(loop.network, config), torch.randint(VOCABULARY, (1, 2))
    session.observe(tokens)
    y = loop.network(tokens[:, :1]).y
    names = loop.levels[0].members
    slopes = torch.autograd.grad(next_token(y, tokens[:, 1:]).sum() / 2, [loop.network.get_parameter(n) for n in names])
    rates = loop.rates(loop.levels[0])
    for name, slope, rate in zip(names, slopes, rates, strict=True):
        expected = loop.network.get_parameter(name) - rate * slope
        torch.testing.assert_close(session.inner["stream"].fast[name], expected)


@pytest.mark.parametrize("setting", ["lr_per: row", "lr_sign: any", "lr_initial: 0.5"])
def test_what_is_of_a_learned_rate_is_refused_where_it_is_a_number(setting):
    key = setting.split(":")[0]
    text = error_of(lambda: tiny(inner_level(optimizer=f"{{name: sgd, lr: 0.1, {setting}}}")))
    assert f"(stream).optimizer.{key}: is of a learned rate, and lr is a number: set lr to learned" in text


def test_a_granularity_that_there_is_not_is_refused():
    text = error_of(lambda: learning(lr_per="elements"))
    assert "optimizer.lr_per: 'elements' is not valid; did you mean 'element'?" in text
