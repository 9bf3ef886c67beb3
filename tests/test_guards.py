"""What a session refuses, each guard for its own reason; how it rests and comes back; the frozen model beside it."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from small_models import inner_level, recurrent, shaken, small_quickstart, tiny

from metamem import Session
from metamem.adaptation.fallback import CALM, FALLS, WINDOW, Standing, mixture
from metamem.adaptation.guards import Period, Running, judge
from metamem.config import AdaptationConfig, FallbackConfig, GuardsConfig
from metamem.hierarchy import InnerState

pytestmark = pytest.mark.usefixtures("float64")
VOCABULARY = 7
NONE = {"explosion": None, "step": None, "drift": None}
BEHIND = "behind the model as trained"


def tokens(count, seed=0):
    return torch.randint(VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def guarded(fallback=None, **guards):
    return AdaptationConfig(guards=GuardsConfig(**{**NONE, **guards}), fallback=fallback)


def session_of(adaptation, lr=0.1, period=4, text=recurrent, **options):
    config = text(inner_level(period=period, optimizer=f"{{name: sgd, lr: {lr}}}"))
    return Session(shaken(config), config, adaptation=adaptation, **options)


# Guards


def judged(guards, change=0.0, drifted=0.0, loss=1.0, estimate=1.0, optimizer=0.0):
    """The verdict on ten weights of 1, `drifted` away each, that move by `change` each."""
    initial = torch.ones(10)
    before = InnerState({"w": initial + drifted}, (torch.zeros(3),), 5)
    after = InnerState({"w": initial + drifted + change}, (torch.full((3,), optimizer),), 6)
    period = Period(4 * loss, 4, Running().after(estimate, 1))
    found = judge(GuardsConfig(**{**NONE, **guards}), period, before, after, [initial])
    return found and found[0]


@pytest.mark.parametrize(
    ("guard", "wrong", "right", "reason"),
    [
        ({"step": 0.1}, {"change": 0.11}, {"change": 0.09, "drifted": 5.0, "loss": 9.0}, "step norm"),
        ({"drift": 0.5}, {"drifted": 0.45, "change": 0.1}, {"drifted": 0.6, "change": -0.2, "loss": 9.0}, "drift"),
        ({"explosion": 2.0}, {"loss": 2.3}, {"loss": 2.1, "change": 5.0, "drifted": 5.0}, "loss explosion"),
        ({}, {"change": math.nan}, {"change": 1e9, "loss": 1e9}, "not finite"),
        ({}, {"change": math.inf}, {"drifted": 1e9}, "not finite"),
        ({}, {"optimizer": math.inf}, {"optimizer": 1e9}, "not finite"),
    ],
)
def test_each_guard_fires_on_what_it_says_and_on_nothing_else(guard, wrong, right, reason):
    assert judged(guard, **wrong) == reason
    assert judged(guard, **right) is None
    assert judged({}, **wrong) == (reason if reason == "not finite" else None), "a guard that is off does not fire"


def test_before_anything_was_seen_no_loss_explodes():
    assert Period(100.0, 1).estimate.mean == math.inf


def test_a_running_mean_is_that_of_exponential_weights():
    values, running = [3.0, 1.0, 4.0, 1.0, 5.0], Running()
    for value in values:
        running = running.after(value, half_life=2)
    weights = [0.5 ** (age / 2) for age in reversed(range(len(values)))]
    assert running.mean == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    assert running.after(math.nan, 2) == running


@pytest.mark.parametrize(
    ("guards", "reason"),
    [({"step": 1e-6}, "step norm"), ({"drift": 1e-6}, "drift"), ({"seconds": 1e-9}, "time")],
)
def test_a_refused_update_is_rolled_back_counted_and_logged(guards, reason, caplog):
    caplog.set_level("INFO", "metamem.adaptation")
    session = session_of(guarded(**guards, patience=None))
    frozen = session_of(guarded(), inner=False)
    stream = tokens(19)
    before = {name: value.clone() for name, value in session.inner["stream"].fast.items()}
    observed = session.observe(stream)
    assert observed.updates == 0 and [refusal.reason for refusal in observed.refused] == [reason] * 4
    assert [refusal.position for refusal in observed.refused] == [4, 8, 12, 16]
    assert all(refusal.level == "stream" and refusal.value > refusal.limit for refusal in observed.refused)
    assert session.report().refused == {reason: 4} and f"level stream: {reason}" in caplog.text
    for name, value in session.inner["stream"].fast.items():
        assert torch.equal(value, before[name])
    assert session.inner["stream"].updates == 0
    expected = torch.cat([frozen.observe(stream[:, at : at + 4]).losses for at in range(0, 19, 4)], 1)
    torch.testing.assert_close(observed.losses, expected, rtol=1e-12, atol=0)


def test_an_explosion_refuses_until_it_has_become_normal():
    session = session_of(guarded(explosion=2.0, half_life=1, patience=None), lr=1e-6)
    session.observe(tokens(8))
    usual = session.periods["stream"].estimate.mean
    session.periods = {"stream": Period(estimate=Running().after(usual / 8, 1))}
    observed = session.observe(tokens(24, seed=1))
    assert [refusal.reason for refusal in observed.refused] == ["loss explosion"] * len(observed.refused)
    assert 1 <= len(observed.refused) <= 3 and observed.updates == 6 - len(observed.refused)


# The watchdog


def test_refusals_in_a_row_bring_rest_at_the_slow_weights_and_twice_as_long_the_next_time():
    session = session_of(guarded(step=0.05, patience=2, rest=8), lr=0.01)
    slow = {name: value.clone() for name, value in session.inner["stream"].fast.items()}
    assert session.observe(tokens(8)).updates == 2
    session.adaptation = guarded(step=1e-9, patience=2, rest=8)
    assert len(session.observe(tokens(8)).refused) == 2
    assert session.resting and session.watchdog.until == 24 and session.report().resting
    assert all(torch.equal(value, slow[name]) for name, value in session.inner["stream"].fast.items())
    observed = session.observe(tokens(8))
    assert observed.updates == 0 and observed.refused == () and not session.resting
    assert len(session.observe(tokens(8)).refused) == 2
    assert session.watchdog.until == 32 + 16
    session.observe(tokens(16))
    session.adaptation = guarded(step=0.05, patience=2, rest=8)
    assert session.observe(tokens(8)).updates == 2, "it comes back"
    assert session.watchdog.rests == 2
    session.observe(tokens(40))
    assert session.watchdog.rests == 0, "and after a long healthy time the rests are forgotten"


def test_one_refusal_between_updates_brings_no_rest():
    session = session_of(guarded(patience=2, rest=8), lr=0.01)
    for seed in range(4):
        session.adaptation = guarded(patience=2, rest=8, step=1e-9 if seed % 2 else None)
        session.observe(tokens(4, seed))
    assert session.refused["step norm"] == 2 and not session.resting


# What is not finite


@pytest.mark.parametrize("inner", [True, False])
def test_a_token_that_breaks_the_model_is_left_out_of_what_it_reads(inner):
    config = recurrent(inner_level(period=4, optimizer="{name: sgd, lr: 1.0e-9}"))
    model = shaken(config)
    with torch.no_grad():
        model.embed.weight[6] = math.nan
    stream = tokens(30) % 6
    stream[0, 11] = 6
    session = Session(model, config, inner=inner, adaptation=guarded())
    observed = session.observe(stream)
    assert observed.losses.isfinite().all() and [refusal.position for refusal in observed.refused] == [12]
    assert observed.refused[0].reason == "input not finite"
    assert float(observed.losses[0, 12]) == pytest.approx(math.log(7))
    without = torch.cat([stream[:, :11], stream[:, 12:]], 1)
    expected = Session(model, config, inner=False).observe(without).losses
    torch.testing.assert_close(observed.losses[:, 13:], expected[:, 12:], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(observed.losses[:, :11], expected[:, :11], rtol=1e-6, atol=1e-8)
    assert session.position == 30


@pytest.mark.parametrize("inner", [True, False])
def test_where_chunks_are_computed_at_once_still_only_that_token_is_left_out(inner):
    """An attention's block and a memory's chunk multiply what is masked by zero, and zero times nan is nan."""
    config = small_quickstart("hierarchy.levels.stream.period=64")
    model = shaken(config)
    with torch.no_grad():
        model.embed.weight[6] = math.nan
    stream = 7 + tokens(300) * 30
    broken = [3, 40, 41, 120, 190, 298]
    stream[0, broken] = 6
    session = Session(model, config, inner=inner, adaptation=guarded())
    observed = session.observe(stream)
    refused = [refusal for refusal in observed.refused if refusal.reason == "input not finite"]
    assert [refusal.position for refusal in refused] == [at + 1 for at in broken]
    assert observed.losses.isfinite().all()


def test_a_whole_stream_of_what_breaks_the_model_is_read_at_chance():
    session = session_of(guarded())
    with torch.no_grad():
        session.model.embed.weight[6] = math.nan
    observed = session.observe(torch.full((1, 40), 6))
    torch.testing.assert_close(observed.losses, torch.full((1, 40), math.log(7)))
    assert session.observe(tokens(40) % 6).losses.isfinite().all()


def test_adapted_weights_that_break_are_put_back():
    session = session_of(guarded())
    session.observe(tokens(8))
    state = session.inner["stream"]
    session.inner["stream"] = state._replace(fast={name: value * math.inf for name, value in state.fast.items()})
    observed = session.observe(tokens(8, seed=1))
    assert observed.losses.isfinite().all()
    assert [refusal.reason for refusal in observed.refused] == ["not finite"]


# The frozen model beside


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([1e-3, 0.05]), st.floats(0.0, 1.0))
def test_a_mixture_is_bayes_rule_with_a_share_and_never_much_worse_than_either(seed, share, worth):
    generator = torch.Generator().manual_seed(seed)
    adapted, frozen = 6 * torch.rand(2, 1, 50, generator=generator, dtype=torch.float64) ** 2
    worth = max(worth, share)
    losses, after = mixture(adapted, frozen, [worth], share)
    w = worth
    for t in range(50):
        both = (1 - w) * math.exp(-adapted[0, t]), w * math.exp(-frozen[0, t])
        assert float(losses[0, t]) == pytest.approx(-math.log(sum(both)), abs=1e-12)
        posterior = both[1] / sum(both)
        w = (1 - share) * posterior + share * (1 - posterior)
    assert after[0] == pytest.approx(w)
    assert float(losses.sum()) <= float(frozen.sum()) + math.log(1 / worth) + 2 * share * 50 + 1e-9


def test_an_alarm_is_a_sum_that_leaves_its_running_mean():
    quiet = Standing()
    for _ in range(40):
        quiet = quiet.read([1.0, 3.0] * (WINDOW // 2))
        quiet = quiet.after_window(FallbackConfig(), WINDOW, 1)
    limit = 5 * math.sqrt(WINDOW)  # a token's deviation is 1
    assert quiet.alarm_in([2.0] * WINDOW, FallbackConfig(alarm=5.0), WINDOW) is None
    for loss in (2.0 + 8.0, 2.0 - 1.9):
        expected = math.floor(limit / abs(loss - 2.0))
        found = quiet.alarm_in([loss] * WINDOW, FallbackConfig(alarm=5.0), WINDOW)
        assert found == pytest.approx(expected, abs=1)
    assert Standing().read([9.0]).alarm_in([0.0] * WINDOW, FallbackConfig(), WINDOW) is None, "nothing is known yet"


def test_while_it_sleeps_or_only_watches_guards_change_nothing():
    watched = session_of(AdaptationConfig(fallback=FallbackConfig(probe=1)), lr=1e-3, period=32)
    plain = session_of(AdaptationConfig(guards=None, fallback=None), lr=1e-3, period=32)
    frozen = session_of(guarded(), inner=False)
    stream = tokens(3 * WINDOW)
    observed, expected = watched.observe(stream), plain.observe(stream)
    assert watched.standing.mode != "awake" and observed.refused == ()
    assert torch.equal(observed.losses, expected.losses)
    known = ~observed.frozen.isnan()
    assert known[:, WINDOW:].all()
    pieces = torch.cat([frozen.observe(stream[:, at : at + 32]).losses for at in range(0, stream.shape[1], 32)], 1)
    assert float((observed.frozen - pieces)[known].abs().mean()) < 1e-2, "it begins from the adapted model's state"


def ruined(session, by=-4.0):
    """The session with adapted weights that are of no use."""
    state = session.inner["stream"]
    session.inner["stream"] = state._replace(fast={name: by * value.detach() for name, value in state.fast.items()})
    return session


def learned(fallback, **options):
    """A session that has read a stream which its model knows."""
    session = session_of(guarded(fallback, patience=None), lr=1e-4, period=32, text=tiny, **options)
    stream, state = [torch.zeros(1, 1, dtype=torch.long)], session.model.init_state(1)
    for _ in range(8 * WINDOW):  # what the model itself says
        y, state, _ = session.model(stream[-1], state)
        stream.append(
            torch.multinomial((2 * y[:, -1]).softmax(-1), 1, generator=torch.Generator().manual_seed(len(stream)))
        )
    stream = torch.cat(stream, 1)[:, : 8 * WINDOW].detach()
    session.observe(stream[:, : 4 * WINDOW])
    return session, stream[:, 4 * WINDOW :]


def test_ruined_weights_are_found_out_outvoted_and_put_back():
    fallback = FallbackConfig(probe=1000, alarm=3.0, lead=40.0)
    session, stream = learned(fallback)
    frozen = session.fork()
    frozen.inner, frozen.updates = {}, 0
    frozen.loop = Session(session.model, tiny(), inner=False).loop
    ruined(session)
    observed, theirs = session.observe(stream), frozen.observe(stream)
    assert session.refused[BEHIND] == 1 and session.standing.falls <= 1
    slow = dict(session.model.named_parameters())
    for name, value in session.inner["stream"].fast.items():
        torch.testing.assert_close(value, slow[name], rtol=0.05, atol=0.05)
    caught = int((~observed.frozen.isnan())[0].long().argmax())
    behind = float((observed.losses - theirs.losses)[:, caught + WINDOW // 2 :].sum())
    assert behind < math.log(1 / fallback.share), "awake, it is hardly worse than the model as trained"
    ungoverned = ruined(learned(None)[0]).observe(stream)
    assert float(ungoverned.losses.sum()) > float(observed.losses.sum()) + 100


def test_a_probe_finds_slow_harm_and_calm_puts_the_frozen_one_to_sleep_again():
    session, stream = learned(FallbackConfig(probe=1, alarm=1e6, wake=1.0, lead=1e6))
    ruined(session, by=0.5)
    session.observe(stream[:, :WINDOW])
    assert session.standing.mode == "awake" and session.standing.lead > 1
    session._restart()
    for _ in range(40):
        session.observe(stream[:, WINDOW : 2 * WINDOW])
        if session.standing.mode == "asleep":
            break
        session.standing = Standing(
            **{**vars(session.standing), "lead": 0.0, "ahead": min(0.0, session.standing.ahead)}
        )
    assert session.standing.mode != "awake" and session.shadow is None and CALM > 1


def test_weights_that_served_long_are_those_that_come_back():
    session, stream = learned(FallbackConfig(probe=1000, alarm=3.0))
    session.standing = Standing(**{**vars(session.standing), "service": 5000})
    good = {name: value.clone() + 1e-3 for name, value in session.inner["stream"].fast.items()}
    session.inner["stream"] = session.inner["stream"]._replace(fast=good)
    session._come_home_later()
    assert session.home_service == 5000
    for _ in range(FALLS - 1):
        session._put_back(BEHIND, 1.0, 0.0)
        assert all(torch.equal(value, good[name]) for name, value in session.inner["stream"].fast.items())
        assert not session.resting
    session._put_back(BEHIND, 1.0, 0.0)
    assert session.resting, "the third time without a calm between them"
    rest, frozen = session.watchdog.until - session.position, session.fork()
    frozen.inner, frozen.loop = {}, Session(session.model, tiny(), inner=False).loop
    more = stream[:, :1].expand(-1, rest)
    assert torch.equal(session.observe(more).losses, frozen.observe(more).losses), "at rest, the model as trained"
    assert all(torch.equal(value, good[name]) for name, value in session.inner["stream"].fast.items())


def test_a_gradient_goes_back_no_further_than_a_piece():
    config = recurrent(inner_level(period=64))
    session = Session(shaken(config), config, adaptation=AdaptationConfig(piece=16))
    lengths, read = [], session.loop.read
    session.loop.read = lambda inputs, *rest: lengths.append(inputs.shape[1]) or read(inputs, *rest)
    assert session.observe(tokens(128)).updates == 2
    assert max(lengths) == 16 and session.report().gradient_tokens == 16
    assert session.report().longest_update >= session.report().seconds_per_update > 0
