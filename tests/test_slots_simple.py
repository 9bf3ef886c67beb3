"""Simple memories of slots, window, episodic and key-value: values and gradients of their equations, one row after the
other; what their own options change."""

import pytest
import torch
from torch.nn import functional

from metamem.memory.slots import DenseOptions, Episodic, EpisodicOptions, KeyValue, ReadOptions, Window
from metamem.memory.slots.interface import parts_of

DIM, SLOTS, WORD, TIME = 5, 6, 4, 9


@pytest.fixture(autouse=True)
def _exact(float64):
    pass


def cosines(key, words):
    return torch.stack(
        [(key @ word) / ((key @ key + 1e-6).sqrt() * (word @ word + 1e-6).sqrt() + 1e-6) for word in words]
    )


def compare(memory, token):
    """`token(parts, past)` gives a row's reads at a token; `past` is a list of its own for every row."""
    x = (2 * torch.randn(2, TIME, DIM)).requires_grad_()
    rows = []
    for row in x:
        past, reads = [], []
        for vector in row @ memory.interface.weight.T + memory.interface.bias:
            parts = {name: part[0] for name, part in parts_of(vector[None], memory.rule.shapes).items()}
            reads.append(torch.stack(token(parts, past)).flatten())
        rows.append(torch.stack(reads))
    y, expected = memory(x).y, torch.stack(rows)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    weight, of = torch.randn_like(y), [x, *memory.parameters()]
    mine, theirs = (torch.autograd.grad((weight * each).sum(), of) for each in (y, expected))
    for one, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-7, atol=1e-9)


def test_a_window_is_its_equations():
    def token(parts, past):
        past.insert(0, parts["value"])
        del past[SLOTS:]
        words = torch.stack(past)
        reads = []
        for key, strength, ages in zip(parts["keys"], parts["strengths"], parts["ages"], strict=True):
            scores = functional.softplus(strength) * cosines(key, words) + ages[: len(past)]
            reads.append(torch.softmax(scores, 0) @ words)
        return reads

    compare(Window(DIM, ReadOptions(slots=SLOTS, word=WORD)), token)


@pytest.mark.parametrize("writes", [1, 2])
def test_a_key_value_memory_is_its_equations(writes):
    memory = KeyValue(DIM, DenseOptions(slots=SLOTS, word=WORD, write_heads=writes))
    reads = memory.options.read_heads

    def token(parts, past):
        values = past.pop() if past else torch.zeros(SLOTS, WORD)
        strengths = functional.softplus(parts["strengths"])

        def at(key, strength):
            return torch.softmax(strength * cosines(key, memory.keys), 0)

        written = [
            torch.sigmoid(parts["amount"][head]) * at(parts["write_keys"][head], strengths[reads + head])
            for head in range(writes)
        ]
        for head, w in enumerate(written):
            values = values * (1 - torch.outer(w, torch.sigmoid(parts["erase"][head])))
        for head, w in enumerate(written):
            values = values + torch.outer(w, parts["values"][head])
        past.append(values)
        return [at(parts["read_keys"][head], strengths[head]) @ values for head in range(reads)]

    compare(memory, token)


@pytest.mark.parametrize("eviction", ["least_recent", "oldest"])
def test_an_episodic_memory_is_its_equations(eviction):
    """With fewer slots than tokens. `past`: [slot's key, value, last use], in the order of slots; then the time."""
    memory = Episodic(DIM, EpisodicOptions(slots=SLOTS, word=WORD, k=3, eviction=eviction))

    def token(parts, past):
        time = past.pop() + 1 if past else 1
        pair = [parts["keys"][0], torch.sigmoid(parts["amount"][0]) * parts["values"][0], time]
        if len(past) < SLOTS:
            past.append(pair)
        else:
            past[min(range(SLOTS), key=lambda slot: past[slot][2])] = pair
        reads, used = [], []
        for key, strength in zip(parts["queries"], parts["strengths"], strict=True):
            alike = cosines(key, [keys for keys, _, _ in past])
            nearest = sorted(range(len(past)), key=lambda slot: -alike.tolist()[slot])[:3]
            weights = torch.softmax(functional.softplus(strength) * alike[nearest], 0)
            used += [slot for slot, weight in zip(nearest, weights.tolist(), strict=True) if weight > 0.005]
            reads.append(sum(weight * past[slot][1] for slot, weight in zip(nearest, weights, strict=True)))
        if eviction == "least_recent":
            for slot in used:
                past[slot][2] = time
        past.append(time)
        return reads

    compare(memory, token)


@pytest.mark.parametrize(
    "memory", [Window(DIM, ReadOptions()), Episodic(DIM, EpisodicOptions())], ids=["window", "pairs"]
)
def test_nothing_is_read_of_a_memory_that_is_empty(memory):
    memory = memory.double()
    memory.writing = False
    assert memory(torch.randn(2, 3, DIM)).y.eq(0).all()


def test_keys_are_weights_and_no_state():
    memory = KeyValue(DIM, DenseOptions(slots=SLOTS, word=WORD))
    state = memory.step(torch.randn(2, DIM)).state
    assert list(state) == list(memory.init_state(2)) == ["memory", "write_weights", "read_weights"]
    assert "keys" in dict(memory.named_parameters())
