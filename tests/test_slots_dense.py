"""DNC and NTM: values and gradients of the papers' equations, one row and one head after the other; what each option
changes, and nothing else; what a memory promises beyond the conformance suite."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from metamem.memory.slots import DNC, NTM, DenseOptions, NTMOptions
from metamem.memory.slots.interface import parts_of
from metamem.registry import MODULES
from metamem.state import flatten

DIM, SLOTS, WORD, TIME = 5, 6, 4, 6
SMALL = {"slots": SLOTS, "word": WORD}


@pytest.fixture(autouse=True)
def _exact(float64):
    pass


# The papers' equations


def length(x):
    return (x.square().sum() + 1e-6).sqrt()


def content(memory, key, strength):
    alike = torch.stack([(word @ key) / (length(word) * length(key) + 1e-6) for word in memory])
    return torch.softmax(strength * alike, 0)


def allocation(usage):
    usage = 1e-6 + (1 - 1e-6) * usage
    shares, product = [torch.zeros(())] * len(usage), torch.ones(())
    for slot in sorted(range(len(usage)), key=usage.tolist().__getitem__):
        shares[slot] = (1 - usage[slot]) * product
        product = product * usage[slot]
    return torch.stack(shares)


def erase_and_add(memory, written, parts):
    kept = torch.ones_like(memory)
    for head, w in enumerate(written):
        kept = kept * (1 - torch.outer(w, torch.sigmoid(parts["erase"][head])))
    memory = memory * kept
    for head, w in enumerate(written):
        memory = memory + torch.outer(w, parts["values"][head])
    return memory


class PlainDNC:
    """One row; the parts are those of the interface vector."""

    def __init__(self, reads, writes):
        self.reads, self.writes = reads, writes
        self.memory, self.usage = torch.zeros(SLOTS, WORD), torch.zeros(SLOTS)
        self.link, self.precedence = torch.zeros(writes, SLOTS, SLOTS), torch.zeros(writes, SLOTS)
        self.written, self.read = torch.zeros(writes, SLOTS), torch.zeros(reads, SLOTS)

    def token(self, parts):
        reads, writes = self.reads, self.writes
        gates, strengths = torch.sigmoid(parts["gates"]), functional.softplus(parts["strengths"])
        unwritten, kept = torch.ones(SLOTS), torch.ones(SLOTS)
        for w in self.written.detach():
            unwritten = unwritten * (1 - w)
        for head in range(reads):
            kept = kept * (1 - gates[head] * self.read[head])
        self.usage = usage = (self.usage + (1 - self.usage) * (1 - unwritten)) * kept
        written = []
        for head in range(writes):
            share, amount = gates[reads + head], gates[reads + writes + head]
            free = allocation(usage)
            alike = content(self.memory, parts["write_keys"][head], strengths[reads + head])
            written.append(amount * (share * free + (1 - share) * alike))
            usage = usage + (1 - usage) * share * amount * free
        self.memory = erase_and_add(self.memory, written, parts)
        link = []
        for w, p, before in zip(written, self.precedence, self.link, strict=True):
            after = (1 - w[:, None] - w[None, :]) * before + torch.outer(w, p)
            link.append(after - torch.diag(after.diagonal()))
        self.precedence = torch.stack([(1 - w.sum()) * p + w for w, p in zip(written, self.precedence, strict=True)])
        self.link, self.written = torch.stack(link), torch.stack(written)
        read = []
        for head in range(reads):
            modes = torch.softmax(parts["modes"][head], 0)
            w = modes[2 * writes] * content(self.memory, parts["read_keys"][head], strengths[head])
            for writer in range(writes):
                w = w + modes[writer] * (self.link[writer].T @ self.read[head])
                w = w + modes[writes + writer] * (self.link[writer] @ self.read[head])
            read.append(w)
        self.read = torch.stack(read)
        return self.read @ self.memory


class PlainNTM:
    """One row."""

    def __init__(self, reads, writes):
        self.reads, self.writes = reads, writes
        self.memory = torch.full((SLOTS, WORD), 1e-6, dtype=torch.float32).double()
        self.at = torch.zeros(reads + writes, SLOTS)
        self.at[:, 0] = 1

    def moved(self, parts, head):
        w = content(self.memory, parts["keys"][head], functional.softplus(parts["strengths"][head]))
        gate, shifts = torch.sigmoid(parts["gate"][head]), torch.softmax(parts["shifts"][head], 0)
        w = gate * w + (1 - gate) * self.at[head]
        w = torch.stack([sum(w[(i - by) % SLOTS] * shifts[by + 1] for by in (-1, 0, 1)) for i in range(SLOTS)])
        powers = w ** (1 + functional.softplus(parts["gamma"][head]))
        return powers / powers.sum()

    def token(self, parts):
        written = [self.moved(parts, head) for head in range(self.reads, self.reads + self.writes)]
        self.memory = erase_and_add(self.memory, written, parts)
        read = [self.moved(parts, head) for head in range(self.reads)]
        self.at = torch.stack([*read, *written])
        return torch.stack(read) @ self.memory


def plain(kind, memory, x):
    rows = []
    for row in x:
        one, reads = kind(memory.options.read_heads, memory.options.write_heads), []
        for vector in row @ memory.interface.weight.T + memory.interface.bias:
            parts = {name: part[0] for name, part in parts_of(vector[None], memory.rule.shapes).items()}
            reads.append(one.token(parts).flatten())
        rows.append(torch.stack(reads))
    return torch.stack(rows)


@pytest.mark.parametrize("writes", [1, 3])
@pytest.mark.parametrize("kind", ["dnc", "ntm"])
def test_values_and_gradients_are_those_of_the_equations(kind, writes):
    memory = MODULES.build(kind, {"dim": DIM, "read_heads": 2, "write_heads": writes, **SMALL}).double()
    x = (2 * torch.randn(2, TIME, DIM)).requires_grad_()
    y, expected = memory(x).y, plain({"dnc": PlainDNC, "ntm": PlainNTM}[kind], memory, x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(y)
    of = [x, *memory.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((weight * y).sum(), of), torch.autograd.grad((weight * expected).sum(), of), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


# Options


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


def wider(before, after):
    assert after.shape[-1] == before.shape[-1] + 2


GATES = {"dnc": ["free", "share", "amount"], "ntm": ["reads.gate", "writes.gate"]}
STRENGTHS = {"dnc": ["read_strengths", "write_strengths"], "ntm": ["reads.strengths", "writes.strengths"]}
OF_PARTS = [  # kind, an option, what of a token's parts it changes, and to what
    case
    for kind in ("dnc", "ntm")
    for case in [
        (kind, {"erase": False}, {"erase": None}),
        (kind, {"gate": "hard"}, dict.fromkeys(GATES[kind], decided)),
        (kind, {"gate": "steep_sigmoid"}, dict.fromkeys(GATES[kind], steeper)),
        (kind, {"sharpness": "oneplus"}, dict.fromkeys(STRENGTHS[kind], paper)),
        (kind, {"sharpness": 3.0}, dict.fromkeys(STRENGTHS[kind], 3.0)),
    ]
] + [
    ("dnc", {"gating": False}, {"amount": None}),
    ("ntm", {"gating": False}, {"reads.gate": None, "writes.gate": None}),
    ("ntm", {"gamma": 2.0}, {"reads.gamma": 2.0, "writes.gamma": 2.0}),
    ("ntm", {"shifts": 2}, {"reads.shifts": wider, "writes.shifts": wider}),
]


@pytest.mark.parametrize(("kind", "option", "changes"), OF_PARTS, ids=lambda part: str(part)[:30])
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


@pytest.mark.parametrize("kind", ["dnc", "ntm"])
@pytest.mark.parametrize(("option", "check"), OF_READ_OUT, ids=lambda part: getattr(part, "__name__", str(part))[:40])
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
    memory = DNC(DIM, DenseOptions(slots=9, word=3, read_heads=4, write_heads=2))
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
@pytest.mark.parametrize(("kind", "options"), [(DNC, DenseOptions), (NTM, NTMOptions)])
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
    memory = DNC(DIM, DenseOptions(**SMALL, trace=True))
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


# What a memory promises

KINDS = [(DNC, DenseOptions), (NTM, NTMOptions)]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_loop_of_steps_is_a_forward(kind, options):
    memory = kind(DIM, options(**SMALL, pass_through=True, dim_out=3))
    x = torch.randn(2, TIME, DIM)
    out, state, outputs = memory(x), memory.open(memory.init_state(2), TIME), []
    for t in range(TIME):
        y, state, _ = memory.step(x[:, t], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), out.y)
    for key, value in flatten(memory.close(state)).items():
        torch.testing.assert_close(value, out.state[key])


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_token_is_its_write_then_its_read_and_without_writing_only_its_read(kind, options):
    memory = kind(DIM, options(**SMALL, write_heads=2))
    state, x = memory(torch.randn(2, 3, DIM)).state, torch.randn(2, 1, DIM)
    out = memory(x, state)
    written = memory.write(x, state)
    assert {name for name in state if not torch.equal(written[name], out.state[name])} == {"read_weights"}
    assert torch.equal(written["read_weights"], state["read_weights"])
    y, after = memory.read(x, written)
    assert torch.equal(y, out.y) and all(torch.equal(after[name], out.state[name]) for name in after)
    memory.writing = False
    quiet = memory(x, state)
    assert {name for name in state if not torch.equal(quiet.state[name], state[name])} == {"read_weights"}


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_backward_again_and_again(kind, options):
    """Through carried states that are detached, and twice through one graph: no freed buffer is kept alive."""
    memory, state = kind(DIM, options(**SMALL)), None
    for _ in range(3):
        y, state, _ = memory(torch.randn(2, 3, DIM), state)
        y.square().sum().backward(retain_graph=True)
        once = memory.interface.weight.grad.clone()
        memory.zero_grad()
        y.square().sum().backward()
        torch.testing.assert_close(memory.interface.weight.grad, once)
        memory.zero_grad()
        state = memory.reset_state(memory.detach_state(state), torch.tensor([True, False]))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_reads_return_to_a_controller_with_a_gradient(kind, options):
    """The weights by which a controller takes up what was read learn, from the second token on."""
    memory = kind(DIM, options(**SMALL))
    cell = torch.nn.LSTMCell(DIM + memory.dim_out, DIM)
    hidden = cell_state = torch.zeros(2, DIM)
    read, state = torch.zeros(2, memory.dim_out), memory.init_state(2)
    for x in torch.randn(4, 2, DIM):
        hidden, cell_state = cell(torch.cat([x, read], 1), (hidden, cell_state))
        read, state, _ = memory.step(hidden, state)
    read.square().sum().backward()
    assert (cell.weight_ih.grad[:, DIM:].abs().sum(0) > 0).all()


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slots": 2, "write_heads": 3}, "a token writes 3 slots, and there are 2; set slots to 3 or more"),
        ({"word": 0}, "must be at least 1"),
        ({"sharpness": -1.0}, "sharpness must be softplus, oneplus, or a number of at least 0, not -1.0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"clip": 0.0}, "clip must be above 0, or null"),
        ({"top_k": 65}, "top_k must be from 1 to the 64 slots"),
    ],
)
def test_bad_settings_are_refused(kind, options, given, message):
    with pytest.raises(ValueError, match=message):
        kind(DIM, options(**given))


def test_bad_settings_of_an_ntm_are_refused():
    with pytest.raises(ValueError, match="gamma must be learned, or a number of at least 1"):
        NTMOptions(gamma=0.5)
    with pytest.raises(ValueError, match="shifts must be at least 0 and below half the 4 slots, not 2"):
        NTMOptions(slots=4, shifts=2)


def test_a_state_of_other_rows_is_refused():
    memory = DNC(DIM, DenseOptions(**SMALL))
    with pytest.raises(ValueError, match="the state has 3 rows, the input 2"):
        memory(torch.randn(2, 1, DIM), memory.init_state(3))


def test_every_option_is_tested_and_explained():
    tested = {name for _, option, _ in OF_PARTS for name in option} | {
        name for option, _ in OF_READ_OUT for name in option
    }
    tested |= {"slots", "word", "read_heads", "write_heads", "top_k", "initial", "compile_step"}  # below and above
    fields = {field.name for field in dataclasses.fields(NTMOptions)}
    assert tested == fields
    documents = "".join(cls.__doc__ for cls in NTMOptions.__mro__[:-1])
    assert [name for name in fields if f"`{name}`" not in documents] == []
