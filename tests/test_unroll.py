"""Where the outer gradient is cut, all is cut at once; and a graph that is recomputed is the one that was kept.

The reference of a cut is an explicit loop over pieces of a sequence, the state carried between them detached.
"""

from collections import Counter

import pytest
import torch
from config_example import error_of
from small_models import (
    GROUPS,
    MEMORY_GROUP,
    RECURRENT,
    STEP_LEVEL,
    TOKEN_LEVEL,
    close,
    config_of,
    inner_level,
    recurrent,
    shaken,
    tiny,
    with_memory,
)
from torch import nn
from torch.func import functional_call

from losses.outer import next_token
from metamem import InnerLoop, UserError, inner_levels, train
from metamem.hierarchy import inner_loop
from metamem.hierarchy.recompute import recomputed
from metamem.memory.base import Out
from metamem.state import flatten

pytestmark = pytest.mark.usefixtures("float64")
VOCABULARY, TIME = 7, 24
SLOW = """
    - {name: slow, clock: token, period: 4, objective: {losses.recall.mse: 1.0}, groups: [memory],
       rule: {momentum: learned, transform: %s, step: 0.3}}
    - {name: slower, clock: token, period: 16, objective: {losses.recall.cosine: 1.0}, groups: [memory],
       rule: {lr: 0.2, momentum: 0.5}}"""


def levels_of(transform):
    """A memory of three levels: a momentum, a transform's own state, sums of half a period."""
    text = RECURRENT.replace("signal_at: token, chunk: 4", "expansion: [1.0], chunk: 4")
    return config_of(text + GROUPS % MEMORY_GROUP + TOKEN_LEVEL + SLOW % transform + STEP_LEVEL)


MODELS = {
    "fast weights of one level": recurrent(),
    "muon": levels_of("muon"),
    "rmsprop": levels_of("rmsprop"),
    "mnm": with_memory("{kind: mnm, dim: 6, hidden: 5, width: 3, heads: 2}", "memory.init.**"),
}


@pytest.fixture
def batch():
    return torch.randint(VOCABULARY, (2, TIME)), torch.randint(VOCABULARY, (2, TIME))


