"""What each option of a slot memory changes, and nothing else: the parts of one interface vector, or what is read with
one set of weights."""

import dataclasses

import pytest
import torch
from torch import Tensor

from metamem.memory.slots import DNC, NTM, SAM, DenseOptions, DNCOptions, NTMOptions, SDNCOptions, SparseOptions
from metamem.memory.slots.episodic import EpisodicOptions
from metamem.memory.slots.options import ReadOptions
from metamem.registry import MODULES

DIM, SLOTS, WORD, TIME = 5, 16, 4, 6
SMALL = {"slots": SLOTS, "word": WORD}
KINDS = {
    "dnc": DNCOptions,
    "ntm": NTMOptions,
    "sam": SparseOptions,
    "sdnc": SDNCOptions,
    "episodic": EpisodicOptions,
    "key_value": DenseOptions,
    "window": ReadOptions,
}


@pytest.fixture(autouse=True)
def _exact(float64):
    pass


def label(part):
    """A test's name, the same in every process: an option and its value, a function, what is changed."""
    if isinstance(part, dict):
        return "-".join(key if callable(value) else f"{key}={value}" for key, value in part.items())
    return getattr(part, "__name__", part)


def parts(rule):
    """The parts that a rule makes of one interface vector, each part's numbers the same whatever the others are."""
    vectors = []
    for name, shape in rule.shapes.items():
        torch.manual_seed(sum(map(ord, name)))
        size = torch.Size(shape).numel()
        vectors.append(torch.randn(2, 64)[:, :size])  # a part that is shorter is the start of a longer one
    found = rule.parts(torch.cat(vectors, 1))
    flat = {}
    for name, value in found._asdict().items():
        nested = value._asdict() if hasattr(value, "_asdict") else {"": value}
        flat |= {f"{name}.{key}".rstrip("."): item for key, item in nested.items()}
    return flat


def differing(one, other):
    same = {
        name
        for name in one
        if one[name] is other[name]
        or (isinstance(one[name], Tensor) and isinstance(other[name], Tensor) and torch.equal(one[name], other[name]))
        or (isinstance(one[name], float) and one[name] == other[name])
    }
    return set(one) - same


def steeper(before, after):
    torch.testing.assert_close(after, torch.sigmoid(5 * before.logit()))


def decided(before, after):
    assert torch.equal(after, (before > 0.5).double())


def paper(before, after):
    torch.testing.assert_close(after, 1 + before)


def at_least_one(before, after):
    assert before is None and (after >= 1).all()


def wider(before, after):
    assert after.shape[-1] == before.shape[-1] + 2


GATES = {
    "dnc": ["free", "share", "amount"],
    "ntm": ["reads.gate", "writes.gate"],
    "sam": ["share", "amount"],
    "sdnc": ["sam.share", "sam.amount"],
    "episodic": ["amount"],
    "key_value": ["amount"],
}
GATED = {**{kind: names[-1:] for kind, names in GATES.items()}, "ntm": GATES["ntm"]}
STRENGTHS = {
    "dnc": ["read_strengths", "write_strengths"],
    "ntm": ["reads.strengths", "writes.strengths"],
    "sam": ["strengths"],
    "sdnc": ["sam.strengths"],
    "episodic": ["strengths"],
    "key_value": ["read_strengths", "write_strengths"],
    "window": ["strengths"],
}
OF_PARTS = [  # kind, an option, what of a token's parts it changes, and to what
    *((kind, {"gate": "hard"}, dict.fromkeys(names, decided)) for kind, names in GATES.items()),
    *((kind, {"gate": "steep_sigmoid"}, dict.fromkeys(names, steeper)) for kind, names in GATES.items()),
    *((kind, {"gating": False}, dict.fromkeys(names)) for kind, names in GATED.items()),
    *((kind, {"sharpness": "oneplus"}, dict.fromkeys(names, paper)) for kind, names in STRENGTHS.items()),
    *((kind, {"sharpness": 3.0}, dict.fromkeys(names, 3.0)) for kind, names in STRENGTHS.items()),
    *((kind, {"erase": False}, {"erase": None}) for kind in ("dnc", "ntm", "key_value")),
    ("dnc", {"freeing": False}, {"free": None}),
    ("dnc", {"sharp_links": True}, {"powers": at_least_one}),
    ("ntm", {"gamma": 2.0}, {"reads.gamma": 2.0, "writes.gamma": 2.0}),
    ("ntm", {"shifts": 2}, {"reads.shifts": wider, "writes.shifts": wider}),
]


