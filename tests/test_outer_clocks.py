"""Levels on steps, epochs and tasks are a plain loop that keeps, for each level, the gradients since it last fired."""

import copy
import json
import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from config_example import error_of
from hypothesis import given, settings
from small_models import GROUPS, STEP_LEVEL, TINY, brier, close, config_of, tiny, write_text

from losses.outer import next_token
from metamem import OuterLevels, build, build_task, train
from metamem.config import ownership
from metamem.hierarchy import Calendar, calendar_of
from metamem.training.run_folder import METRICS

pytestmark = pytest.mark.usefixtures("float64")
VOCABULARY = 7
LEVELS = {  # objective, optimizer, what it owns
    "quick": ("losses.outer.next_token", "{name: adamw, lr: 0.02, weight_decay: 0.5}", "mlp.**"),
    "middle": ("small_models.brier", "{name: sgd, lr: 0.3, momentum: 0.9}", "norm.**"),
    "slow": ("losses.outer.next_token", "{name: adam, lr: 0.05}", "head.**"),
    "slowest": ("small_models.brier", "{name: sgd, lr: 0.2, momentum: 0.5}", "embed.**"),
}
TORCH = {  # the same optimizers
    "quick": lambda p: torch.optim.AdamW(p, 0.02, (0.9, 0.95), weight_decay=0.5),
    "middle": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9),
    "slow": lambda p: torch.optim.Adam(p, 0.05, (0.9, 0.95)),
    "slowest": lambda p: torch.optim.SGD(p, 0.2, momentum=0.5),
}
OBJECTIVES = {"losses.outer.next_token": next_token, "small_models.brier": brier}
STEPS = 64


def hierarchy(clocks, *overrides):
    """The tiny model with a level for each (clock, period): they own the parts of `LEVELS`, in its order; the last one
    all parts that are left."""
    names = list(LEVELS)[: len(clocks)]
    globs = {name: [LEVELS[name][2]] for name in names}
    globs[names[-1]] += [glob for _, _, glob in list(LEVELS.values())[len(clocks) :]]
    groups = "".join(f"    {name}: {{match: {json.dumps(found)}}}\n" for name, found in globs.items())
    levels = "".join(
        f"    - {{name: {name}, clock: {clock}, period: {period}, objective: {{{objective}: 1.0}}, groups: [{name}],\n"
        f"       optimizer: {optimizer}}}\n"
        for name, (clock, period), (objective, optimizer, _) in zip(names, clocks, LEVELS.values(), strict=False)
    )
    text = f"{TINY}\nhierarchy:\n  groups:\n{groups}  levels:\n{levels}"
    return config_of(text, f"training.steps={STEPS}", *overrides)


CONFIG = hierarchy([("step", 1)])
OUTER_LEVEL = CONFIG.hierarchy.levels[0]


class Tasks:
    """A task that is several, one after the other."""

    def __init__(self, *lengths):
        self.sampled = []
        self.which = [index for index, length in enumerate(lengths) for _ in range(length)]

    def task_at(self, step):
        return self.which[step - 1]

    def sample(self, generator, batch, length, task):
        self.sampled.append(task)
        windows = torch.randint(VOCABULARY, (batch, length + 1), generator=generator)
        return windows[:, :-1], windows[:, 1:]


def run(config, calendar, firings, clip, steps=STEPS):
    """Trains the levels of a config and, beside them, a plain loop of which `firings` says after which steps a level
    moves; both are the same at every step."""
    model = build(config)
    reference, outer = copy.deepcopy(model), OuterLevels(config, model, calendar)
    owned = ownership(dict(model.named_parameters()), config.hierarchy)
    of = dict(reference.named_parameters())
    mine = {name: [of[key] for key in owned[name]] for name in firings}
    torches, kept = {name: TORCH[name](matrices_first(mine[name])) for name in firings}, {name: [] for name in firings}
    for step in range(1, steps + 1):
        inputs, targets = torch.randint(VOCABULARY, (2, 2, 5))
        scale, norms = 1 / step**0.5, {}
        for name in firings:
            loss = OBJECTIVES[LEVELS[name][0]](reference(inputs).y, targets).mean()
            kept[name].append(torch.autograd.grad(loss, mine[name]))
        for name, at in firings.items():
            if step in at:
                mean = [torch.stack(found).mean(0) for found in zip(*kept[name], strict=True)]
                norms[name] = torch.cat([gradient.flatten() for gradient in mean]).norm().item()
                share = min(1.0, clip / (norms[name] + 1e-6)) if clip else 1.0
                for parameter, gradient in zip(mine[name], mean, strict=True):
                    parameter.grad = gradient * share
                for group in torches[name].param_groups:
                    group["lr"] = group.setdefault("initial", group["lr"]) * scale
                torches[name].step()
                kept[name] = []

        y = model(inputs).y
        outer.backward(lambda objectives, y=y, t=targets: sum(w * f(y, t).mean() for f, w in objectives.items()))
        model.zero_grad()  # the buffers are the levels' own
        assert outer.step(step, scale, clip) == pytest.approx(norms)
        close(dict(model.named_parameters()), of)
        for name, level in outer.gathered.items():
            assert level.steps == len(kept[name])
    for name, theirs in torches.items():
        states, expected = ([o.state[p] for p in ps if p in o.state] for o, ps in (
            (outer.optimizers[name], outer.parameters[name]), (theirs, mine[name])
        ))  # fmt: skip
        assert len(states) == len(expected) == len(mine[name])
        for one, other in zip(states, expected, strict=True):
            close(one, other)


