"""DNC and NTM: values and gradients of the papers' equations, one row and one head after the other; what a memory
promises beyond the conformance suite."""

import pytest
import torch
from torch.nn import functional

from metamem.memory.slots import DNC, NTM, DNCOptions, NTMOptions
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
            kept = kept * (1 - torch.sigmoid(parts["free"][head]) * self.read[head])
        self.usage = usage = (self.usage + (1 - self.usage) * (1 - unwritten)) * kept
        written = []
        for head in range(writes):
            share, amount = gates[head], gates[writes + head]
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


# What a memory promises

KINDS = [(DNC, DNCOptions), (NTM, NTMOptions)]


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
    memory = DNC(DIM, DNCOptions(**SMALL))
    with pytest.raises(ValueError, match="the state has 3 rows, the input 2"):
        memory(torch.randn(2, 1, DIM), memory.init_state(3))
