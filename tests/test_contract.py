"""One contract over the table memory × signal × objective × level: a combination of settings either passes every gate,
or is refused with the nearest setting that does not.

`CASES` is a cover: every pair of settings that go together stands in some case. `EXCLUDED` are the pairs, and the few
larger sets, that do not.
"""

import itertools
import random

import pytest
import torch
from conformance import DIM, GATES, TIME, Entry, close, gradients, reset_in_midstream, stream, tensors, tokens
from refusals import advice

from losses import recall, retention
from metamem.memory.fast_weights import FastWeights
from metamem.memory.level import TokenLevel

CHUNK = 3  # TIME holds four chunks and one token of a fifth
DEFAULTS = {
    "network": "mlp",
    "hidden": [],
    "residual_norm": False,
    "bias": False,
    "signal": "backprop",
    "objective": {"losses.recall.mse": 1.0},
    "signal_at": "chunk",
    "writes": "together",
    "chunk": CHUNK,
    "period": 1,
    "window": 1,
    "transform": "none",
    "step": 1.0,
    "step_rule": "explicit",
    "weight_norm": False,
    "retention": {},
    "lr": "learned",
    "momentum": 0.0,
    "forget": 0.0,
    "forget_to": "init",
    "levels": 1,
}
MEMORY_SETTINGS = ("network", "hidden", "residual_norm", "bias", "signal_at", "writes", "chunk")
LEVEL_SETTINGS = (
    *("period", "window", "transform", "step", "weight_norm", "signal"),
    *("lr", "momentum", "forget", "forget_to", "step_rule"),
)
OBJECTIVES = ("mse", "lp", "l1", "huber", "dot_product", "cosine")
TABLE = {
    "network": {
        "linear": {},
        "mlp": {"hidden": [5]},
        "deep mlp": {"hidden": [5, 3]},
        "residual norm": {"residual_norm": True, "bias": True},
        "swiglu": {"network": "swiglu", "hidden": [5]},
        "module": {"network": "torch.nn.Linear"},
    },
    "signal": {name: {"signal": name} for name in ("backprop", "predicted_targets", "hebbian")},
    "objective": {name: {"objective": {f"losses.recall.{name}": 1.0}} for name in OBJECTIVES},
    "signal at": {
        "chunk": {},
        "token": {"signal_at": "token"},
        "token, chunk 1": {"signal_at": "token", "chunk": 1},
        "decayed": {"signal_at": "decayed"},
    },
    "writes": {name: {"writes": name} for name in ("together", "in_turn")},
    "period": {name: {"period": period} for name, period in (("1", 1), ("chunk", CHUNK), ("2 chunks", 2 * CHUNK))},
    "window": {name: {"window": width} for name, width in (("1", 1), ("chunk", CHUNK), ("7", 7))},
    "transform": {
        "none": {},
        **{name: {"transform": name, "step": 0.1} for name in ("sign", "clip", "rmsprop", "adam", "muon")},
    },
    "weight norm": {"off": {}, "on": {"weight_norm": True}},
    "retention": {
        "none": {},
        **{name: {"retention": {f"losses.retention.{name}": 0.1}} for name in ("l2", "elastic_net", "kl")},
    },
    "lr": {"learned": {}, "constant": {"lr": 0.01}},
    "momentum": {"none": {}, "learned": {"momentum": "learned"}},
    "forget": {
        "nothing": {},
        "to init": {"forget": "learned"},
        "to zero": {"forget": "learned", "forget_to": "zero"},
    },
    "step rule": {"explicit": {}, "implicit": {"step_rule": "implicit"}},
    "levels": {"one": {}, "two": {"levels": 2}},
}
NOT_LINEAR = tuple(name for name in TABLE["network"] if name != "linear")
SCALE_FREE = ("sign", "rmsprop", "adam", "muon")
BOUNDARY = [
    *(("transform", name) for name in TABLE["transform"] if name != "none"),
    *(("retention", name) for name in TABLE["retention"] if name != "none"),
    ("weight norm", "on"),
]
AT_TOKENS = ("token", "token, chunk 1", "decayed")
EXCLUDED = {
    *(frozenset([("network", name), ("signal", "hebbian")]) for name in NOT_LINEAR),
    frozenset([("network", "module"), ("signal", "predicted_targets")]),
    *(frozenset([("network", name), ("signal at", at)]) for name in NOT_LINEAR for at in ("token", "decayed")),
    *(frozenset([("network", name), ("writes", "in_turn")]) for name in NOT_LINEAR),
    *(frozenset([("network", name), ("step rule", "implicit")]) for name in NOT_LINEAR),
    frozenset([("signal", "hebbian"), ("step rule", "implicit")]),
    *(
        frozenset([("step rule", "implicit"), ("signal", "backprop"), ("objective", name), ("network", "linear")])
        for name in OBJECTIVES
        if name != "mse"
    ),
    frozenset([("writes", "in_turn"), ("signal at", "chunk")]),
    frozenset([("writes", "in_turn"), ("momentum", "learned"), ("period", "1")]),
    *(frozenset([("signal at", at), ("window", window)]) for at in AT_TOKENS for window in ("chunk", "7")),
    *(frozenset([("period", "2 chunks"), ("window", window)]) for window in ("chunk", "7")),
    *(frozenset([("period", "1"), setting]) for setting in BOUNDARY),
    *(frozenset([("transform", name), ("lr", "constant")]) for name in SCALE_FREE),
    frozenset([("transform", "adam"), ("momentum", "learned")]),
    *(
        frozenset([("signal at", at), ("signal", "backprop"), ("objective", name), ("network", "linear")])
        for at in AT_TOKENS
        for name in OBJECTIVES
        if name != "mse"
    ),
    *(
        frozenset([("writes", "in_turn"), ("signal at", at), ("forget", forget), ("period", "1")])
        for at in ("token", "token, chunk 1")
        for forget in ("to init", "to zero")
    ),
}
IMPLIED = {frozenset([("writes", "in_turn"), ("window", window)]) for window in ("chunk", "7")}  # by two that are
ODD = {  # of values that the table has not
    "a period that no chunk divides": {"period": 5, "chunk": 8},
    "a period between chunks": {"period": 10, "chunk": 4},
    "a window within a period": {"period": CHUNK, "window": 2},
    "a window beside a shorter period": {"period": 2, "chunk": 4, "window": 5},
    "a step of nothing": {"period": CHUNK, "step": 0.1},
    "two hidden widths of swiglu": {"network": "swiglu", "hidden": [5, 3]},
    "no hidden width of swiglu": {"network": "swiglu"},
    "everything that is not linear": {"network": "swiglu", "hidden": [5], "residual_norm": True, "signal": "hebbian"},
}


