"""Sessions: a token is predicted before it is learned from, only what is named moves, and a saved session goes on."""

import copy
import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from small_models import close, inner_level, recurrent, shaken, small_quickstart, tiny

from losses.outer import next_token
from metamem import Session, UserError, load_state, save_state
from metamem.config import AdaptationConfig
from metamem.state import StateError, flatten, state_bytes

pytestmark = pytest.mark.usefixtures("float64")
VOCABULARY, TIME = 7, 19
ADAM = inner_level(period=4, optimizer="{name: adam, lr: 0.01, betas: [0.9, 0.99]}")
CUTS = st.sets(st.integers(1, TIME - 1), max_size=TIME - 1)


@pytest.fixture
def config():
    return recurrent(ADAM)


@pytest.fixture
def model(config):
    return shaken(config)


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (1, TIME))


def read(session, tokens, cuts=()):
    """The losses of a stream that comes in pieces."""
    ends = [0, *sorted(cuts), tokens.shape[1]]
    return torch.cat([session.observe(tokens[:, a:b]).losses for a, b in itertools.pairwise(ends)], 1)


def contents(session, folder):
    """All that a session carries, as it would be saved."""
    session.save(folder / "contents")
    state, metadata = load_state(folder / "contents")
    return {**{key: value for key, value in flatten(state).items() if value is not None}, **metadata}


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        equal = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert equal, key


# Without inner levels: the model itself


def test_a_frozen_session_is_one_forward_over_the_whole_stream_for_any_split(model, config):
    tokens = torch.randint(VOCABULARY, (2, TIME))
    with torch.no_grad():
        out = model(tokens[:, :-1])
    expected = next_token(out.y, tokens[:, 1:])

    @settings(max_examples=10)
    @given(cuts=CUTS)
    def law(cuts):
        session = Session(model, config, inner=False, batch=2)
        losses = read(session, tokens, cuts)
        torch.testing.assert_close(losses[:, 0], torch.full((2,), math.log(VOCABULARY)))
        torch.testing.assert_close(losses[:, 1:], expected)
        close(flatten(session.state), flatten(out.state))
        assert session.position == TIME

    law()


def test_without_writing_a_memory_recalls_its_initial_weights(tokens):
    config = recurrent()
    model = shaken(config)
    never = shaken(recurrent("", "hierarchy.levels.surprise.rule.lr=0.0"))  # a rate of zero writes nothing either
    never.load_state_dict({key: value for key, value in model.state_dict().items() if ".gates." not in key})
    expected = read(Session(never, config), tokens)
    torch.testing.assert_close(read(Session(model, config, writing=False), tokens), expected)
    assert not torch.allclose(read(Session(model, config), tokens), expected)
    assert model.memory.writing, "the switch is the session's, not the model's"


def test_adaptation_off_is_the_frozen_model_bit_for_bit(model, config, tokens):
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        y = model(tokens).y
    adapted = Session(model, config)
    adapted.observe(tokens)
    frozen = Session(model, config, inner=False)
    losses = frozen.observe(tokens).losses
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(tokens).y, y)
    assert torch.equal(Session(model, config, inner=False).observe(tokens).losses, losses)


def test_resets_start_the_memories_anew_with_the_token_before_as_all_context(model, config, tokens):
    session = Session(model, config, inner=False, reset_every=5)
    expected = [Session(model, config, inner=False).observe(tokens[:, :5]).losses]
    for at in range(5, TIME, 5):
        fresh = Session(model, config, inner=False)
        expected.append(fresh.observe(tokens[:, at - 1 : at + 5]).losses[:, 1:])
    torch.testing.assert_close(read(session, tokens, {3, 11}), torch.cat(expected, 1))


def test_a_session_can_be_reset(model, config, tokens):
    session = Session(model, config)
    first = session.observe(tokens).losses
    session.reset()
    assert session.position == 0 and torch.equal(session.observe(tokens).losses, first)


# With inner levels


def test_adapting_moves_the_named_weights_and_never_the_models_own(model, config, tokens):
    before = copy.deepcopy(model.state_dict())
    session = Session(model, config)
    observed = session.observe(tokens)
    assert observed.updates == TIME // 4 and observed.losses.shape == (1, TIME)
    assert observed.bits_per_token == pytest.approx(observed.losses.mean().item() / math.log(2))
    fast = session.loop.parameters(session.inner)
    assert set(fast) == {"mlp.up.weight", "mlp.down.weight", "norm.weight"}
    for name, value in fast.items():
        assert not torch.allclose(value, before[name])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("inner", [ADAM, inner_level(period=1), inner_level(period=3, groups="[all]")])