@pytest.mark.parametrize(("kind", "option", "changes"), OF_PARTS, ids=label)
def test_an_option_changes_the_parts_that_it_names_and_no_other(kind, option, changes):
    before, after = (parts(MODULES.build(kind, {"dim": DIM, **SMALL, **given}).rule) for given in ({}, option))
    assert differing(before, after) == set(changes)
    for name, wanted in changes.items():
        if callable(wanted):
            wanted(before[name], after[name])
        else:
            assert after[name] == wanted, name


def both(kind, option, **given):
    """Two memories of one set of weights, the second with an option."""
    memories = []
    for options in (given, {**given, **option}):
        torch.manual_seed(0)
        memories.append(MODULES.build(kind, {"dim": DIM, **SMALL, **options}).double())
    one, other = memories
    for name, parameter in other.named_parameters():
        if name in (own := dict(one.named_parameters())) and own[name].shape == parameter.shape:
            parameter.data.copy_(own[name].data)
    return one, other


def run(memory):
    torch.manual_seed(1)
    return memory(torch.randn(3, TIME, DIM))


def states(one, other):
    return {name for name in one.state if not torch.equal(one.state[name], other.state[name])}


def by_head(out):
    return out.y.detach().unflatten(-1, (-1, WORD))


def normalised(one, other):
    mean, variance = by_head(one).mean(-1, keepdim=True), by_head(one).var(-1, keepdim=True, correction=0)
    torch.testing.assert_close(by_head(other), (by_head(one) - mean) / (variance + 1e-5).sqrt())


def root_mean_square(one, other):
    scale = (by_head(one).square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(by_head(other), by_head(one) / scale)


def dropped(one, other):
    torch.testing.assert_close(other.y, torch.where(other.y == 0, 0.0, 2 * one.y))
    assert 0.3 < (other.y == 0).double().mean() < 0.7


def passed(one, other):
    torch.manual_seed(1)
    torch.testing.assert_close(other.y, torch.cat([one.y, torch.randn(3, TIME, DIM)], -1))


def projected(one, other):
    assert other.y.shape[-1] == 3


def same(one, other):
    torch.testing.assert_close(one.y, other.y, rtol=0, atol=0)


OF_READ_OUT = [
    ({"normalisation": "layer"}, normalised),
    ({"normalisation": "rms"}, root_mean_square),
    ({"dropout": 0.5}, dropped),
    ({"pass_through": True}, passed),
    ({"dim_out": 3}, projected),
    ({"trace": True}, same),
    ({"clip": 100.0}, same),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("option", "check"), OF_READ_OUT, ids=label)
def test_an_option_of_the_read_out_changes_no_state(kind, option, check):
    one, other = map(run, both(kind, option))
    assert states(one, other) == set()
    check(one, other)


def test_dropout_is_of_training_alone():
    one, other = (run(memory.eval()) for memory in both("dnc", {"dropout": 0.5}))
    same(one, other)


def test_the_interface_is_clipped():
    one, other = both("dnc", {"clip": 0.1})
    x = torch.randn(3, DIM)
    torch.testing.assert_close(other.interface(x), one.interface(x).clamp(-0.1, 0.1))
    assert one.interface(x).abs().max() > 0.1


def test_fewer_heads_slots_and_words_are_fewer():
    memory = DNC(DIM, DNCOptions(slots=9, word=3, read_heads=4, write_heads=2))
    shapes = {name: tuple(value.shape[1:]) for name, value in memory.init_state(1).items()}
    assert shapes == {
        "memory": (9, 3), "usage": (9,), "links": (2, 9, 9), "precedence": (2, 9), "write_weights": (2, 9),
        "read_weights": (4, 9),
    }  # fmt: skip
    assert memory.dim_out == 12


def test_top_k_leaves_all_but_k_slots_unread():
    option = {"top_k": 2}
    ntm = NTM(DIM, NTMOptions(**SMALL, **option, gating=False, shifts=0, gamma=1.0))
    assert ((run(ntm).state["read_weights"] > 1e-20).sum(-1) == 2).all()
    one, other = both("dnc", option)
    assert differing(parts(one.rule), parts(other.rule)) == set()


@pytest.mark.parametrize("initial", ["zeros", "constant", "random", "learned"])
@pytest.mark.parametrize(("kind", "options"), [(DNC, DNCOptions), (NTM, NTMOptions)])
def test_a_memory_starts_as_it_is_told(kind, options, initial):
    memory = kind(DIM, options(**SMALL, initial=initial))
    words = memory.init_state(2)["memory"]
    assert torch.equal(words[0], words[1])
    if initial in ("zeros", "constant"):
        torch.testing.assert_close(words, torch.full_like(words, 0.0 if initial == "zeros" else 1e-6))
    else:
        assert words.std() > 0.1 and "initial" in memory.state_dict()
    assert ("initial" in dict(memory.named_parameters())) == words.requires_grad == (initial == "learned")
    other = kind(DIM, options(**SMALL, initial=initial))
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.init_state(2)["memory"], words), "a memory that is loaded starts as the one that was saved"