def matrices_first(parameters):
    """Weight decay takes matrices only."""
    groups = [[p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]]
    decay = [{}, {"weight_decay": 0.0}]
    return [{"params": group, **more} for group, more in zip(groups, decay, strict=True) if group]


@pytest.mark.parametrize("clip", [None, 0.1])
def test_three_step_levels_are_a_plain_loop(clip):
    config = hierarchy([("step", 1), ("step", 4), ("step", 16)])
    ends = {name: range(period, STEPS + 1, period) for name, period in (("quick", 1), ("middle", 4), ("slow", 16))}
    run(config, None, ends, clip)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_epoch_and_task_levels_are_a_plain_loop(clip):
    clocks = [("step", 3), ("epoch", 1), ("epoch", 2), ("task", 2)]
    config = hierarchy(clocks, "training.steps_per_epoch=9")
    task = Tasks(10, 5, 20, 1, 8, 20)  # end after 10, 15, 35, 36, 44, 64
    ends = {
        "quick": {*range(3, 64, 3), 64},  # the last one of a single step
        "middle": {9, 18, 27, 36, 45, 54, 63, 64},
        "slow": {18, 36, 54, 64},
        "slowest": {15, 36, 64},
    }
    calendar = calendar_of(config, task)
    assert {level.name: set(calendar.firings(level)) for level in config.hierarchy.levels} == ends
    run(config, calendar, ends, clip)


def test_each_slow_weight_is_of_the_slowest_level_that_matches_it():
    levels = "".join(
        f"""
    - {{name: {name}, clock: {clock}, period: {period}, objective: {{losses.outer.next_token: 1.0}},
       optimizer: {{name: sgd, lr: 0.1}}, groups: {groups}}}"""
        for name, clock, period, groups in (
            ("often", "step", 1, "[all]"),
            ("rarely", "step", 900, "[middle, ends, embedding]"),
            ("daily", "epoch", 1, "[middle, embedding]"),
            ("yearly", "task", 1, "[embedding]"),
        )
    )
    config = config_of(TINY + GROUPS % '\n    embedding: {match: "embed.**"}' + levels)
    names = [name for name, _ in build(tiny()).named_parameters()] + ["other.weight"]
    assert ownership(names, config.hierarchy) == {
        "often": ["other.weight"],
        "rarely": ["head.weight"],
        "daily": ["mlp.up.weight", "mlp.down.weight", "norm.weight"],
        "yearly": ["embed.weight"],
    }
    text = error_of(lambda: ownership(names[:-1], config.hierarchy))
    assert text.endswith(
        "no parameter is left to level 'often': all that it matches belong to slower ones (daily, rarely, yearly)"
    )


def test_levels_are_listed_by_clock_then_period():
    text = error_of(lambda: hierarchy([("step", 1), ("task", 1), ("epoch", 3)]))
    assert "(slow): epoch/3 is faster than task/1 of 'middle' before it; list the levels fast to slow (token" in text


def test_the_training_ends_every_period():
    """A level that has gathered nothing whole yet still learns from what it has; a level whose period ends there fires
    once."""
    levels = hierarchy([("step", 1), ("step", 100), ("epoch", 1), ("task", 1)], "training.steps_per_epoch=32")
    calendar = calendar_of(levels, Tasks(100))
    found = {level.name: calendar.firings(level) for level in levels.hierarchy.levels}
    assert found == {"quick": [*range(1, STEPS + 1)], "middle": [64], "slow": [32, 64], "slowest": [64]}


