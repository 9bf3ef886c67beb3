"""The gates that every memory passes (DESIGN section 2), and the memories that pass them.

A memory joins by one line in `MEMORIES`: a name and what builds it with `dim=DIM`. A gate is a function of an `Entry`;
test_conformance.py runs every gate on every entry. A gate asks only what the protocol promises, `(y, state, aux)` with
`aux` per token; an entry names the gates that its memory documents not to pass.

Longer than most files: one table, and a gate a function, which are read beside each other.
"""

from __future__ import annotations

import copy
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losses.recall import cosine, dot_product, mse
from metamem.config.schema import ConnectionConfig, RouterConfig
from metamem.controllers import LSTM
from metamem.memory.base import Memory, Out
from metamem.memory.cell import MemoryCell
from metamem.memory.context import MemoryAsContext
from metamem.memory.fast_weights import FastWeights
from metamem.memory.gated_residual import GatedResidual
from metamem.memory.level import TokenLevel
from metamem.memory.mnm import MNM
from metamem.memory.signals import Objective, Signal
from metamem.memory.slots import (
    DNC,
    NTM,
    SAM,
    SDNC,
    DenseOptions,
    DNCOptions,
    Episodic,
    EpisodicOptions,
    KeyValue,
    NTMOptions,
    ReadOptions,
    SDNCOptions,
    SparseOptions,
    Window,
)
from metamem.network import Network
from metamem.state import State, flatten, leaves, load_state, save_state, state_bytes

DIM, TIME = 8, 13  # TIME: three chunks of four and one token of a fourth
DEVICE = os.environ.get("METAMEM_DEVICE", "cpu")

if DEVICE == "cuda":  # gates that compare to the last bit: a GPU adds up scattered writes in any order if it is let
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


@dataclass(frozen=True)
class Entry:
    """A memory of the suite; `exempt`: the gates that it documents not to pass."""

    make: Callable[[], Memory]
    exempt: frozenset[str] = frozenset()

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Memory:
        """The memory with random slow weights: gates that start at zero would hide what depends on them."""
        torch.manual_seed(seed)
        memory = self.make()
        with torch.no_grad():
            for parameter in memory.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return memory.to(DEVICE, dtype)


def fast(lr_max: float = 0.2, **settings) -> TokenLevel:
    return TokenLevel("fast", {mse: 1.0}, lr_max=lr_max, **settings)


def slow(period: int, objective: Objective = mse, **settings) -> TokenLevel:
    return TokenLevel("slow", {objective: 1.0}, period=period, lr_max=0.1, **settings)


def only(objective: Objective, **settings) -> TokenLevel:
    return TokenLevel("only", {objective: 1.0}, **settings)


def chain(*periods: int) -> Network:
    """Memories one after the other; as a network, it has no write or read alone, nor one objective that descends."""
    memories = [FastWeights(DIM, [slow(period)], 2, hidden=[6], chunk=period) for period in periods]
    names = [f"every{period}" for period in periods]
    ends = zip(["in", *names], [*names, "out"], strict=True)
    connections = [ConnectionConfig(source=[source], to=to) for source, to in ends]
    return Network(dict(zip(names, memories, strict=True)), connections)


def mnm(signal: Signal) -> MNM:
    return MNM(DIM, [fast(signal=signal)], hidden=6, width=5, heads=2)