def of(values):
    """Settings from values of the table, {factor: value}."""
    settings = dict(DEFAULTS)
    for factor, value in values.items():
        settings |= TABLE[factor][value]
    return settings


def build(settings):
    level = {key: settings[key] for key in LEVEL_SETTINGS}
    objectives = {getattr(recall, path.split(".")[-1]): weight for path, weight in settings["objective"].items()}
    pulls = {getattr(retention, path.split(".")[-1]): weight for path, weight in settings["retention"].items()}
    levels = [TokenLevel("main", objectives, retention=pulls, lr_max=0.02, **level)]
    if settings["levels"] == 2:
        other = {"period": CHUNK} if settings["period"] == 1 else {}
        levels.append(TokenLevel("other", objectives, signal=settings["signal"], lr_max=0.02, **other))
    memory = {key: settings[key] for key in MEMORY_SETTINGS}
    writers = 2 if settings["writes"] == "in_turn" else 1
    return FastWeights(DIM, sorted(levels, key=lambda level: level.period), heads=2, writers=writers, **memory)


def refusal(settings):
    """The reason why a combination is refused, or None."""
    try:
        build(settings)
    except ValueError as error:
        return str(error)
    return None


# The cover


def pairs(values):
    return {frozenset(pair) for pair in itertools.combinations(values.items(), 2)}


def every_pair():
    return {
        frozenset([(one, a), (other, b)])
        for one, other in itertools.combinations(TABLE, 2)
        for a, b in itertools.product(TABLE[one], TABLE[other])
    }


def excluded(values):
    """What of EXCLUDED stands in the values."""
    items = set(values.items())
    return [combination for combination in EXCLUDED if combination <= items]


def completed(pair, missing, generator):
    """A case that holds a pair, and as many of the missing ones as a greedy choice finds; None at a dead end."""
    values = dict(pair)
    for factor in generator.sample(list(TABLE), len(TABLE)):
        if factor in values:
            continue
        choices = [{**values, factor: value} for value in TABLE[factor]]
        choices = [choice for choice in choices if not excluded(choice)]
        if not choices:
            return None
        gain = [
            sum(frozenset([(factor, choice[factor]), item]) in missing for item in values.items()) for choice in choices
        ]
        values = generator.choice([choice for choice, new in zip(choices, gain, strict=True) if new == max(gain)])
    return {factor: values[factor] for factor in TABLE}


