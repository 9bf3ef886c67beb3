"""Sparse memories: values and gradients of a dense memory with the same weights, one row after the other; slots that
are written in place; and what a step costs, whatever the number of slots."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from metamem.memory.slots import SAM, SparseOptions
from metamem.memory.slots.content import similarity
from metamem.memory.slots.interface import parts_of
from metamem.memory.slots.journal import add, clear, closed, opened, take
from metamem.memory.slots.nearest import Exact, Faiss
from metamem.memory.slots.recency import least_recent, mark
from metamem.registry import MODULES
from metamem.state import leaves

DIM, SLOTS, WORD, K, TIME = 5, 14, 4, 3, 12
SMALL = {"slots": SLOTS, "word": WORD, "k": K, "read_heads": 2}


@pytest.fixture(autouse=True)
def _exact(float64):
    pass


# A dense memory with the same weights


def length(x):
    return (x.square().sum(-1) + 1e-6).sqrt()


class PlainSAM:
    """One row, every weight dense."""

    def __init__(self, options):
        self.options = options
        self.memory = torch.zeros(options.slots, options.word)
        self.accessed, self.time = [0] * options.slots, 0
        self.read = torch.zeros(options.read_heads, options.slots)

    def use(self, weights):
        for slot, weight in enumerate(weights.tolist()):
            if weight > 0.005:
                self.accessed[slot] = self.time

    def write(self, parts):
        options, gates = self.options, torch.sigmoid(parts["gates"])
        self.time += 1
        oldest = sorted(range(options.slots), key=self.accessed.__getitem__)[: options.write_heads]
        memory = self.memory
        if options.erase:
            kept = torch.ones(options.slots, 1)
            kept[oldest] = 0
            memory = memory * kept
        self.written = []
        for head, slot in enumerate(oldest):
            share, amount = gates[head], gates[options.write_heads + head]
            weights = amount * share * self.read.mean(0)
            weights = weights + amount * (1 - share) * functional.one_hot(torch.tensor(slot), options.slots)
            self.written.append(weights)
            memory = memory + torch.outer(weights, parts["values"][head])
        self.memory = memory
        self.use(sum(self.written))

    def by_content(self, parts, head):
        key = parts["keys"][head]
        alike = (self.memory @ key) / (length(self.memory) * length(key) + 1e-6)
        nearest = sorted(range(self.options.slots), key=lambda slot: -alike.tolist()[slot])[: self.options.k]
        weights = torch.softmax(functional.softplus(parts["strengths"][head]) * alike[nearest], 0)
        return torch.zeros(self.options.slots).index_put((torch.tensor(nearest),), weights)

    def token(self, parts):
        self.write(parts)
        self.read = torch.stack([self.by_content(parts, head) for head in range(self.options.read_heads)])
        for weights in self.read:
            self.use(weights)
        return self.read @ self.memory


class PlainSDNC(PlainSAM):
    """One row, with the whole link matrix of each write head."""

    def __init__(self, options):
        super().__init__(options)
        self.link = torch.zeros(options.write_heads, options.slots, options.slots)
        self.precedence = torch.zeros(options.write_heads, options.slots)

    def token(self, parts):
        self.write(parts)
        for head, w in enumerate(weights.detach() for weights in self.written):
            p = self.precedence[head]
            link = (1 - w[:, None] - w[None, :]) * self.link[head] + torch.outer(w, p)
            self.link[head] = link - torch.diag(link.diagonal())
            self.precedence[head] = (1 - w.sum()) * p + w
        read, writes = [], self.options.write_heads
        for head, before in enumerate(self.read):
            modes = torch.softmax(parts["modes"][head], 0)
            weights = modes[-1] * self.by_content(parts, head)
            for writer, link in enumerate(self.link.clone()):
                weights = weights + modes[writer] * (link.T @ before) + modes[writes + writer] * (link @ before)
            kept = torch.zeros(self.options.slots)
            kept[weights.topk(self.options.k).indices] = 1
            read.append(kept * weights)
        self.read = torch.stack(read)
        for weights in self.read:
            self.use(weights)
        return self.read @ self.memory


def plain(kind, memory, x):
    rows, memories = [], []
    for row in x:
        one, reads = kind(memory.options), []
        for vector in row @ memory.interface.weight.T + memory.interface.bias:
            reads.append(
                one.token({name: p[0] for name, p in parts_of(vector[None], memory.rule.shapes).items()}).flatten()
            )
        rows.append(torch.stack(reads))
        memories.append(one.memory)
    return torch.stack(rows), torch.stack(memories)


@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("writes", [1, 3])
@pytest.mark.parametrize("kind", ["sam", "sdnc"])
def test_values_and_gradients_are_those_of_a_dense_memory(kind, writes, erase):
    """Until all slots are in use, and after."""
    links = {"links": SLOTS} if kind == "sdnc" else {}  # all of them
    memory = MODULES.build(kind, {"dim": DIM, **SMALL, **links, "write_heads": writes, "erase": erase}).double()
    x = (2 * torch.randn(2, TIME, DIM)).requires_grad_()
    out = memory(x)
    assert (out.state["touched"] == SLOTS).all()
    expected, last = plain({"sam": PlainSAM, "sdnc": PlainSDNC}[kind], memory, x)
    torch.testing.assert_close(out.y, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.state["memory"], last, rtol=1e-9, atol=1e-10)
    weight, other = torch.randn_like(out.y), torch.randn_like(last)
    of = [x, *memory.parameters()]
    mine = torch.autograd.grad((weight * out.y).sum() + (other * out.state["memory"]).sum(), of)
    theirs = torch.autograd.grad((weight * expected).sum() + (other * last).sum(), of)
    for one, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-7, atol=1e-9)


def test_gradients_by_finite_differences():
    memory = SAM(3, SparseOptions(slots=9, word=2, k=2, write_heads=2))
    x = (2 * torch.randn(1, 4, 3)).requires_grad_()

    def run(x):
        out = memory(x)
        return out.y, out.state["memory"], out.state["read_weights"]

    assert torch.autograd.gradcheck(run, x)


# Slots that are written in place

OPERATION = st.tuples(st.sampled_from(["take", "add", "clear"]), st.lists(st.integers(0, 4), min_size=1, max_size=3))


@settings(max_examples=40)
@given(operations=st.lists(OPERATION, max_size=8), ends=st.booleans())
def test_what_is_written_in_place_has_the_gradient_of_what_is_not(operations, ends):
    torch.manual_seed(0)
    start = torch.randn(2, 5, 3, requires_grad=True)
    given = [torch.randn(2, len(slots), 3, requires_grad=True) for _, slots in operations]
    generator = torch.Generator().manual_seed(1)

    def random(like):
        return torch.randn(like.shape, generator=generator)

    totals = []
    for in_place in (True, False):
        generator.manual_seed(1)
        total, memory = torch.zeros(()), start
        words, chain = opened(start)
        for (name, slots), rows in zip(operations, given, strict=True):
            at = torch.tensor([slots, slots[::-1]])
            places = at.unsqueeze(-1).expand(-1, -1, 3)
            if name == "take":
                found, chain = take(words, chain, at) if in_place else (memory.gather(1, places), chain)
                total = total + (random(found) * found).sum()
            elif name == "add":
                rows = rows * 2
                if in_place:
                    chain = add(words, chain, at, rows)
                else:
                    memory = memory.scatter_add(1, places, rows)
            elif in_place:
                chain = clear(words, chain, at)
            else:
                memory = memory.scatter(1, places, 0.0)
        if ends:
            memory = closed(words, chain) if in_place else memory
            total = total + (random(memory) * memory).sum()
        totals.append(total)
    torch.testing.assert_close(*totals)
    if totals[1].requires_grad:
        of = [start, *given]
        for _ in range(2):  # again through the same graph: each backward has a buffer of its own
            mine, theirs = (
                torch.autograd.grad(total, of, retain_graph=True, allow_unused=True, materialize_grads=True)
                for total in totals
            )
            for one, wanted in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one, wanted)


def test_a_gradient_of_this_gradient_is_refused():
    memory = SAM(DIM, SparseOptions(**SMALL))
    y = memory(torch.randn(1, 3, DIM)).y
    slope = torch.autograd.grad(y.square().sum(), memory.interface.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_a_state_that_goes_in_is_not_written():
    memory = SAM(DIM, SparseOptions(**SMALL))
    state = memory(torch.randn(2, 3, DIM)).state
    before = [leaf.clone() for leaf in leaves(state)]
    memory(torch.randn(2, 3, DIM), state)
    memory.step(torch.randn(2, DIM), state)
    memory.write(torch.randn(2, 3, DIM), state)
    assert all(torch.equal(one, other) for one, other in zip(leaves(state), before, strict=True))


# What a step costs


def saved(slots):
    """The bytes that a training step keeps for its backward, each buffer once."""
    memory = SAM(DIM, SparseOptions(**{**SMALL, "slots": slots}))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        memory(torch.randn(2, 6, DIM)).y.sum().backward()
    return sum(kept.values())


def test_what_a_token_keeps_does_not_grow_with_the_slots():
    assert saved(50) == saved(5000)


def test_a_fresh_state_takes_no_storage():
    state = SAM(DIM, SparseOptions(**{**SMALL, "slots": 10_000_000})).init_state(4)
    assert sum(leaf.untyped_storage().nbytes() for leaf in leaves(state)) < 1000


def test_the_search_sees_the_slots_in_use_and_no_others():
    memory = SAM(DIM, SparseOptions(**{**SMALL, "slots": 10_000}))
    seen = []
    state = memory.open(memory.init_state(2), 20)
    state["index"].search = lambda words, keys, k: seen.append(words.shape[1]) or Exact(words).search(words, keys, k)
    for _ in range(20):
        _, state, _ = memory.step(torch.randn(2, DIM), state)
    assert seen[0] <= 2 * K and seen[-1] <= 20 * (K + 1) and sorted(seen) == seen
    assert memory.close(state)["memory"].shape == (2, 10_000, WORD)


# The parts


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=9), st.integers(1, 3))
def test_the_least_recently_used_are_those_of_a_stable_sort(stamps, heads):
    expected = sorted(range(len(stamps)), key=stamps.__getitem__)[:heads]
    assert least_recent(torch.tensor([stamps], dtype=torch.int32), heads).tolist() == [expected]


def test_a_slot_is_used_by_a_weight_above_delta():
    accessed = torch.tensor([[3, 1, 0, 0]], dtype=torch.int32)
    mark(accessed, torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0.001, 0.3, 0.001, 0.9]]), torch.tensor([7]).int())
    assert accessed.tolist() == [[3, 7, 7, 0]]


def test_an_exact_search_is_a_stable_sort_of_cosines():
    words, keys = torch.randn(2, 9, WORD), torch.randn(2, 3, WORD)
    words[:, 5:] = 0  # all alike
    alike = torch.cosine_similarity(keys.unsqueeze(2), words.unsqueeze(1), dim=-1)
    for k in (1, 3, 9):
        order = alike.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        assert torch.equal(Exact(words).search(words, keys, k), order.sort(-1).values)
    lost = words * torch.nan
    assert Exact(lost).search(lost, keys, 3).shape == (2, 3, 3), "training says that it diverged, not a shape"


@pytest.mark.parametrize("slots", [128 * 3, 128 * 40, 128 * 70 + 5])
def test_a_search_by_groups_is_one_through_all_words(slots):
    """Words of which many are alike, as those that are empty are; some changed since; rows with fewer in question."""
    torch.manual_seed(0)
    words, keys = (torch.randint(-2, 3, (2, count, 3)).double() for count in (slots, 4))  # sums that are exact
    index, again = Exact(words), torch.randint(slots, (2, 50))
    words.scatter_(1, again.unsqueeze(-1).expand(-1, -1, 3), torch.randint(-3, 4, (2, 50, 3)).double())
    index.changed(words, again)
    alike = similarity(words, keys)
    for among in (None, torch.tensor([slots // 2, 3])):
        if among is not None:
            alike = alike.masked_fill(torch.arange(slots) >= among[:, None, None], -torch.inf)
        for k in (1, 2, 5):
            order = alike.sort(dim=-1, descending=True, stable=True).indices[..., :k]
            found = index.search(words, keys, k, among)
            assert torch.equal(found, order.sort(-1).values)


def test_faiss_finds_what_an_exact_search_finds():
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    words, index = torch.zeros(2, 4096, 16), None
    index = Faiss(words, 0)
    slots = torch.arange(3000).expand(2, -1)
    words[:, :3000] = torch.randn(2, 3000, 16)
    index.changed(words, slots)
    again = torch.randint(3000, (2, 50))
    words.scatter_(1, again.unsqueeze(-1).expand(-1, -1, 16), torch.randn(2, 50, 16))
    index.changed(words, again)
    found = index.search(words, words[:, 7:300:50] + 0.1 * torch.randn(2, 6, 16), 1)
    assert (found[..., 0] == torch.arange(7, 300, 50)).double().mean() > 0.9
    keys = torch.randn(2, 40, 16)
    exact, approximate = Exact(words).search(words, keys, 4), index.search(words, keys, 4)
    shared = (exact.unsqueeze(-1) == approximate.unsqueeze(-2)).any(-1).double().mean()
    assert shared > 0.2 and (approximate.diff(dim=-1) > 0).all()


def test_a_memory_with_faiss_reads_what_it_wrote():
    pytest.importorskip("faiss")
    options = {**SMALL, "slots": 200}
    memory = SAM(DIM, SparseOptions(**options, index="faiss"))
    x = torch.randn(2, 30, DIM)
    out = memory(x)
    out.y.square().sum().backward()
    assert out.y.isfinite().all() and memory.interface.weight.grad.abs().sum() > 0


def test_faiss_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        ValueError, match=r"the index 'faiss' needs the package faiss-cpu: pip install 'metamem-torch\[fai"
    ):
        SparseOptions(index="faiss")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slots": 8}, "a token writes 9 slots, and there are 8; set slots to 9 or more, or fewer heads"),
        ({"k": 0}, "k must be at least 1, not 0"),
    ],
)
def test_bad_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        SparseOptions(**{"read_heads": 2, "k": 4, **given})