# Slots have no objective of their own; what a read moves, its heads, is state that the write before it has not.
SLOTS_EXEMPT = frozenset({"descent", "write_then_read"})
# A GPU multiplies what SDNC scatters in any order, which the last bits show, and a cosine with an emptied slot more.
SDNC_EXEMPT = SLOTS_EXEMPT | (
    {"no_grad", "copying", "saving", "reset_of_all", "reset_of_rows", "one_token_at_a_time", "streaming_law"}
    | {"training_and_evaluation_are_one", "streaming_token_by_token", "isolation", "nothing_is_mutated"}
    if DEVICE == "cuda"
    else frozenset()
)
SIZES: dict[str, Any] = {"slots": 6, "word": 5, "dim_out": DIM}
SPARSE: dict[str, Any] = {**SIZES, "slots": 12, "k": 3, "pass_through": True}  # all slots in use before the end
# A token moves MNM's controller: the same token is another key the next time, and a read after a write a step more.
MNM_EXEMPT = frozenset({"descent", "write_then_read"})
LEARNED = {"momentum": "learned", "forget": "learned"}
MEMORIES = {
    "delta": Entry(lambda: FastWeights(DIM, [fast()], heads=2, chunk=4, signal_at="token")),
    "gated-delta-momentum": Entry(
        lambda: FastWeights(DIM, [fast(**LEARNED, forget_to="zero")], heads=2, chunk=4, signal_at="token", writers=2)
    ),
    "delta-two-levels": Entry(
        lambda: FastWeights(DIM, [fast(**LEARNED), slow(8, **LEARNED)], heads=2, chunk=4, signal_at="token", readers=2)
    ),
    "titans-like": Entry(
        lambda: FastWeights(DIM, [fast(**LEARNED, forget_to="zero")], heads=2, hidden=[6], chunk=4),
    ),
    "mlp3-two-levels": Entry(
        lambda: FastWeights(
            DIM, [fast(0.02, **LEARNED), slow(2, forget=0.1, forget_to="zero")], 2, hidden=[6, 5], chunk=4, writers=2
        )
    ),
    "deep-token": Entry(
        lambda: FastWeights(DIM, [fast(**LEARNED)], heads=2, hidden=[6], chunk=1, signal_at="token", activation="gelu")
    ),
    "two-objectives": Entry(
        lambda: FastWeights(DIM, [fast(0.02), slow(8, objective=cosine, reduction="mean")], 2, hidden=[6], chunk=8)
    ),
    "hebbian": Entry(
        lambda: FastWeights(
            DIM, [only(dot_product, signal="hebbian", lr=1.0)], 2, feature_map="elu", signal_at="token", chunk=4
        )
    ),
    "delta-product": Entry(
        lambda: FastWeights(
            DIM,
            [fast(forget="learned", forget_to="zero")],
            2,
            writers=2,
            writes="in_turn",
            signal_at="decayed",
            chunk=4,
        )
    ),
    "predicted-targets": Entry(  # a step towards what each layer predicts, not down the objective
        lambda: FastWeights(DIM, [fast(0.05, signal="predicted_targets", **LEARNED)], 2, hidden=[6], chunk=4),
        exempt=frozenset({"descent"}),
    ),
    "ttt-mlp": Entry(
        lambda: FastWeights(
            DIM, [fast(0.02)], 2, expansion=[2], activation="gelu", bias=True, residual_norm=True, chunk=4
        )
    ),
    "lact": Entry(
        lambda: FastWeights(
            DIM,
            [only(dot_product, period=4, transform="muon", weight_norm=True)],
            2,
            network="swiglu",
            expansion=[2],
            feature_map="silu_unit",
            chunk=4,
        )
    ),
    "atlas": Entry(
        lambda: FastWeights(
            DIM, [only(mse, period=4, window=7, transform="muon", step=0.1, **LEARNED)], 2, expansion=[2], chunk=4
        )
    ),
    "omega": Entry(lambda: FastWeights(DIM, [fast(0.02, window=6, **LEARNED)], 2, expansion=[2], chunk=4)),
    "cms": Entry(lambda: chain(4, 8), exempt=frozenset({"descent", "write_then_read"})),
    "mnm-g": Entry(lambda: mnm("backprop"), MNM_EXEMPT),
    "mnm-p": Entry(lambda: mnm("predicted_targets"), MNM_EXEMPT),
    "dnc": Entry(lambda: DNC(DIM, DNCOptions(**SIZES, write_heads=2, pass_through=True)), SLOTS_EXEMPT),
    "dnc-learned-start": Entry(
        lambda: DNC(DIM, DNCOptions(**SIZES, initial="learned", normalisation="layer", sharp_links=True)), SLOTS_EXEMPT
    ),
    "sam": Entry(lambda: SAM(DIM, SparseOptions(**SPARSE, write_heads=2)), SLOTS_EXEMPT),
    "sdnc": Entry(lambda: SDNC(DIM, SDNCOptions(**SPARSE, write_heads=2, links=4)), SDNC_EXEMPT),
    "episodic": Entry(lambda: Episodic(DIM, EpisodicOptions(**{**SPARSE, "slots": 16, "k": 16})), SLOTS_EXEMPT),
    "key-value": Entry(lambda: KeyValue(DIM, DenseOptions(**SIZES, initial="random")), SLOTS_EXEMPT),
    "window": Entry(lambda: Window(DIM, ReadOptions(**{**SIZES, "slots": 16})), SLOTS_EXEMPT),
    "ntm": Entry(lambda: NTM(DIM, NTMOptions(**SIZES, write_heads=2)), SLOTS_EXEMPT),
}
CONTROLLED = frozenset({"descent", "write_then_read"})  # as MNM's, and a cell measures by its memories' names
MEMORIES["cell"] = Entry(lambda: MemoryCell(DIM, LSTM(DIM, 6), {"long": MEMORIES["delta"].make()}), CONTROLLED)
MEMORIES["gated-residual"] = Entry(lambda: GatedResidual(MEMORIES["delta"].make()))


