"""Every level that is fast, against a loop over tokens that keeps each level's own buffer of error signals.

A slow level must move by the signals of exactly its own last P tokens, as they were computed at the time, also where a
faster level has fired in between; and a buffer that a call leaves half full goes on in the next.
"""

from dataclasses import replace

import pytest
import torch
from small_models import brier, close, inner_level, recurrent, shaken, tiny
from torch.func import functional_call

from losses.outer import next_token
from losses.recall import cosine, mse
from metamem import FastWeights, InnerLoop, Session, TokenLevel, inner_levels

pytestmark = pytest.mark.usefixtures("float64")
DIM, VOCABULARY = 6, 7


# Token levels, in a memory of two layers


def memory_of(*levels, **settings):
    memory = FastWeights(DIM, levels, heads=1, **{"hidden": (5,), "chunk": 4, **settings})
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


LEVELS = (
    TokenLevel("quick", {mse: 1.0}, momentum="learned", forget="learned", lr_max=0.3),
    TokenLevel("middle", {cosine: 0.7}, period=4, momentum=0.6, lr=0.2),
    TokenLevel("slow", {mse: 0.5}, period=32, forget=0.2, lr_max=0.2),
)
SETTINGS = {
    "layers": {},
    "linear": {"hidden": (), "signal_at": "token"},
    "one token": {"chunk": 1, "signal_at": "token"},
}


def token_by_token(memory, x):
    """Outputs, and the weights after each token, a row at a time: every signal by autograd, all of them kept."""
    rows = [_one_row(memory, x[row : row + 1]) for row in range(len(x))]
    after = zip(*(weights for _, weights in rows), strict=True)
    return torch.cat([y for y, _ in rows]), [[torch.cat(layer) for layer in zip(*at, strict=True)] for at in after]


def _one_row(memory, x):
    writes, queries = memory.writer(x, x.dtype), memory.reader.query(x, x.dtype)
    initial = [weight[None] for weight in memory.init]
    deltas = {level.name: [torch.zeros_like(w) for w in initial] for level in memory.levels}
    momenta = {level.name: [torch.zeros_like(w) for w in initial] for level in memory.levels}
    buffers = {level.name: [] for level in memory.levels}
    reads, after, anchor = [], [], initial

    def now():
        return [w + sum(delta[i] for delta in deltas.values()) for i, w in enumerate(initial)]

    def move(level, t):
        """By the sum over its own last tokens, with the gates of this one."""
        gates = writes.gates[level.name]
        keep = 1.0 if gates.log_keep is None else gates.log_keep[0, 0, t].exp()
        carry = 0.0 if gates.log_momentum is None else gates.log_momentum[0, 0, t].exp()
        for i, summed in enumerate(map(sum, zip(*buffers[level.name][-level.period :], strict=True))):
            momenta[level.name][i] = carry * momenta[level.name][i] - summed
            deltas[level.name][i] = keep * deltas[level.name][i] + momenta[level.name][i]

    for t in range(x.shape[1]):
        if memory.signal_at == "token" or t % memory.chunk == 0:
            anchor = now()
        key, value = writes.keys[:, :, t], writes.values[:, :, t]
        for level in memory.levels:
            here = [w.detach().requires_grad_() for w in anchor] if not anchor[0].requires_grad else anchor
            pred = _network(memory, here, key)
            loss = sum(weight * objective(pred, value).sum() for objective, weight in level.objectives.items())
            signals = torch.autograd.grad(loss, here, create_graph=True)
            buffers[level.name].append([writes.gates[level.name].lr[0, 0, t, 0] * signal for signal in signals])
        for level in memory.levels:
            if level.period == 1:
                move(level, t)
        reads.append(_network(memory, now(), queries[:, :, t]))
        for level in memory.levels:
            if level.period > 1 and (t + 1) % level.period == 0:
                move(level, t)
        after.append(now())
    return memory.reader(torch.stack(reads, 2)), after