def cover():
    """Cases in which every pair stands that nothing excludes; the same at every run."""
    generator = random.Random(0)
    missing, cases = every_pair() - EXCLUDED - IMPLIED, []
    for pair in sorted(missing, key=sorted):
        if pair not in missing:
            continue
        tried = [case for case in (completed(pair, missing, generator) for _ in range(6)) if case]
        if tried:
            cases.append(max(tried, key=lambda case: len(pairs(case) & missing)))
            missing -= pairs(cases[-1])
    return {label(case): case for case in cases}


def label(values):
    return ", ".join(f"{factor} {value}" for factor, value in values.items() if value != next(iter(TABLE[factor])))


CASES = cover()


def test_every_pair_of_settings_stands_in_a_case_or_is_excluded():
    covered = set().union(*(pairs(case) for case in CASES.values()))
    assert not covered & EXCLUDED
    assert covered | IMPLIED | {combination for combination in EXCLUDED if len(combination) == 2} == every_pair()


# What goes together passes


def splits_and_executors(entry):
    """In one call, in pieces, and token by token by the recurrence: the same values, state and gradients."""
    memory, x = entry.build(), tokens().requires_grad_()
    whole = measured(memory, x, memory(x))
    cuts = random.Random(repr(memory)).sample(range(1, TIME), 3)
    close(measured(memory, x, stream(memory, x, cuts)), whole)
    memory.executor = "recurrence"
    muon = any(level.transform == "muon" for level in memory.levels)  # it divides by small singular values
    close(measured(memory, x, memory(x)), whole, rounding=1000 if muon else 1)


def measured(memory, x, out):
    return {**tensors(out), **{f"d {name}": slope for name, slope in gradients(memory, x, out).items()}}


def resets(entry):
    """Of one or two rows of three, anywhere in a stream that goes on in pieces."""
    memory = entry.build()
    generator = random.Random(repr(memory))
    rows = generator.choice([row for row in itertools.product([True, False], repeat=3) if len(set(row)) > 1])
    cuts = set(generator.sample(range(1, TIME), 3))
    reset_in_midstream(memory, tokens(3).requires_grad_(), generator.randrange(1, TIME), list(rows), cuts)


def finite_in_float32(entry):
    """Types, shapes, and every number, of outputs, state and gradients."""
    memory, x = entry.build(torch.float32), tokens(2, TIME, torch.float32).requires_grad_()
    out = memory(x)
    assert out.y.shape == x.shape and out.aux["surprise"].shape == x.shape[:2]
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.float32, torch.int64}
    for name, tensor in {**tensors(out), **gradients(memory, x, out)}.items():
        assert tensor.isfinite().all(), name


CONTRACT = {name: GATES[name] for name in ("causality", "optimizer_step", "finite_in_bfloat16")} | {
    gate.__name__: gate for gate in (splits_and_executors, resets, finite_in_float32)
}


@pytest.mark.parametrize("gate", CONTRACT)
@pytest.mark.parametrize("case", CASES)
def test_settings_that_go_together_pass(case, gate):
    CONTRACT[gate](Entry(lambda: build(of(CASES[case]))))


# What does not is refused


def only(combination):
    """A case that one combination excludes, and nothing else: the first value of each factor that allows it."""
    values = dict(combination)
    for factor, choices in TABLE.items():
        allowed = (value for value in choices if set(excluded({**values, factor: value})) <= {combination})
        values.setdefault(factor, next(allowed, None))
    return of(values)


REFUSED = {" & ".join(f"{factor} {value}" for factor, value in sorted(values)): only(values) for values in EXCLUDED}
REFUSED |= {name: {**DEFAULTS, **settings} for name, settings in ODD.items()}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_is_refused_names_the_nearest_setting_and_that_is_accepted(case):
    settings = REFUSED[case]
    reason = refusal(settings)
    assert reason, "accepted"
    assert advice(reason, CHUNK), reason
    for change in advice(reason, CHUNK):
        assert settings.keys() >= change.keys()
        assert refusal({**settings, **change}) is None, (reason, change)


def test_any_combination_is_accepted_or_leads_to_one_that_is():
    """Following any of what the refusals name, one after the other."""
    generator = random.Random(1)
    for _ in range(200):
        values = {factor: generator.choice(list(TABLE[factor])) for factor in TABLE}
        settings, reasons = of(values), [refusal(of(values))]
        assert bool(reasons[0]) == bool(excluded(values)), (values, reasons)
        while reasons[-1] and len(reasons) < 20:
            settings |= generator.choice(advice(reasons[-1], CHUNK))
            reasons.append(refusal(settings))
        assert reasons[-1] is None, reasons