def as_context(name: str, segment: int, persistent: int) -> Entry:
    """Exempt from `descent`: what attention makes of a token that comes again changes as it comes."""
    return Entry(
        lambda: MemoryAsContext(DIM, MEMORIES[name].make(), heads=2, segment=segment, persistent=persistent),
        exempt=frozenset({"descent"}),
    )


def routed(*levels: TokenLevel, kind: str, by: str, input: str = "token", **settings) -> FastWeights:
    blocks = 2 if by == "block" else None
    router = RouterConfig(kind=kind, input=input, granularity=by, blocks=blocks)  # pyright: ignore[reportArgumentType]
    return FastWeights(DIM, levels, 2, router=router, **settings)


MEMORIES |= {
    "routed-blocks": Entry(
        lambda: routed(fast(**LEARNED), slow(8, **LEARNED), kind="dense", by="block", signal_at="token", chunk=4)
    ),
    "routed-layers": Entry(  # a token that holds, or is written at the slow level, lowers nothing at once
        lambda: routed(fast(0.05, window=6), slow(4), kind="topk", by="layer", hidden=[6], chunk=4, writers=2),
        exempt=frozenset({"descent"}),
    ),
    "routed-heads": Entry(
        lambda: routed(fast(), slow(4), kind="binary", by="head", signal_at="token", chunk=4),
        exempt=frozenset({"descent"}),
    ),
    "routed-chunks": Entry(  # a group that is always open has no age to learn from
        lambda: routed(fast(0.05, **LEARNED), slow(8), kind="dense", by="block", input="chunk", hidden=[6], chunk=4),
        exempt=frozenset({"optimizer_step"}),
    ),
}
MEMORIES["context-delta"] = as_context("delta", segment=5, persistent=2)
MEMORIES["context-titans"] = as_context("titans-like", segment=4, persistent=0)

GATES: dict[str, Callable[[Entry], None]] = {}


def gate(function: Callable[[Entry], None]) -> Callable[[Entry], None]:
    GATES[function.__name__] = function
    return function


# What gates compare


def tensors(out: Out) -> dict[str, Tensor]:
    """Everything that a memory gives, by name."""
    named = {f"state/{key}": value for key, value in flatten(out.state).items() if value is not None}
    return {"y": out.y, **{f"aux/{key}": value for key, value in out.aux.items()}, **named}