def _network(memory, weights, a):
    for i, weight in enumerate(weights):
        a = a @ weight
        a = torch.nn.functional.silu(a) if i + 1 < len(weights) else a
    return a


def slopes(module, total):
    of = dict(module.named_parameters())
    found = torch.autograd.grad(total, list(of.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(of, found, strict=True))


@pytest.mark.parametrize("executor", ["dual", "recurrence"])
@pytest.mark.parametrize("name", SETTINGS)
def test_token_levels_move_by_their_own_last_tokens(name, executor):
    """Periods of 1, 4 and 32, over 70 tokens in calls of 16: the slowest level fires at the end of every second."""
    quick, middle, slow = LEVELS
    if name == "linear":  # its signals are solved for, which takes a squared error
        middle = replace(middle, objectives={mse: 0.7})
    memory = memory_of(quick, middle, slow, executor=executor, **SETTINGS[name])
    x = torch.randn(2, 70, DIM)
    expected, weights = token_by_token(memory, x)
    state, reads, moved = None, [], []
    for start in range(0, 70, 16):
        before = None if state is None else state["levels"]["slow"]["delta"]["0"]
        y, state, _ = memory(x[:, start : start + 16], state)
        reads.append(y)
        slow, end = state["levels"]["slow"], min(start + 16, 70)
        moved.append(bool(slow["delta"]["0"].any()) if before is None else not torch.equal(slow["delta"]["0"], before))
        assert bool(slow["pending"]["0"].any()) == (end % 32 != 0), "a buffer is empty after its period only"
        components = state["levels"].values()
        total = [w + sum(level["delta"][str(i)] for level in components) for i, w in enumerate(memory.init)]
        close(dict(enumerate(total)), dict(enumerate(weights[end - 1])))
    assert moved == [False, True, False, True, False]
    close({"y": torch.cat(reads, 1)}, {"y": expected})
    weight = torch.randn_like(expected)
    close(slopes(memory, (weight * torch.cat(reads, 1)).sum()), slopes(memory, (weight * expected).sum()))


def test_a_slow_level_sees_no_token_twice_and_leaves_none_out():
    """The move of a period is that of its eight tokens, each by its own key and value: what the faster levels did with
    them changes nothing where they cannot move what the slow one reads."""
    slow = TokenLevel("slow", {mse: 1.0}, period=8, lr=0.1)
    still = TokenLevel("quick", {mse: 1.0}, lr=0.0), TokenLevel("middle", {mse: 1.0}, period=4, lr=0.0)
    memory = memory_of(*still, slow, hidden=())
    x = torch.randn(1, 24, DIM)
    writes = memory.writer(x, x.dtype)
    weight = memory.init[0][0]
    state = None
    for start in range(0, 24, 6):  # calls end within periods
        state = memory(x[:, start : start + 6], state).state
    for start in range(0, 24, 8):
        keys, values = writes.keys[0, 0, start : start + 8, 0], writes.values[0, 0, start : start + 8, 0]
        weight = weight - 0.1 * sum(torch.outer(k, k @ weight - v) for k, v in zip(keys, values, strict=True))
    torch.testing.assert_close(memory.init[0][0] + state["levels"]["slow"]["delta"]["0"][0, 0], weight)


# Inner levels

TWO = inner_level("quick", groups="[middle]") + inner_level(
    "slow",
    period=8,
    groups="[ends]",
    objective="{small_models.brier: 2.0}",
    optimizer="{name: sgd, lr: 0.2, momentum: 0.6}",
)


def inner_by_token(model, inputs, targets, last=True, silent=()):
    """Two inner levels, a token at a time: its gradient at the weights of its time goes into each level's own buffer.

    The tiny model has no memory, so that a token's loss depends on that token alone. Tokens in `silent` count, and have
    no gradient; without `last`, no update ends the sequence."""
    parameters = dict(model.named_parameters())
    levels = {
        "quick": (2, next_token, 0.3, 0.0, ("mlp.up.weight", "mlp.down.weight", "norm.weight")),
        "slow": (8, lambda y, t: 2 * brier(y, t), 0.2, 0.6, ("head.weight",)),
    }
    fast = {name: parameters[name] for *_, names in levels.values() for name in names}
    buffers, momenta, losses, moves = {name: [] for name in levels}, dict.fromkeys(fast, 0.0), [], []
    for t in range(inputs.shape[1]):
        own = {name: value.clone() for name, value in fast.items()}
        y, wanted = functional_call(model, own, (inputs[:, t : t + 1],)).y, targets[:, t : t + 1]
        losses.append(next_token(y, wanted))
        for name, (_, objective, _, _, names) in levels.items():
            total = objective(y, wanted).sum() * (t not in silent)
            buffers[name].append(torch.autograd.grad(total, [own[n] for n in names], create_graph=True))
        for name, (period, _, rate, momentum, names) in levels.items():
            if (t + 1) % period == 0 and (last or t + 1 < inputs.shape[1]):
                for n, found in zip(names, zip(*buffers[name][-period:], strict=True), strict=True):
                    momenta[n] = momentum * momenta[n] + sum(found) / (period * len(inputs))
                    fast[n] = fast[n] - rate * momenta[n]
                moves.append((t + 1, name))
    return torch.cat(losses, 1), fast, moves


def test_inner_levels_move_by_their_own_last_tokens_in_loss_and_outer_gradient():
    config = tiny(TWO)
    model = shaken(config)
    inputs, targets = torch.randint(VOCABULARY, (2, 3, 20))
    loop = InnerLoop(model, inner_levels(config, model))
    losses = next_token(loop.run(inputs, targets).y, targets)
    expected, _, moves = inner_by_token(model, inputs, targets, last=False)
    assert [t for t, name in moves if name == "slow"] == [8, 16] and len(moves) == 11
    close({"loss": losses}, {"loss": expected})
    close(slopes(model, losses.square().sum()), slopes(model, expected.square().sum()))


@pytest.mark.parametrize("calls", [(4,) * 10, (8,) * 5, (40,), (2, 6, 12, 20)], ids=str)
def test_a_session_moves_by_its_levels_own_last_tokens(calls):
    """The slow level's period, 8, is longer than the first calls: its buffer survives them."""
    config = tiny(TWO)
    model, tokens = shaken(config), torch.randint(VOCABULARY, (3, 40))
    session, start, losses, updates = Session(model, config, batch=3), 0, [], []
    for length in calls:
        observed = session.observe(tokens[:, start : start + length])
        losses.append(observed.losses)
        updates.append(observed.updates)
        start += length
    inputs = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)  # the first token has no context: its input is never used
    expected, fast, moves = inner_by_token(model, inputs, tokens, silent={0})
    assert sum(updates) == len(moves) == 20 + 5
    torch.testing.assert_close(torch.cat(losses, 1)[:, 1:], expected[:, 1:].detach())
    close(session.loop.parameters(session.inner), {name: value.detach() for name, value in fast.items()})


@pytest.mark.parametrize("make", [recurrent, tiny], ids=["memory", "no memory"])
def test_a_training_and_a_session_make_the_same_updates(make):
    """Two levels of different periods, with a memory between them: what is trained is what runs."""
    config = make(TWO)
    model, tokens = shaken(config), torch.randint(VOCABULARY, (1, 33))
    session = Session(model, config)
    session.observe(tokens[:, :1])
    session.position = 0  # as a training has it: the first token is an input, and counts as none
    losses = session.observe(tokens[:, 1:]).losses
    out = InnerLoop(model, inner_levels(config, model)).run(tokens[:, :-1], tokens[:, 1:])
    close({"losses": losses}, {"losses": next_token(out.y, tokens[:, 1:]).detach()})
