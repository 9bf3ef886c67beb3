"""A user's own nn.Module as a memory network: all that an MLP of ours is, by autograd."""

import pytest
import torch
from conformance import close, tensors
from torch import nn
from torch.nn import functional

from losses.recall import cosine, mse
from metamem.memory.fast_weights import FastWeights
from metamem.memory.level import TokenLevel

pytestmark = pytest.mark.usefixtures("float64")

DIM, HEADS = 6, 2


class TwoLayers(nn.Module):
    """What `network: mlp` with one hidden layer is."""

    def __init__(self, d_key: int, d_value: int) -> None:
        super().__init__()
        self.inner = nn.Linear(d_key, 5, bias=False)
        self.outer = nn.Linear(5, d_value, bias=False)

    def forward(self, x):
        return self.outer(functional.silu(self.inner(x)))


class Gated(nn.Module):
    """Parameters of one, two and three axes, under one another's names."""

    def __init__(self, d_key: int, d_value: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d_key, 4), nn.Tanh(), nn.Linear(4, d_value))
        self.mix = nn.Parameter(torch.randn(2, d_key, d_value) / 3)

    def forward(self, x):
        return self.layers(x) * torch.sigmoid(x @ self.mix[0]) + x @ self.mix[1]


class Normed(nn.Module):
    def __init__(self, d_key: int, d_value: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(d_key)

    def forward(self, x):
        return self.norm(x)


class Wide(nn.Module):
    def __init__(self, d_key: int, d_value: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d_key, d_value + 1)

    def forward(self, x):
        return self.layer(x)


class Empty(nn.Module):
    def __init__(self, d_key: int, d_value: int) -> None:
        super().__init__()

    def forward(self, x):
        return x


LEVELS = {
    "period-1": [TokenLevel("fast", {mse: 1.0}, lr_max=0.2, momentum="learned", forget="learned", forget_to="zero")],
    "whole-chunks": [
        TokenLevel("fast", {mse: 1.0}, period=4, lr_max=0.2, forget="learned"),
        TokenLevel("slow", {cosine: 1.0}, period=8, lr_max=0.1, momentum=0.5, transform="clip", step=0.5),
    ],
    "both": [
        TokenLevel("fast", {mse: 1.0}, lr=0.1),
        TokenLevel("slow", {mse: 1.0}, period=8, transform="adam", step=0.1),
    ],
    "window": [
        TokenLevel("fast", {mse: 1.0}, lr=0.05, window=6),
        TokenLevel("slow", {mse: 1.0}, period=4, window=7, lr=0.02),
    ],
}


def path(module):
    return f"{__name__}.{module.__name__}"


def pair(levels, **settings):
    """The module, and the MLP of the same weights."""
    torch.manual_seed(0)
    mine = FastWeights(DIM, levels, HEADS, network=path(TwoLayers), chunk=4, **settings)
    ours = FastWeights(DIM, levels, HEADS, hidden=[5], chunk=4, **settings)
    shared = {key: value for key, value in mine.state_dict().items() if not key.startswith("init")}
    ours.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for theirs, weight in zip(ours.init, mine.init, strict=True):
            theirs.copy_(weight.mT)  # nn.Linear holds its matrix as [d_out, d_in]
    return mine, ours


@pytest.mark.parametrize("levels", LEVELS)
def test_a_module_equals_the_mlp_that_it_is(levels):
    mine, ours = pair(LEVELS[levels], writers=2, readers=2)
    x = torch.randn(2, 15, DIM, requires_grad=True)
    got, expected = mine(x), ours(x)
    close({"y": got.y, **got.aux}, {"y": expected.y, **expected.aux})
    grads, wanted = slopes(mine, x, got), slopes(ours, x, expected)
    turned = {name: value.mT if name.startswith("init") else value for name, value in grads.items()}
    close(turned, wanted)


def slopes(memory, x, out):
    """The outer gradient of what was read and of the surprise, by name."""
    named = {"x": x, **dict(memory.named_parameters())}
    loss = out.y.sin().sum() + out.aux["surprise"].sum()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("levels", ["whole-chunks", "period-1"])
def test_a_module_of_any_shapes_streams(levels):
    torch.manual_seed(1)
    memory = FastWeights(DIM, LEVELS[levels], HEADS, network=path(Gated), chunk=4)
    x = torch.randn(2, 19, DIM)
    whole = memory(x)
    first = memory(x[:, :7])
    second = memory(x[:, 7:], first.state)
    torch.testing.assert_close(torch.cat([first.y, second.y], 1), whole.y)
    close(tensors(second._replace(y=whole.y, aux={})), tensors(whole._replace(aux={})))
    assert (memory(x[:1]).y - whole.y[:1]).abs().max() < 1e-12


def test_only_the_state_and_the_slow_weights_hold_the_modules_parameters():
    memory = FastWeights(DIM, LEVELS["whole-chunks"], HEADS, network=path(Gated), chunk=4)
    assert not [name for name, _ in memory.named_parameters() if "layers" in name or "mix" in name]
    assert [tuple(weight.shape) for weight in memory.init] == [(2, 2, 9), (2, 4, 3), (2, 1, 4), (2, 3, 4), (2, 1, 3)]


@pytest.mark.parametrize(
    ("network", "settings", "told"),
    [
        (path(Normed), {}, "has buffers .norm.running_mean"),
        (path(Wide), {}, r"makes \[3, 4\] of \[3, 3\]; it has to make \[3, 3\]"),
        (path(Empty), {}, "has no parameters"),
        (path(Gated).replace("Gated", "Gatde"), {}, "there is no 'Gatde' in"),
        (path(Gated), {"hidden": [4]}, "hidden is for mlp and swiglu"),
        (path(Gated), {"bias": True}, "bias is for mlp and swiglu"),
        (path(Gated), {"signal_at": "token"}, "chunk to 1"),
        ("mlb", {}, "no memory network 'mlb' .mlp, swiglu"),
    ],
    ids=lambda value: value[-24:] if isinstance(value, str) else "",
)
def test_what_a_module_cannot_be_is_told(network, settings, told):
    with pytest.raises(ValueError, match=told):
        FastWeights(DIM, LEVELS["whole-chunks"], HEADS, network=network, chunk=4, **settings)
