"""The parts of slot memories against plain loops written from the papers, in float64; their properties; gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamem.memory.slots import DNC, NTM, DNCOptions, NTMOptions
from metamem.memory.slots.content import content_weights, largest, oneplus, similarity
from metamem.memory.slots.erase_add import written_to
from metamem.memory.slots.gates import GATES
from metamem.memory.slots.links import directed, links_after, precedence_after, resolved
from metamem.memory.slots.location import interpolated, sharpened, shifted
from metamem.memory.slots.read_modes import mixed
from metamem.memory.slots.usage import PAIRWISE, allocate, allocation, usage_after

pytestmark = pytest.mark.usefixtures("float64")

BATCH, SLOTS, WORD = 2, 6, 4


def weights(heads, slots=SLOTS, batch=BATCH):
    """Weights whose sum is below 1."""
    return torch.softmax(2 * torch.randn(batch, heads, slots), -1) * torch.rand(batch, heads, 1)


def softmax(numbers):
    powers = [math.exp(number) for number in numbers]
    return [power / sum(powers) for power in powers]


# Against plain loops


def cosine(key, word):
    lengths = [math.sqrt(sum(x * x for x in vector) + 1e-6) for vector in (key, word)]
    return sum(a * b for a, b in zip(key, word, strict=True)) / (lengths[0] * lengths[1] + 1e-6)


@pytest.mark.parametrize("top_k", [None, 1, 3, SLOTS])
def test_content_weights(top_k):
    memory, keys, strengths = torch.randn(BATCH, SLOTS, WORD), torch.randn(BATCH, 3, WORD), 4 * torch.rand(BATCH, 3)
    found = content_weights(memory, keys, strengths, top_k)
    for row in range(BATCH):
        for head in range(3):
            alike = [cosine(keys[row, head].tolist(), word) for word in memory[row].tolist()]
            kept = sorted(range(SLOTS), key=lambda slot: -alike[slot])[: top_k or SLOTS]
            shares = softmax([float(strengths[row, head]) * alike[slot] for slot in kept])
            expected = [shares[kept.index(slot)] if slot in kept else 0.0 for slot in range(SLOTS)]
            assert found[row, head].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_constant_strength_is_that_of_every_head():
    memory, keys = torch.randn(BATCH, SLOTS, WORD), torch.randn(BATCH, 3, WORD)
    torch.testing.assert_close(
        content_weights(memory, keys, 2.5), content_weights(memory, keys, torch.full((BATCH, 3), 2.5))
    )


@pytest.mark.parametrize("writes", [1, 3])
def test_usage(writes):
    usage, written, read = torch.rand(BATCH, SLOTS), weights(writes), weights(2)
    free = torch.rand(BATCH, 2)
    found = usage_after(usage, written, read, free)
    for row in range(BATCH):
        for slot in range(SLOTS):
            unwritten, kept = 1.0, 1.0
            for head in range(writes):
                unwritten *= 1 - float(written[row, head, slot])
            for head in range(2):
                kept *= 1 - float(free[row, head] * read[row, head, slot])
            before = float(usage[row, slot])
            assert float(found[row, slot]) == pytest.approx((before + (1 - before) * (1 - unwritten)) * kept, abs=1e-14)


def allocation_by_loop(usage):
    """One row's, with the released code's ε."""
    usage = [1e-6 + (1 - 1e-6) * u for u in usage]
    shares, product = [0.0] * len(usage), 1.0
    for slot in sorted(range(len(usage)), key=lambda slot: usage[slot]):  # Python's sort is stable
        shares[slot] = (1 - usage[slot]) * product
        product *= usage[slot]
    return shares


@pytest.mark.parametrize("slots", [SLOTS, PAIRWISE + 3])
@pytest.mark.parametrize("writes", [1, 3])
def test_allocation_in_turn(writes, slots):
    usage, gates = torch.rand(BATCH, slots), torch.rand(BATCH, writes)
    found = allocate(usage, gates)
    for row in range(BATCH):
        now = usage[row].tolist()
        for head in range(writes):
            shares = allocation_by_loop(now)
            assert found[row, head].tolist() == pytest.approx(shares, abs=1e-12)
            now = [u + (1 - u) * float(gates[row, head]) * a for u, a in zip(now, shares, strict=True)]


@pytest.mark.parametrize("slots", [PAIRWISE, PAIRWISE + 3])  # long: an unstable sort shows
@pytest.mark.parametrize("usage", [0.0, 0.3, 1.0])
def test_of_equally_used_slots_the_first_is_allocated(usage, slots):
    level = torch.full((1, slots), usage)
    assert allocation(level)[0].tolist() == pytest.approx(allocation_by_loop([usage] * slots), abs=1e-12)
    assert allocation(level)[0].argmax() == 0


def test_write_heads_that_allocate_in_turn_take_different_slots():
    several = allocate(torch.zeros(1, 40), torch.ones(1, 3))[0]
    assert len(set(several.argmax(-1).tolist())) == 3 and (several.amax(-1) > 0.99).all()


@pytest.mark.parametrize("writes", [1, 3])
def test_links_precedence_and_where_they_lead(writes):
    links, precedence, written, read = (
        torch.rand(BATCH, writes, SLOTS, SLOTS),
        weights(writes),
        weights(writes),
        weights(2),
    )
    after, last = links_after(links, precedence, written), precedence_after(precedence, written)
    forward, backward = directed(after, read)
    for row in range(BATCH):
        for head in range(writes):
            w, p, link = written[row, head].tolist(), precedence[row, head].tolist(), links[row, head].tolist()
            for i in range(SLOTS):
                assert float(last[row, head, i]) == pytest.approx((1 - sum(w)) * p[i] + w[i], abs=1e-14)
                for j in range(SLOTS):
                    link[i][j] = 0.0 if i == j else (1 - w[i] - w[j]) * link[i][j] + w[i] * p[j]
            assert after[row, head].tolist() == [pytest.approx(line, abs=1e-14) for line in link]
            for reader in range(2):
                r = read[row, reader].tolist()
                on = [sum(link[i][j] * r[j] for j in range(SLOTS)) for i in range(SLOTS)]
                back = [sum(link[i][j] * r[i] for i in range(SLOTS)) for j in range(SLOTS)]
                assert forward[row, head, reader].tolist() == pytest.approx(on, abs=1e-14)
                assert backward[row, head, reader].tolist() == pytest.approx(back, abs=1e-14)


def test_sharpened_links_are_distributions_to_a_power():
    forward, powers = torch.rand(BATCH, 3, 2, SLOTS), 1 + 3 * torch.rand(BATCH, 2)
    found = resolved(forward, powers)
    for row, head, reader in itertools.product(range(BATCH), range(3), range(2)):
        weight, power = forward[row, head, reader].tolist(), float(powers[row, reader])
        raised = [(w / max(weight)) ** power for w in weight]
        assert found[row, head, reader].tolist() == pytest.approx([w / sum(raised) for w in raised], rel=1e-5)
    one = torch.zeros(1, 1, 1, SLOTS, requires_grad=True)
    power = torch.ones(1, 1, requires_grad=True)
    nowhere = resolved(one, power)
    gradients = torch.autograd.grad(nowhere.square().sum() + nowhere.sum(), (one, power))
    assert not nowhere.any() and all(gradient.isfinite().all() for gradient in gradients), "no link leads nowhere"


@pytest.mark.parametrize("writes", [1, 3])
def test_read_modes(writes):
    modes = torch.softmax(torch.randn(BATCH, 2, 2 * writes + 1), -1)
    backward, forward = torch.rand(2, BATCH, writes, 2, SLOTS)
    content = weights(2)
    found = mixed(modes, backward, forward, content)
    for row in range(BATCH):
        for head in range(2):
            for slot in range(SLOTS):
                total = float(modes[row, head, 2 * writes] * content[row, head, slot])
                for writer in range(writes):
                    total += float(modes[row, head, writer] * backward[row, writer, head, slot])
                    total += float(modes[row, head, writes + writer] * forward[row, writer, head, slot])
                assert float(found[row, head, slot]) == pytest.approx(total, abs=1e-14)


@pytest.mark.parametrize("writes", [1, 3])
@pytest.mark.parametrize("erases", [True, False])
def test_erase_then_add(writes, erases):
    memory, w, values = torch.randn(BATCH, SLOTS, WORD), weights(writes), torch.randn(BATCH, writes, WORD)
    erase = torch.rand(BATCH, writes, WORD) if erases else None
    found = written_to(memory, w, erase, values)
    for row in range(BATCH):
        for slot in range(SLOTS):
            for feature in range(WORD):
                word = float(memory[row, slot, feature])
                for head in range(writes):
                    word *= 1 - float(w[row, head, slot] * erase[row, head, feature]) if erase is not None else 1
                word += sum(float(w[row, head, slot] * values[row, head, feature]) for head in range(writes))
                assert float(found[row, slot, feature]) == pytest.approx(word, abs=1e-14)


@pytest.mark.parametrize("reach", [0, 1, 2])
def test_interpolation_shift_and_sharpening(reach):
    content, before, gate, gamma = weights(2), weights(2), torch.rand(BATCH, 2), 1 + 3 * torch.rand(BATCH, 2)
    shifts = torch.softmax(torch.randn(BATCH, 2, 2 * reach + 1), -1)
    found = sharpened(shifted(interpolated(content, before, gate), shifts), gamma)
    for row in range(BATCH):
        for head in range(2):
            g, power = float(gate[row, head]), float(gamma[row, head])
            between = [
                g * c + (1 - g) * b
                for c, b in zip(content[row, head].tolist(), before[row, head].tolist(), strict=True)
            ]
            turned = [
                sum(between[(i - j) % SLOTS] * float(shifts[row, head, j + reach]) for j in range(-reach, reach + 1))
                for i in range(SLOTS)
            ]
            powers = [w**power for w in turned]
            assert found[row, head].tolist() == pytest.approx([w / sum(powers) for w in powers], abs=1e-12)


def test_a_sharp_power_of_even_weights_does_not_underflow():
    even = torch.full((1, 1, 512), 1 / 512, dtype=torch.float32)
    torch.testing.assert_close(sharpened(even, 60.0), even)
    one = torch.zeros(1, 1, 512)
    one[..., 7] = 1
    torch.testing.assert_close(sharpened(one, 60.0), one)


def test_gates_and_oneplus():
    x = torch.tensor([-2.0, -0.01, 0.0, 0.01, 2.0], requires_grad=True)
    sigmoid = torch.sigmoid(x)
    assert GATES["hard"](x).tolist() == [0, 0, 0, 1, 1]
    torch.testing.assert_close(GATES["steep_sigmoid"](x), torch.sigmoid(5 * x))
    slope = torch.autograd.grad(GATES["hard"](x).sum(), x)[0]
    torch.testing.assert_close(slope, sigmoid * (1 - sigmoid))
    torch.testing.assert_close(oneplus(x), 1 + torch.log(1 + torch.exp(x)))


# Properties


@settings(max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_the_k_largest_are_those_of_a_stable_sort(numbers, data):
    k = data.draw(st.integers(1, len(numbers)))
    scores = torch.tensor(numbers, dtype=torch.float64)
    kept = sorted(range(len(numbers)), key=lambda at: -numbers[at])[:k]
    assert largest(scores, k).nonzero().flatten().tolist() == sorted(kept)


SIZES = st.fixed_dictionaries(
    {
        "slots": st.integers(3, 9),
        "word": st.integers(1, 5),
        "read_heads": st.integers(1, 3),
        "write_heads": st.integers(1, 3),
        "gate": st.sampled_from(list(GATES)),
        "top_k": st.sampled_from([None, 1, 2]),
        "erase": st.booleans(),
        "gating": st.booleans(),
    }
)


def traced(memory, sizes, scale, seed, time=9):
    torch.manual_seed(seed)
    module = memory(5, **sizes)
    with torch.no_grad():
        return {key.removeprefix("trace."): value for key, value in module(scale * torch.randn(2, time, 5)).aux.items()}


def check_weights(trace, slack=1e-9):
    for name in ("read_weights", "write_weights"):
        assert (trace[name] >= 0).all() and (trace[name].sum(-1) <= 1 + slack).all(), name


@settings(max_examples=25)
@given(sizes=SIZES, scale=st.sampled_from([0.3, 3.0, 30.0]), seed=st.integers(0, 9))
def test_what_a_dnc_keeps_stays_in_its_bounds(sizes, scale, seed):
    trace = traced(lambda dim, **sizes: DNC(dim, DNCOptions(**sizes, trace=True)), sizes, scale, seed)
    check_weights(trace)
    assert (trace["usage"] >= 0).all() and (trace["usage"] <= 1).all()
    links, precedence = trace["links"], trace["precedence"]
    assert (links >= -1e-12).all() and links.diagonal(dim1=-2, dim2=-1).eq(0).all()
    assert (links.sum(-1) <= 1 + 1e-9).all() and (links.sum(-2) <= 1 + 1e-9).all()
    assert (precedence >= 0).all() and (precedence.sum(-1) <= 1 + 1e-9).all()


@settings(max_examples=25)
@given(sizes=SIZES, scale=st.sampled_from([0.3, 3.0, 30.0]), seed=st.integers(0, 9))
def test_the_heads_of_an_ntm_have_weights_of_sum_one(sizes, scale, seed):
    trace = traced(lambda dim, **sizes: NTM(dim, NTMOptions(**sizes, trace=True)), sizes, scale, seed)
    check_weights(trace)
    for name in ("read_weights", "write_weights"):
        torch.testing.assert_close(trace[name].sum(-1), torch.ones_like(trace[name][..., 0]))


# Gradients


def test_gradients_of_the_parts():
    memory, keys, strengths = torch.randn(1, 4, 3), torch.randn(1, 2, 3), 3 * torch.rand(1, 2)
    usage, written, read, free = torch.rand(1, 4), weights(2, 4, 1), weights(2, 4, 1), torch.rand(1, 2)
    links, modes, values = torch.rand(1, 2, 4, 4) / 4, torch.softmax(torch.randn(1, 2, 5), -1), torch.randn(1, 2, 3)
    shifts, gamma = torch.softmax(torch.randn(1, 2, 3), -1), 1 + torch.rand(1, 2)
    for function, arguments in [
        (similarity, (memory, keys)),
        (content_weights, (memory, keys, strengths)),
        (lambda *given: content_weights(*given, 2), (memory, keys, strengths)),
        (lambda usage, read, free: usage_after(usage, written, read, free), (usage, read, free)),
        (allocate, (usage, free)),
        (links_after, (links, read, written)),
        (precedence_after, (read, written)),
        (directed, (links, read)),
        (resolved, (0.1 + links[:, :, :2], 1.0 + read.sum(-1))),
        (lambda *given: mixed(given[0], *directed(given[1], given[2]), given[2]), (modes, links, read)),
        (written_to, (memory, written, torch.rand(1, 2, 3), values)),
        (
            lambda *given: sharpened(shifted(interpolated(*given[:3]), given[3]), given[4]),
            (read, written, free, shifts, gamma),
        ),
    ]:
        assert torch.autograd.gradcheck(function, [argument.requires_grad_() for argument in arguments])


@pytest.mark.parametrize(
    "make", [lambda: DNC(3, DNCOptions(slots=4, word=2)), lambda: NTM(3, NTMOptions(slots=4, word=2))]
)
def test_gradients_of_a_sequence(make):
    """But those through write weights into usage, which the released DNC has not: at one token there are none."""
    memory = make()
    tokens = 1 if isinstance(memory, DNC) else 3
    x = torch.randn(1, tokens, 3, requires_grad=True)
    state = {key: value.detach().requires_grad_() for key, value in memory(torch.randn(1, 3, 3)).state.items()}
    names = [name for name in state if name != "write_weights"]

    def run(x, *tensors):
        out = memory(x, {**state, **dict(zip(names, tensors, strict=True))})
        return out.y, *out.state.values()

    assert torch.autograd.gradcheck(run, [x, *(state[name] for name in names)])