def test_a_trace_is_the_state_after_every_token():
    memory = DNC(DIM, DNCOptions(**SMALL, trace=True))
    x = torch.randn(2, TIME, DIM)
    aux, state = memory(x).aux, None
    assert set(aux) == {f"trace.{name}" for name in memory.init_state(1)}
    for t in range(TIME):
        out = memory.step(x[:, t], state)
        state = out.state
        for name, value in state.items():
            assert torch.equal(out.aux[f"trace.{name}"], value)
            torch.testing.assert_close(aux[f"trace.{name}"][:, t], value)
    assert memory(x[:, :0]).aux["trace.links"].shape == (2, 0, 1, SLOTS, SLOTS)


def nonzero(weights):
    return (weights.detach() != 0).sum(-1)


@pytest.mark.parametrize("k", [2, 5])
def test_a_head_reads_k_slots(k):
    memory = SAM(DIM, SparseOptions(**SMALL, k=k, trace=True))
    assert (nonzero(run(memory).aux["trace.read_weights"]) == k).all()


def test_a_sparse_memory_without_erasing_keeps_what_it_writes_over():
    """While slots are empty it is the same; then what was in them stays."""
    one, other = map(run, both("sam", {"erase": False}, slots=60))
    assert states(one, other) == set()
    one, other = map(run, both("sam", {"erase": False}))
    assert "memory" in states(one, other) and not {"time", "touched"} & states(one, other)


def test_links_are_the_largest_few_of_each_row():
    option = {"links": 2}
    one, other = (memory(4 * torch.randn(2, TIME, DIM)) for memory in both("sdnc", option, links=SLOTS, trace=True))
    assert nonzero(one.aux["trace.links"]).max() > 2 >= nonzero(other.aux["trace.links"]).max()


def test_the_oldest_is_evicted_or_the_least_recently_used():
    recent, oldest = map(run, both("episodic", {"eviction": "oldest"}, slots=3, k=1, read_heads=1))
    assert oldest.state["write_slots"].flatten().tolist() == [(TIME - 1) % 3] * 3
    assert (recent.state["accessed"].sum(-1) >= oldest.state["accessed"].sum(-1)).all()
    assert "accessed" in states(recent, oldest)


def test_every_option_is_tested_and_explained():
    tested = {name for _, option, _ in OF_PARTS for name in option}
    tested |= {name for option, _ in OF_READ_OUT for name in option}
    tested |= {"slots", "word", "read_heads", "write_heads", "top_k", "initial", "k", "links", "eviction"}  # above
    tested |= {"compile_step", "index"}  # test_conformance.py, test_slots_sparse.py
    for options in KINDS.values():
        fields = {field.name for field in dataclasses.fields(options)}
        documents = "".join(cls.__doc__ for cls in options.__mro__[:-1])
        assert fields <= tested and [name for name in fields if f"`{name}`" not in documents] == []