def slopes(model, losses):
    of = dict(model.named_parameters())
    found = torch.autograd.grad(losses.square().mean(), list(of.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(of, found, strict=True))


def outcome(loop, inputs, targets):
    """Losses, state and outer gradients."""
    out = loop.run(inputs, targets)
    losses = next_token(out.y, targets)
    state = {key: value for key, value in flatten(out.state).items() if value is not None}
    return {"losses": losses, **state, **{f"d {k}": v for k, v in slopes(loop.network, losses).items()}}


def piecewise(model, inputs, targets, length):
    """A loop over pieces, its state detached between them."""
    state, losses = None, []
    for start in range(0, TIME, length):
        here = slice(start, start + length)
        y, state, _ = model(inputs[:, here], state)
        losses.append(next_token(y, targets[:, here]))
        if start + length < TIME:
            state = model.detach_state(state)
    losses = torch.cat(losses, 1)
    state = {key: value for key, value in flatten(state).items() if value is not None}
    return {"losses": losses, **state, **{f"d {k}": v for k, v in slopes(model, losses).items()}}


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("unroll", [6, 8])
@pytest.mark.parametrize("name", MODELS)
def test_a_cut_takes_all_of_a_memorys_state(name, unroll, recompute, batch):
    model = shaken(MODELS[name])
    mine = outcome(InnerLoop(model, [], unroll, recompute), *batch)
    close(mine, piecewise(model, *batch, unroll))
    whole = piecewise(model, *batch, TIME)
    close({"losses": mine["losses"]}, {"losses": whole["losses"]})
    assert not torch.allclose(mine["d embed.weight"], whole["d embed.weight"]), "the gradient is another one"


def test_no_gradient_crosses_a_cut(batch):
    model = shaken(levels_of("muon"))
    out = InnerLoop(model, [], unroll=8).run(*batch)
    before = {key: value for key, value in flatten(out.state).items() if value is not None and value.requires_grad}
    names = {key.split("/")[3] for key in before if "/levels/" in key}
    assert names == {"delta", "momentum", "pending"}
    seen = []
    model.embed.register_forward_hook(lambda module, given, result: seen.append(result))
    InnerLoop(model, [], unroll=8).run(*batch).y[:, 16:].sum().backward(inputs=seen)
    assert [one.grad is None or not one.grad.any() for one in seen] == [True, True, False]


@pytest.mark.parametrize("unroll", [4, 8])
def test_a_cut_takes_the_inner_levels_and_the_memory_together(unroll, batch):
    """Fast copies, momenta, and the memory's state: an inner loop written out over pieces."""
    model = shaken(config := recurrent(inner_level(optimizer="{name: sgd, lr: 0.2, momentum: 0.7}", period=4)))
    mine = outcome(InnerLoop(model, inner_levels(config, model), unroll), *batch)

    inputs, targets = batch
    fast = {name: value for name, value in model.named_parameters() if name.startswith(("mlp.", "norm."))}
    momenta, state, losses = {name: torch.zeros_like(value) for name, value in fast.items()}, None, []
    for start in range(0, TIME, 4):
        here, end = slice(start, start + 4), start + 4
        y, state, _ = functional_call(model, fast, (inputs[:, here], state))
        losses.append(next_token(y, targets[:, here]))
        if end < TIME:
            found = torch.autograd.grad(losses[-1].mean(), list(fast.values()), create_graph=True)
            momenta = {name: 0.7 * momenta[name] + slope for name, slope in zip(fast, found, strict=True)}
            fast = {name: value - 0.2 * momenta[name] for name, value in fast.items()}
            if end % unroll == 0:
                state = model.detach_state(state)
                momenta = {name: value.detach() for name, value in momenta.items()}
                fast = {name: value.detach().requires_grad_() for name, value in fast.items()}
    losses = torch.cat(losses, 1)
    close({"losses": mine["losses"]}, {"losses": losses})
    expected = slopes(model, losses)
    close({name: mine[f"d {name}"] for name in expected}, expected)


# Recomputed


RECOMPUTED = {
    "memory": (levels_of("muon"), 1),
    "memory and inner levels": (recurrent(inner_level() + inner_level("slow", period=4, groups="[ends]")), 2),
    "learned rates": (recurrent(inner_level(optimizer="{name: adam, lr: learned, lr_per: element}")), 2),
    "cut inner levels": (recurrent(inner_level(unroll=2, optimizer="{name: sgd, lr: 0.2, momentum: 0.7}")), 2),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_a_recomputed_graph_is_the_one_that_was_kept(name, batch):
    config = RECOMPUTED[name][0]
    model = shaken(config)
    kept, anew = (InnerLoop(model, inner_levels(config, model), recompute=again) for again in (False, True))
    close(outcome(anew, *batch), outcome(kept, *batch))
    assert any(value.any() for key, value in outcome(anew, *batch).items() if key.startswith("d memory"))


class Kept:
    """Saved tensors while a graph holds them, every storage once: the bytes of now, and the most that there were."""

    def __init__(self):
        self.counts, self.now, self.peak = Counter(), 0, 0

    def pack(self, tensor):
        return Held(self, tensor)

    def change(self, tensor, by):
        storage = tensor.untyped_storage()
        before = self.counts[storage.data_ptr()]
        self.counts[storage.data_ptr()] += by
        self.now += storage.nbytes() * (bool(before + by) - bool(before))
        self.peak = max(self.peak, self.now)


class Held:
    def __init__(self, kept, tensor):
        self.kept, self.tensor = kept, tensor
        kept.change(tensor, 1)

    def __del__(self):
        self.kept.change(self.tensor, -1)


def peak_bytes(loop, tokens):
    """Of what is saved for a backward pass, through forward and backward."""
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        loop.run(tokens, tokens).y.square().sum().backward()
    return kept.peak


@pytest.mark.parametrize("inner", ["", inner_level(period=8)], ids=["memory", "inner"])
def test_recomputation_keeps_less_and_a_smaller_share_of_a_longer_sequence(inner):
    config = recurrent(inner)
    model = shaken(config)
    shares = []
    for time in (64, 256):
        tokens = torch.randint(VOCABULARY, (2, time))
        loops = [InnerLoop(model, inner_levels(config, model), recompute=anew) for anew in (False, True)]
        kept, anew = (peak_bytes(loop, tokens) for loop in loops)
        shares.append(anew / kept)
    assert shares[0] < 0.7 and shares[1] < 0.7 * shares[0], shares


def test_a_recomputed_part_runs_twice_however_many_gradients_it_takes(batch):
    config = recurrent(inner_level())
    model = shaken(config)
    calls = []
    model.register_forward_pre_hook(lambda module, given: calls.append(given[0].shape[1]))
    out = InnerLoop(model, inner_levels(config, model), recompute=True).run(*batch)
    assert calls == [2] * 12
    out.y.sum().backward()
    assert calls == [2] * 24


def test_what_is_random_is_the_same_again():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.dropout = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY)), nn.Dropout(0.5)

        def forward(self, x, state=None):
            return Out(self.dropout(self.table[x]), {}, {})

    model, tokens, found = Noisy(), torch.randint(VOCABULARY, (2, TIME)), []
    for recompute in (False, True):
        torch.manual_seed(3)
        y = InnerLoop(model, [], unroll=6, recompute=recompute).run(tokens, tokens).y
        torch.rand(5)
        found.append((y, torch.autograd.grad(y.square().sum(), model.table)[0], torch.rand(1)))
    for kept, anew in zip(*found, strict=True):
        assert torch.equal(kept, anew)