def close(one: dict[str, Tensor], other: dict[str, Tensor], rounding: float = 1.0) -> None:
    """Equal up to float64's rounding, some times over."""
    assert one.keys() == other.keys()
    for name in one:
        named = {"msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(one[name], other[name], rtol=rounding * 1e-8, atol=rounding * 1e-10, **named)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def of_rows(named: dict[str, Tensor], rows: Tensor | list[int]) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in named.items()}


def loss(out: Out) -> Tensor:
    """A scalar that depends on every number of what a memory gives, each in its own way."""
    generator = torch.Generator().manual_seed(7)
    total = out.y.new_zeros(())
    for _, tensor in sorted(tensors(out).items()):
        if tensor.is_floating_point():
            weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            total = total + (weight * tensor).sum()
    return total


def gradients(memory: Memory, x: Tensor, out: Out) -> dict[str, Tensor]:
    """The outer gradient of `loss`: of x and every slow weight."""
    of = {"x": x, **dict(memory.named_parameters())}
    return dict(zip(of, torch.autograd.grad(loss(out), list(of.values())), strict=True))


def stream(memory: Memory, x: Tensor, cuts: Iterable[int], state: State | None = None) -> Out:
    """x in pieces that end at `cuts`, with the state carried from piece to piece."""
    pieces, start = [], 0
    for stop in [*sorted(cuts), x.shape[1]]:
        out = memory(x[:, start:stop], state)
        pieces, start, state = [*pieces, out], stop, out.state
    aux = {name: torch.cat([piece.aux[name] for piece in pieces], 1) for name in pieces[0].aux}
    return Out(torch.cat([piece.y for piece in pieces], 1), pieces[-1].state, aux)


def tokens(batch: int = 2, time: int = TIME, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, time, DIM, dtype=dtype).to(DEVICE)


def midstream(memory: Memory, batch: int, time: int = 6) -> State:
    """A state in the middle of a chunk and of a period."""
    with torch.no_grad():
        return memory(tokens(batch, time, next(memory.parameters()).dtype)).state


CUTS = st.sets(st.integers(1, TIME - 1), max_size=TIME - 1)


# The gates


@gate
def causality(entry: Entry) -> None:
    """Changing x_t changes nothing before t, and something at t or after."""
    memory, x = entry.build(), tokens(1)
    changed = x.repeat(TIME, 1, 1)
    changed[range(TIME), range(TIME)] += tokens(1)[0]
    with torch.no_grad():
        before, after = memory(x), memory(changed)
    for name in ["y", *(f"aux/{key}" for key in before.aux)]:
        same, moved = tensors(before)[name], tensors(after)[name]
        for t in range(TIME):
            torch.testing.assert_close(moved[t, :t], same[0, :t], rtol=0, atol=1e-13 if DEVICE == "cpu" else 1e-11)
            if name == "y":
                assert not torch.allclose(moved[t, t:], same[0, t:], atol=1e-6)


@gate
def writes_are_read(entry: Entry) -> None:
    """Every token moves what later tokens read: it is not only an input of its own output."""
    memory, x = entry.build(), tokens(1)
    jacobian = torch.autograd.functional.jacobian(lambda x: memory(x).y[0, -1], x)  # [DIM, 1, TIME, DIM]
    reach = jacobian.abs().amax((0, 1, 3))
    assert (reach > 1e-9).all(), f"tokens that the last one does not depend on: {(reach <= 1e-9).nonzero().tolist()}"


@gate
def isolation(entry: Entry) -> None:
    """Rows of a batch do not see each other."""
    memory, x = entry.build(), tokens(4)
    order = [2, 0, 3, 1]
    changed = x.clone()
    changed[1] = torch.randn_like(changed[1])
    with torch.no_grad():
        whole = tensors(memory(x))
        close(tensors(memory(x[order])), of_rows(whole, order))
        close(of_rows(tensors(memory(changed)), [0, 2, 3]), of_rows(whole, [0, 2, 3]))
        for row in range(4):
            close(tensors(memory(x[row : row + 1])), of_rows(whole, [row]))


@gate
def isolation_of_gradients(entry: Entry) -> None:
    """The loss of a row has no gradient to another row's input."""
    memory, x = entry.build(), tokens(3).requires_grad_()
    gradient = torch.autograd.grad(memory(x).y[1].square().sum(), x)[0]
    assert gradient[1].abs().amax(-1).gt(0).all()
    assert gradient[[0, 2]].eq(0).all()


@gate
def streaming_law(entry: Entry) -> None:
    """Any split gives the same outputs, state and gradients as one call."""
    memory, x = entry.build(), tokens().requires_grad_()
    out = memory(x)
    expected, slopes = tensors(out), gradients(memory, x, out)

    @settings(max_examples=8)
    @given(cuts=CUTS)
    def law(cuts: set[int]) -> None:
        pieces = stream(memory, x, cuts)
        close(tensors(pieces), expected)
        close(gradients(memory, x, pieces), slopes)

    law()


@gate
def streaming_token_by_token(entry: Entry) -> None:
    """The finest split, on from the middle of a stream."""
    memory, x = entry.build(), tokens()
    state = midstream(memory, 2)
    with torch.no_grad():
        close(tensors(stream(memory, x, range(1, TIME), state)), tensors(memory(x, state)))


def reset_in_midstream(memory: Memory, x: Tensor, at: int, rows: list[bool], cuts: set[int]) -> None:
    """Rows of x that are reset after `at` tokens go on as fresh ones, the others as if nothing happened."""
    chosen = torch.tensor(rows)
    first = memory(x[:, :at])
    state = memory.reset_state(first.state, chosen)
    rest = stream(memory, x[:, at:], {cut - at for cut in cuts if cut > at}, state)
    if any(rows):
        close(of_rows(tensors(rest), chosen), tensors(memory(x[chosen, at:])))
    if not all(rows):
        whole = memory(x[~chosen])
        late = Out(whole.y[:, at:], whole.state, {key: value[:, at:] for key, value in whole.aux.items()})
        close(of_rows(tensors(rest), ~chosen), tensors(late))
    gradient = torch.autograd.grad(rest.y.square().sum(), x)[0]
    assert gradient[chosen, :at].eq(0).all(), "a row that was reset still sees what came before"
    assert gradient[~chosen, :at].abs().amax(-1).gt(0).all(), "a row that was not has lost its past"


@gate
def reset_of_rows(entry: Entry) -> None:
    """A row that is reset in mid-stream goes on as a fresh one, the others as if nothing happened."""
    memory = entry.build()
    x = tokens(3).requires_grad_()

    @settings(max_examples=6)
    @given(at=st.integers(1, TIME - 1), rows=st.lists(st.booleans(), min_size=3, max_size=3), cuts=CUTS)
    def law(at: int, rows: list[bool], cuts: set[int]) -> None:
        reset_in_midstream(memory, x, at, rows, cuts)

    law()


@gate
def reset_of_all(entry: Entry) -> None:
    """Without rows, a reset is the state that a memory starts with."""
    memory = entry.build()
    state = memory.reset_state(midstream(memory, 2))
    fresh = memory.init_state(2)
    equal(dict(_named(state)), dict(_named(fresh)))
    x = tokens()
    with torch.no_grad():
        equal(tensors(memory(x, state)), tensors(memory(x)))


@gate
def descent(entry: Entry) -> None:
    """The first write lowers its own objective: of a token that comes again and again, the surprise stays until the
    signals are refreshed, and then is less. The entry's learning rates are small."""
    memory = entry.build()
    with torch.no_grad():
        surprise = memory(tokens(64, 1).expand(-1, TIME, -1)).aux["surprise"]
    change = surprise[:, 1:] - surprise[:, :1]
    first = (change.abs() > 1e-12).int().argmax(1, keepdim=True)
    assert (change.gather(1, first) < 0).all()


@gate
def optimizer_step(entry: Entry) -> None:
    """Every slow weight has a finite gradient with no row or column that is always zero, and an optimizer moves it."""
    memory = entry.build()
    before = copy.deepcopy(dict(memory.named_parameters()))
    out = memory(tokens(4, 2 * TIME))
    out.y.square().sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None, f"{name} is unused"
        assert parameter.grad.isfinite().all(), name
        for axis in range(parameter.ndim):
            used = parameter.grad.abs().movedim(axis, 0).unsqueeze(-1).flatten(1).sum(1)
            assert (used > 0).all(), f"{name}: no gradient at {(used == 0).nonzero().flatten().tolist()} of axis {axis}"
    torch.optim.AdamW(memory.parameters(), lr=1e-2, weight_decay=0.0).step()
    for name, parameter in memory.named_parameters():
        assert not torch.allclose(parameter, before[name]), name


@gate
def training_descends(entry: Entry) -> None:
    """A few optimizer steps lower the loss that they are taken on."""
    memory, x, target = entry.build(), tokens(4), tokens(4)
    optimizer = torch.optim.Adam(memory.parameters(), lr=1e-2)
    history = []
    for _ in range(8):
        error = (memory(x).y - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        history.append(error.item())
    assert min(history[1:]) < 0.97 * history[0], history


@gate
def saving(entry: Entry) -> None:
    """Slow weights by torch.save and a weights_only load, the state by save_state: the same memory goes on."""
    memory, other = entry.build(), entry.build(seed=1)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    state, x = midstream(memory, 2), tokens()
    with tempfile.TemporaryDirectory() as folder:
        save_state(state, Path(folder) / "state.safetensors", {"tokens": "6"})
        loaded, metadata = load_state(Path(folder) / "state.safetensors", DEVICE)
    assert metadata == {"tokens": "6"}
    with torch.no_grad():
        expected = tensors(memory(x, state))
        equal(tensors(other(x, loaded)), expected)


@gate
def copying(entry: Entry) -> None:
    """A deep copy and a whole-module pickle go on alike, and apart."""
    memory = entry.build()
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    others = [copy.deepcopy(memory), torch.load(file, weights_only=False)]
    state, x = midstream(memory, 2), tokens()
    with torch.no_grad():
        expected = tensors(memory(x, state))
        for other in others:
            equal(tensors(other(x, state)), expected)
            next(other.parameters()).zero_()
            equal(tensors(memory(x, state)), expected)


@gate
def constant_size(entry: Entry) -> None:
    """The state has the size that it starts with, however much was read; so have its keys, shapes and types."""
    memory = entry.build()
    fresh, short, long = memory.init_state(2), midstream(memory, 2, 1), midstream(memory, 2, 5 * TIME)
    assert state_bytes(fresh) == state_bytes(short) == state_bytes(long)
    assert list(flatten(fresh)) == list(flatten(short)) == list(flatten(long))
    shapes = [{key: (value.shape, value.dtype) for key, value in _named(state)} for state in (fresh, short, long)]
    assert shapes[0] == shapes[1] == shapes[2]


@gate
def no_grad(entry: Entry) -> None:
    """Without gradients, and in inference mode, the same numbers to the last bit."""
    memory, x = entry.build(), tokens()
    out = memory(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            quiet = memory(x)
        equal(tensors(quiet), tensors(out))
        assert not any(tensor.requires_grad for tensor in tensors(quiet).values())


@gate
def nothing_is_mutated(entry: Entry) -> None:
    """Input, incoming state and slow weights are as they were; so is the order and structure of the state."""
    memory, x = entry.build(), tokens()
    state = midstream(memory, 2)
    watched = {"x": x, **dict(_named(state)), **dict(memory.named_parameters()), **dict(memory.named_buffers())}
    copies = {name: tensor.detach().clone() for name, tensor in watched.items()}
    versions = {name: tensor._version for name, tensor in watched.items()}
    keys = list(flatten(state))
    out = memory(x, state)
    memory.reset_state(out.state, torch.tensor([True, False]))
    loss(out).backward()
    assert versions == {name: tensor._version for name, tensor in watched.items()}
    equal(copies, {name: tensor.detach() for name, tensor in watched.items()})
    assert list(flatten(state)) == keys == list(flatten(out.state))


@gate
def training_and_evaluation_are_one(entry: Entry) -> None:
    """`eval()` changes nothing: adaptation computes what training did."""
    memory, x = entry.build(), tokens()
    with torch.no_grad():
        equal(tensors(memory.train()(x)), tensors(memory.eval()(x)))


@gate
def detachment(entry: Entry) -> None:
    """A detached state holds the same numbers and no graph; gradients after it do not reach what came before."""
    memory, x = entry.build(), tokens().requires_grad_()
    first = memory(x[:, :6])
    state = memory.detach_state(first.state)
    equal(dict(_named(state)), {key: value.detach() for key, value in _named(first.state)})
    assert not any(tensor.requires_grad for tensor in leaves(state))
    gradient = torch.autograd.grad(memory(x[:, 6:], state).y.square().sum(), x)[0]
    assert gradient[:, :6].eq(0).all()
    assert gradient[:, 6:].abs().amax(-1).gt(0).all()


def _finite(memory: Memory, x: Tensor, autocast: bool) -> None:
    x.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext():
        first = memory(x)
        out = memory(x, memory.detach_state(first.state))
    (loss(first) + loss(out)).float().backward()
    for name, tensor in {**tensors(out), "x": x.grad, **{n: p.grad for n, p in memory.named_parameters()}}.items():
        assert tensor is not None and tensor.isfinite().all(), name


@gate
def finite_in_bfloat16(entry: Entry) -> None:
    """A bfloat16 module; the state that it carries keeps its types."""
    memory = entry.build(torch.bfloat16)
    assert memory(tokens(dtype=torch.bfloat16)).y.dtype == torch.bfloat16
    _finite(memory, tokens(dtype=torch.bfloat16), autocast=False)


@gate
def finite_under_autocast(entry: Entry) -> None:
    """bfloat16 autocast around float32 weights, on float32 and, as after another layer, bfloat16 input."""
    for dtype in (torch.float32, torch.bfloat16):
        _finite(entry.build(torch.float32), tokens(dtype=dtype), autocast=True)


@gate
def finite_on_hostile_input(entry: Entry) -> None:
    """Zeros, one token again and again, tiny tokens: outputs and gradients stay finite."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4 * TIME, DIM, generator=generator).to(DEVICE)
    hostile = {"zeros": 0 * x, "constant": x[:, :1].expand_as(x).clone(), "tiny": 1e-6 * x}
    for name, tensor in hostile.items():
        try:
            _finite(entry.build(torch.float32), tensor, autocast=False)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@gate
def one_token_at_a_time(entry: Entry) -> None:
    """A batch of one and a call of one token; an empty call reads nothing and changes nothing."""
    memory = entry.build()
    with torch.no_grad():
        out = memory(tokens(1, 1))
        assert out.y.shape == (1, 1, DIM)
        nothing = memory(tokens(1, 0), out.state)
    assert nothing.y.shape == (1, 0, DIM)
    equal(dict(_named(nothing.state)), dict(_named(out.state)))


@gate
def write_then_read(entry: Entry) -> None:
    """The forward of one token is its write, then its read; reading writes nothing."""
    memory, x = entry.build(), tokens(2, 1)
    state = midstream(memory, 2)
    with torch.no_grad():
        out = memory(x, state)
        written = memory.write(x, state)
        read, after = memory.read(x, written)
    equal(dict(_named(written)), dict(_named(out.state)))
    torch.testing.assert_close(read, out.y, rtol=1e-9, atol=1e-11)
    equal(dict(_named(after)), dict(_named(written)))


@gate
def names(entry: Entry) -> None:
    """No parameter, buffer or key that safetensors, a config's globs or torch could not name."""
    memory = entry.build()
    parts = [part for name in memory.state_dict() for part in name.split(".")]
    parts += [part for key in flatten(memory.init_state(1)) for part in key.split("/")]
    assert all(part.isidentifier() or part.isdigit() for part in parts), parts


def _named(state: State) -> Iterator[tuple[str, Tensor]]:
    return ((key, value) for key, value in flatten(state).items() if value is not None)