def test_every_token_is_predicted_before_anything_learns_from_it(inner, tokens):
    config = recurrent(inner)
    model = shaken(config)
    losses = Session(model, config).observe(tokens).losses
    for t in range(TIME):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % VOCABULARY
        moved = Session(model, config).observe(changed).losses
        assert torch.equal(moved[:, :t], losses[:, :t])
        if t > 0:
            assert not torch.equal(moved[:, t], losses[:, t])  # the loss of the token itself
        if t < TIME - 1:
            assert not torch.allclose(moved[:, t + 1 :], losses[:, t + 1 :])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ("{name: sgd, lr: 0.2}", lambda p: torch.optim.SGD(p, 0.2)),
        (
            "{name: sgd, lr: 0.2, momentum: 0.8, weight_decay: 0.1}",
            lambda p: torch.optim.SGD(p, 0.2, momentum=0.8, weight_decay=0.1),
        ),
        ("{name: adam, lr: 0.01, betas: [0.9, 0.99]}", lambda p: torch.optim.Adam(p, 0.01, (0.9, 0.99))),
        (
            "{name: adamw, lr: 0.01, weight_decay: 0.5}",
            lambda p: torch.optim.AdamW(p, 0.01, (0.9, 0.95), weight_decay=0.5),
        ),
    ],
)
def test_an_inner_update_is_torchs_optimizer_on_a_copy(options, optimizer, batch):
    config = recurrent(inner_level(period=4, optimizer=options))
    model, tokens = shaken(config), torch.randint(VOCABULARY, (batch, TIME))
    session = Session(model, config, batch=batch)
    losses = read(session, tokens, {4, 12})

    copied = copy.deepcopy(model)
    moving = [p for name, p in copied.named_parameters() if name.startswith(("mlp.", "norm."))]
    optimizer, state, expected = optimizer(moving), None, [torch.full((batch, 1), math.log(VOCABULARY))]
    for start in range(0, TIME, 4):
        seen = tokens[:, max(0, start - 1) : start + 4]
        out = copied(seen[:, :-1], state)
        state = copied.detach_state(out.state)
        expected.append(next_token(out.y, seen[:, 1:]))
        if seen.shape[1] >= 4 and start + 4 <= TIME:
            optimizer.zero_grad()
            (expected[-1].sum() / (4 * batch)).backward()
            optimizer.step()
    torch.testing.assert_close(losses, torch.cat(expected, 1).detach(), rtol=1e-6, atol=1e-8)
    fast = session.loop.parameters(session.inner)
    for name, parameter in copied.named_parameters():
        if name in fast:
            torch.testing.assert_close(fast[name], parameter, rtol=1e-6, atol=1e-7)
    close(flatten(session.state), flatten(state), rtol=1e-6, atol=1e-7)


def test_the_split_of_a_stream_does_not_matter_at_multiples_of_the_period(model, config, tokens):
    whole = Session(model, config).observe(tokens)
    session = Session(model, config)
    losses = read(session, tokens, {4, 8, 16})
    torch.testing.assert_close(losses, whole.losses)


def test_two_levels_each_on_their_own_period():
    config = tiny(inner_level("quick") + inner_level("slow", period=4, groups="[ends]"))
    model, tokens = shaken(config), torch.randint(VOCABULARY, (1, 8))
    session = Session(model, config)
    before = model.head.weight.clone()
    for start, updates in zip(range(0, 8, 2), (1, 2, 1, 2), strict=True):
        head = session.inner["slow"].fast["head.weight"]
        assert session.observe(tokens[:, start : start + 2]).updates == updates
        moved = not torch.equal(session.inner["slow"].fast["head.weight"], head)
        assert moved == (updates == 2)
    assert torch.equal(model.head.weight, before)


def test_a_learned_rate_is_the_one_that_was_learned(tokens):
    config = recurrent(inner_level(optimizer="{name: sgd, lr: learned}"))
    model = shaken(config)
    with torch.no_grad():
        model.get_parameter("inner_rates.stream").copy_(torch.tensor([0.3, 0.3, 0.3]).log())
    fixed = recurrent(inner_level())
    plain = shaken(fixed)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "inner_rates" not in key})
    torch.testing.assert_close(
        Session(model, config).observe(tokens).losses, Session(plain, fixed).observe(tokens).losses
    )