def test_recomputation_takes_what_is_no_tensor_or_needs_no_gradient():
    weight, x = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)

    def function(x, numbers):
        count, index = numbers["count"], numbers["index"]
        return {"y": weight * x[index], "count": count + 1, "index": index, "same": x}

    found = recomputed(function, [weight], x, {"count": 3, "index": torch.tensor([2, 0, 1])})
    assert found["count"] == 4 and found["index"].tolist() == [2, 0, 1]
    one, other = torch.autograd.grad((found["y"].square() + found["same"]).sum(), [weight, x])
    y = weight * x[[2, 0, 1]]
    expected = torch.autograd.grad((y.square() + x).sum(), [weight, x])
    torch.testing.assert_close((one, other), expected)
    unused = recomputed(function, [weight], x, {"count": 3, "index": torch.tensor([0, 1, 2])})
    assert torch.autograd.grad(unused["same"].sum(), [weight, x], allow_unused=True)[0] is None
    constant = recomputed(lambda x: x.detach() * weight.detach(), [weight], x)
    assert torch.autograd.grad(constant.sum(), [weight, x], allow_unused=True) == (None, None)


def test_without_gradients_an_inner_loop_gives_the_same_numbers_and_no_graph(batch):
    config = recurrent(inner_level() + inner_level("slow", period=4, groups="[ends]"))
    model = shaken(config)
    loop = InnerLoop(model, inner_levels(config, model), recompute=True)
    expected = loop.run(*batch)
    with torch.no_grad():
        found = loop.run(*batch)
    close({"y": found.y, **found.aux}, {"y": expected.y, **expected.aux})
    assert not found.y.requires_grad and expected.y.requires_grad


# In a config


class Windows:
    def sample(self, generator, batch, length):
        windows = torch.randint(VOCABULARY, (batch, length + 1), generator=generator)
        return windows[:, :-1], windows[:, 1:]


SHORT = ("training.steps=3", "training.batch=2", "training.length=16", "training.warmup=0")


def test_a_training_is_cut_and_recomputed_as_its_config_says(tmp_path):
    inner = inner_level(optimizer="{name: sgd, lr: learned}")

    def trained(*overrides):
        return dict(train(recurrent(inner, *SHORT, *overrides), tmp_path, task=Windows()).model.named_parameters())

    whole, cut = trained(), trained("training.unroll=4")
    close(trained("training.recompute=true"), whole)
    close(trained("training.recompute=true", "training.unroll=4"), cut)
    assert not torch.allclose(cut["embed.weight"], whole["embed.weight"])


def test_a_cut_within_a_period_is_refused(tmp_path):
    config = tiny(inner_level(period=4), *SHORT, "training.unroll=6")
    told = "training.unroll: must be a multiple of 4, the period of the inner level 'stream', and not 6"
    assert told in error_of(lambda: train(config, tmp_path, task=Windows()))
    model = shaken(config)
    with pytest.raises(UserError, match="must be a multiple of 4"):
        InnerLoop(model, inner_levels(config, model), unroll=6)
    assert inner_loop(tiny(inner_level(period=4, unroll=0), "training.unroll=6"), model).unroll == 6


def test_a_compiled_forward_is_not_differentiated_twice():
    config = tiny(inner_level(), "training.compile=true")
    told = "training.compile: a compiled forward cannot be differentiated twice, as the inner level 'stream' needs"
    assert told in error_of(lambda: inner_loop(config, shaken(config)))


def test_the_unroll_of_a_token_level_is_the_trainings():
    text = error_of(lambda: recurrent("", "hierarchy.levels.surprise.unroll=3"))
    assert "(surprise).unroll: is for inner levels: a memory's gradient is cut in all its levels at once, every" in text