@given(
    clock=st.sampled_from(["step", "epoch", "task"]),
    period=st.integers(1, 5),
    epoch=st.integers(1, 9),
    running=st.lists(st.integers(0, 2), min_size=1, max_size=40),
)
@settings(max_examples=50)
def test_a_calendar_counts_what_has_ended(clock, period, epoch, running):
    level = replace(OUTER_LEVEL, clock=clock, period=period)
    steps = len(running)
    config = replace(
        CONFIG,
        hierarchy=replace(CONFIG.hierarchy, levels=[level]),
        training=replace(CONFIG.training, steps=steps, steps_per_epoch=epoch),
    )
    task = Tasks()
    task.which = running
    expected, units = [], 0
    for step in range(1, steps + 1):
        ends = {
            "step": True,
            "epoch": step % epoch == 0,
            "task": step < steps and running[step - 1] != running[step],
        }
        units += ends[clock]
        if step == steps or (ends[clock] and units % period == 0):
            expected.append(step)
    assert calendar_of(config, task).firings(level) == expected


def test_a_task_that_comes_back_is_another_task():
    config = hierarchy([("task", 2)], "training.steps=7")
    task = Tasks()
    task.which = [0, 0, 1, 0, 0, 1, 1]
    calendar = calendar_of(config, task)
    assert list(calendar.ends["task"]) == [2, 3, 5] and calendar.firings(config.hierarchy.levels[0]) == [3, 7]


def test_the_epoch_of_a_task_with_finite_data_is_its_own(tmp_path):
    task = {"name": "english", "path": str(write_text(tmp_path / "text.txt", 4000))}
    overrides = [f"task={json.dumps(task)}", "training.batch=3", "training.length=50"]
    config = hierarchy([("epoch", 1)], *overrides)
    per_epoch = math.ceil(3600 / 150)  # 90 % of the text are trained on
    assert list(calendar_of(config, build_task(config)).ends["epoch"][:2]) == [per_epoch, 2 * per_epoch]
    set_by_hand = hierarchy([("epoch", 1)], *overrides, "training.steps_per_epoch=5")
    assert calendar_of(set_by_hand, build_task(config)).ends["epoch"][0] == 5


def test_an_epoch_without_an_end_is_refused(tmp_path):
    config = hierarchy([("step", 1), ("epoch", 1)])
    for action in (
        lambda: train(config, tmp_path, task=Tasks(STEPS)),
        lambda: OuterLevels(config, build(config)),
    ):
        text = error_of(action)
        assert "(middle).clock: nothing says how long an epoch is: the data of the task 'none' have no end" in text
        assert text.endswith("set training.steps_per_epoch")
    assert not list(tmp_path.iterdir())


def test_a_task_that_never_ends_is_refused(tmp_path):
    config = hierarchy([("step", 1), ("task", 1)])
    text = error_of(lambda: train(config, tmp_path, task=object()))
    assert "(middle).clock: the task 'none' is one that never ends; a level on the clock 'task' needs" in text
    assert not list(tmp_path.iterdir())


def test_nothing_learns_without_an_outer_level():
    config = config_of(TINY + GROUPS % "" + STEP_LEVEL.replace("clock: step", "clock: inner"))
    text = error_of(lambda: OuterLevels(config, build(config)))
    assert "no level has an outer clock (step, epoch, task): nothing would train the slow weights" in text


@pytest.mark.parametrize("clock", ["epoch", "task"])
def test_what_a_step_level_may_not_say_no_outer_level_may(clock):
    for setting, told in (
        ("unroll=3", "no gradient flows through outer steps"),
        ("optimizer.lr=learned", "an outer level's rate must be a number"),
        ("rule={}", f"a level with the clock '{clock}' has an optimizer, not a rule"),
    ):
        assert told in error_of(lambda setting=setting: hierarchy([(clock, 1)], f"hierarchy.levels.quick.{setting}"))


def test_a_training_logs_each_firing(tmp_path):
    config = hierarchy(
        [("step", 1), ("epoch", 1), ("task", 1)],
        *("training.steps=10", "training.steps_per_epoch=4", "training.log_every=1"),
        *("training.batch=2", "training.length=8", "training.warmup=0"),
    )
    task = Tasks(3, 4, 3)
    trained = train(config, tmp_path, task=task)
    assert task.sampled == task.which, "every step draws from the task that it is in"
    logged = [json.loads(line) for line in (trained.folder / METRICS).read_text().splitlines()]
    fired = {
        name: [row["step"] for row in logged if f"gradient_norm/{name}" in row] for name in ("quick", "middle", "slow")
    }
    assert fired == {"quick": [*range(1, 11)], "middle": [4, 8, 10], "slow": [3, 7, 10]}
    assert all(f"loss/{name}" in row for row in logged for name in fired), "every level has a loss at every step"


def test_a_calendar_can_be_made_by_hand():
    level = hierarchy([("task", 1)]).hierarchy.levels[0]
    assert Calendar(9, {"task": (2, 5)}).firings(level) == [2, 5, 9]