def test_a_reset_of_the_memories_leaves_what_inner_levels_learned(model, config, tokens):
    session = Session(model, config, reset_every=8)
    fast = {}
    for start in range(0, 16, 8):
        session.observe(tokens[:, start : start + 8])
        now = session.loop.parameters(session.inner)
        assert start == 0 or not any(torch.equal(now[name], fast[name]) for name in now)
        fast = now
    assert session.inner["stream"].updates == 4


def test_an_empty_piece_changes_nothing(model, config, tokens, tmp_path):
    session = Session(model, config)
    session.observe(tokens)
    before = contents(session, tmp_path)
    observed = session.observe(tokens[:, :0])
    assert observed.losses.shape == (1, 0) and observed.updates == 0
    same(contents(session, tmp_path), before)


# Saving


@pytest.mark.parametrize("at", [0, 1, 4, 6, 16])  # before the first token, in mid-period, at a boundary
@pytest.mark.parametrize(
    "inner", [ADAM, inner_level(period=4, optimizer="{name: sgd, lr: 0.2, momentum: 0.9}"), inner_level(period=1), ""]
)
def test_a_saved_session_goes_on_bit_for_bit(inner, at, tokens, tmp_path):
    config = recurrent(inner)
    model = shaken(config)
    session = Session(model, config)
    if at:
        session.observe(tokens[:, :at])
    session.save(tmp_path / "s")
    other = Session(shaken(config), config)
    other.observe(tokens[:, 3:8])  # what it had read before is gone
    other.load(tmp_path / "s")
    assert other.position == at
    same(contents(other, tmp_path), contents(session, tmp_path))
    assert torch.equal(other.observe(tokens[:, at:]).losses, session.observe(tokens[:, at:]).losses)
    same(contents(other, tmp_path), contents(session, tmp_path))


def test_the_state_has_one_size_however_long_the_stream(model, config):
    session = Session(model, config)
    sizes = []
    for _ in range(3):
        session.observe(torch.randint(VOCABULARY, (1, 50)))
        sizes.append(session.state_bytes)
    assert sizes == [sizes[0]] * 3 and sizes[0] > state_bytes(session.state)


@pytest.mark.parametrize(
    "other",
    [
        lambda: (tiny(ADAM), {}),
        lambda: (recurrent(ADAM, "network.modules.attention.window=4"), {}),
        lambda: (recurrent(), {}),
        lambda: (recurrent(ADAM), {"batch": 2}),
        lambda: (recurrent(ADAM), {"inner": False}),
    ],
    ids=["graph", "window", "levels", "batch", "frozen"],
)
def test_a_state_of_another_model_is_refused_and_changes_nothing(other, model, config, tokens, tmp_path):
    wanted, options = other()
    foreign = Session(shaken(wanted), wanted, **options)
    foreign.observe(tokens.expand(foreign.batch, -1))
    foreign.save(tmp_path / "s")
    session = Session(model, config)
    session.observe(tokens[:, :7])
    before = contents(session, tmp_path)
    with pytest.raises(StateError, match="it is of another model"):
        session.load(tmp_path / "s")
    same(contents(session, tmp_path), before)


def test_a_state_of_another_training_is_refused_though_all_shapes_agree(model, config, tokens, tmp_path):
    foreign = shaken(config)
    with torch.no_grad():
        foreign.head.weight[0, 0] += 1e-9
    Session(foreign, config).save(tmp_path / "s")
    session = Session(model, config)
    session.observe(tokens[:, :7])
    before = contents(session, tmp_path)
    with pytest.raises(StateError, match="it is of another model: one of these shapes, with other weights"):
        session.load(tmp_path / "s")
    same(contents(session, tmp_path), before)


def test_a_file_that_is_no_session_is_refused(model, config, tokens, tmp_path):
    session = Session(model, config)
    session.observe(tokens)
    session.save(tmp_path / "s")
    written = (tmp_path / "s").read_bytes()
    (tmp_path / "cut").write_bytes(written[:-100])
    (tmp_path / "flipped").write_bytes(written[:-9] + bytes([written[-9] ^ 1]) + written[-8:])
    (tmp_path / "moved").write_bytes(written.replace(b'"position":"19"', b'"position":"18"'))
    (tmp_path / "unsealed").write_bytes(written.replace(b'"checksum"', b'"checkmus"'))
    (tmp_path / "text").write_text("not a state")
    save_state(model.init_state(1), tmp_path / "memories")
    assert all((tmp_path / name).read_bytes() != written for name in ("flipped", "moved", "unsealed"))
    before = contents(session, tmp_path)
    for name in ("cut", "flipped", "moved", "unsealed", "text", "memories", "missing"):
        with pytest.raises(StateError, match=name) as error:
            session.load(tmp_path / name)
        assert len(str(error.value).splitlines()) == 1
        same(contents(session, tmp_path), before)


# Many sessions


def test_a_fork_goes_on_by_itself_and_leaves_its_parent_untouched(model, config, tokens, tmp_path):
    parent, alone = Session(model, config), Session(model, config)
    for session in (parent, alone):
        session.observe(tokens[:, :6])  # in mid-period
    before = contents(parent, tmp_path)
    child = parent.fork()
    child.observe(torch.randint(VOCABULARY, (1, 23)))
    same(contents(parent, tmp_path), before)
    second = parent.fork()
    expected = alone.observe(tokens[:, 6:]).losses
    assert torch.equal(second.observe(tokens[:, 6:]).losses, expected)
    assert torch.equal(parent.observe(tokens[:, 6:]).losses, expected)
    same(contents(parent, tmp_path), contents(alone, tmp_path))


def test_ten_sessions_at_once_are_each_as_if_alone(model, config, tmp_path):
    streams = torch.randint(VOCABULARY, (10, 1, 24))
    options = [{"inner": index % 3 > 0, "writing": index % 4 > 0} for index in range(10)]
    sessions = [Session(model, config, **each) for each in options]
    together = [[] for _ in sessions]
    for start in range(0, 24, 8):
        for found, session, stream in zip(together, sessions, streams, strict=True):
            found.append(session.observe(stream[:, start : start + 8]).losses)
    for found, session, stream, each in zip(together, sessions, streams, options, strict=True):
        alone = Session(model, config, **each)
        expected = [alone.observe(stream[:, start : start + 8]).losses for start in range(0, 24, 8)]
        assert torch.equal(torch.cat(found, 1), torch.cat(expected, 1))
        same(contents(session, tmp_path), contents(alone, tmp_path))


@pytest.mark.parametrize("options", [{}, {"inner": False}, {"reset_every": 5}])
def test_predict_is_the_distribution_that_the_next_token_is_charged_by(options, model, config, tokens, tmp_path):
    session = Session(model, config, **options)
    for t in range(12):
        before = contents(session, tmp_path)
        probabilities = session.predict()
        same(contents(session, tmp_path), before)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(1))
        loss = session.observe(tokens[:, t : t + 1]).losses
        torch.testing.assert_close(-probabilities[:, tokens[0, t]].log(), loss[:, 0])


@pytest.mark.parametrize(("tokens", "message"), [([[1], [2]], "not 2: set batch"), ([[7]], "token 7"), ([[-1]], "-1")])
def test_tokens_that_no_model_could_read_are_refused(tokens, message, model, config):
    with pytest.raises(UserError, match=message):
        Session(model, config).observe(torch.tensor(tokens))


# What is not finite


@pytest.mark.parametrize("options", [{}, {"inner": False}, {"reset_every": 6}], ids=["", "frozen", "reset"])
def test_without_guards_a_loss_that_is_not_finite_is_an_error_and_the_session_as_it_was(
    options, model, config, tmp_path
):
    with torch.no_grad():
        model.embed.weight[6] = torch.nan
    session = Session(model, config, **options, adaptation=AdaptationConfig(guards=None))
    session.observe(torch.tensor([[0, 1, 2, 3, 4, 5]]))
    before = contents(session, tmp_path)
    with pytest.raises(UserError, match=r"token 6: the loss is not finite; the session stays as it was before it"):
        session.observe(torch.tensor([[6, 1]]))
    same(contents(session, tmp_path), before)
    assert session.observe(torch.tensor([[2, 3, 4]])).losses.isfinite().all()


def test_the_quickstart_adapts(tmp_path):
    config = small_quickstart("hierarchy.levels.stream.period=8", "hierarchy.levels.stream.optimizer.lr=0.02")
    model = shaken(config)
    tokens = torch.tensor([list(b"a stream that says the same, " * 12)])
    adapting = Session(model, config).observe(tokens).losses[0, -60:].mean()
    assert adapting < 0.9 * Session(model, config, inner=False).observe(tokens).losses[0, -60:].mean()
