"""`metamem check` on settings that exclude each other: exit code 2, one line with file, key, reason and the nearest
setting; and with that it accepts the config."""

import dataclasses
import json
import re

import pytest
from refusals import advice
from small_models import CONFIGS
from typer.testing import CliRunner

from metamem import cli, load_config
from metamem.config.schema import RuleConfig

LEVEL = "hierarchy.levels.surprise"
RULE, MEMORY = f"{LEVEL}.rule", "network.modules.blocks.modules.memory"
SMALL = ["vars.dim=8", "vars.heads=2", "vars.blocks=1", "training.length=128"]
# preset, what is set, the key that is named, why
REFUSED = {
    "token-signals-of-a-deep-network": ("titans", ["vars.memory.signal_at=token"], MEMORY, "cannot run in parallel"),
    "signals-after-the-decay-of-one": ("titans", ["vars.memory.signal_at=decayed"], MEMORY, "for linear memories"),
    "token-signals-of-another-objective": (
        "hebbian",
        [f"{RULE}.signal=backprop"],
        MEMORY,
        "losses.recall.dot_product is not pred - target",
    ),
    "transform-of-period-1": ("titans", [f"{RULE}.transform=muon"], RULE, "acts on whole matrices"),
    "retention-of-period-1": ("titans", [f"{RULE}.retention={{losses.retention.l2: 1}}"], RULE, "retention acts on"),
    "weight-norm-of-period-1": ("titans", [f"{RULE}.weight_norm=true"], RULE, "weight_norm acts on"),
    "scale-free-transform-of-a-constant-rate": ("lact", [f"{RULE}.lr=0.02"], RULE, "lr 0.02 would change nothing"),
    "adam-with-momentum": ("atlas", [f"{RULE}.transform=adam"], RULE, "a momentum of its own"),
    "step-without-transform": ("atlas", [f"{RULE}.transform=none"], RULE, "without a transform lr is its size"),
    "predicted-targets-of-a-module": (
        "titans",
        ["vars.memory.network=torch.nn.Linear", "vars.memory.expansion=[]", f"{RULE}.signal=predicted_targets"],
        MEMORY,
        "torch.nn.Linear is a module of your own",
    ),
    "hebbian-in-a-hidden-layer": ("titans", [f"{RULE}.signal=hebbian"], MEMORY, "no place in a hidden layer"),
    "implicit-steps-of-a-deep-network": ("titans", [f"{RULE}.step_rule=implicit"], MEMORY, "for linear memories"),
    "implicit-steps-of-no-error": ("hebbian", [f"{RULE}.step_rule=implicit"], MEMORY, "a hebbian signal is none"),
    "static-gates-of-constants": (
        "delta_net",
        [f"{RULE}.lr=0.1", f"{RULE}.gates=static"],
        RULE,
        "this level learns none",
    ),
    "a-start-of-no-learned-forgetting": ("delta_net", [f"{RULE}.forget_start=0.1"], RULE, "where a learned forgetting"),
    "no-projections-of-the-models-width": (
        "delta_net",
        ["vars.memory.projections=none"],
        MEMORY,
        "the input is [query, key, value]",
    ),
    "hebbian-in-swiglu": ("lact", [f"{RULE}.signal=hebbian"], MEMORY, "no place in a hidden layer"),
    "period-and-chunk": ("lact", [f"{LEVEL}.period=100"], MEMORY, "period 100 and chunk 64 do not divide"),
    "window-within-the-period": ("atlas", ["vars.window=4"], MEMORY, "leave out some of each period of 16"),
    "window-of-a-longer-period": ("atlas", [f"{LEVEL}.period=32"], MEMORY, "a period of 1 or of the chunk, 16"),
    "window-of-token-signals": ("delta_net", [f"{RULE}.window=4"], MEMORY, "at one set of weights"),
    "swiglu-of-two-hidden-widths": ("lact", ["vars.memory.expansion=[2, 2]"], MEMORY, "one hidden width, not 2"),
    "residual-norm-of-two-widths": (
        "ttt_mlp",
        ["vars.memory.d_key=2", "vars.memory.d_value=4"],
        MEMORY,
        "d_key 2 and d_value 4 differ",
    ),
    "in-turn-with-momentum": ("delta_product", [f"{RULE}.momentum=learned"], MEMORY, "momentum exclude each other"),
    "in-turn-around-a-decay": ("delta_product", ["vars.memory.signal_at=token"], MEMORY, "after the token's decay"),
    "in-turn-at-a-chunk": ("delta_product", ["vars.memory.signal_at=chunk"], MEMORY, "signals of a chunk see none"),
    "in-turn-of-a-deep-network": (
        "delta_product",
        ["vars.memory.expansion=[2]", "vars.memory.signal_at=token", "vars.memory.chunk=1", f"{RULE}.forget=0"],
        MEMORY,
        "for linear memories",
    ),
}


def check(path, *overrides):
    return CliRunner().invoke(cli.app, ["check", str(path), *SMALL, *overrides])


def override(key, value):
    """The command line that sets a level's or the memory's setting."""
    if key == "period":
        return f"{LEVEL}.period={value}"
    rule = {field.name for field in dataclasses.fields(RuleConfig)}
    return f"{RULE if key in rule else 'vars.memory'}.{key}={json.dumps(value)}"


@pytest.fixture
def config_of(tmp_path):
    """A whole config around a preset of a memory."""

    def of(preset):
        files = [f"memory/{preset}.yaml", "experiment/associative_recall.yaml", "network/memory_lm.yaml"]
        path = tmp_path / f"{preset}.yaml"
        path.write_text(f"extends: {[str(CONFIGS / file) for file in files]}\n")
        return path

    return of


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_exclude_each_other_are_refused_with_what_is_accepted(case, config_of):
    preset, settings, key, why = REFUSED[case]
    path = config_of(preset)
    result = check(path, *settings)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert re.match(rf"(command line|\S+\.yaml:\d+): {re.escape(key)}: ", result.stderr), result.stderr
    assert why in result.stderr
    chunk = load_config(path, SMALL).vars["memory"]["chunk"]
    alternatives = advice(result.stderr, chunk)
    assert alternatives, result.stderr
    for alternative in alternatives:
        if "objective" in alternative:  # a mapping: an override adds to what is there
            continue
        instead = check(path, *settings, *(override(key, value) for key, value in alternative.items()))
        assert instead.exit_code == 0, (alternative, instead.output)


ROUTER = "hierarchy.router"
STATIC = f"{ROUTER}={{kind: static}}"
TABLE = f"{ROUTER}={{kind: fixed, table: {{surprise: 1}}}}"
GROUP = "hierarchy.groups.routers={match: '**.memory.router.**'}"
# preset, what is set, the key that is named, why
ROUTERS_REFUSED = {
    "blocks-that-do-not-divide": ("delta_net", [f"{ROUTER}={{kind: static, granularity: block, blocks: 3}}"], "blocks"),
    "blocks-of-a-hidden-layer": ("titans", [f"{ROUTER}={{kind: dense, granularity: block, blocks: 5}}"], "blocks"),
    "blocks-of-layers": ("delta_net", [f"{ROUTER}={{kind: static, blocks: 2}}"], "blocks"),
    "no-number-of-blocks": ("delta_net", [f"{ROUTER}={{kind: static, granularity: block}}"], "blocks"),
    "blocks-of-a-module": (
        "titans",
        [
            "vars.memory.network=torch.nn.Linear",
            "vars.memory.expansion=[]",
            f"{ROUTER}={{kind: static, granularity: block, blocks: 2}}",
        ],
        "granularity",
    ),
    "more-than-the-levels": ("delta_net", [f"{ROUTER}={{kind: topk, k: 2}}"], "k"),
    "k-of-a-softmax": ("delta_net", [f"{ROUTER}={{kind: dense, k: 1}}"], "k"),
    "one-choice": ("delta_net", [f"{ROUTER}={{kind: dense, hold: false}}"], "kind"),
    "hold-beside-binary": ("delta_net", [f"{ROUTER}={{kind: binary, hold: true}}"], "hold"),
    "no-table": ("delta_net", [f"{ROUTER}={{kind: fixed}}"], "table"),
    "a-table-beside-logits": ("delta_net", [f"{ROUTER}={{kind: static, table: {{surprise: 1}}}}"], "table"),
    "an-input-of-nothing": ("delta_net", [f"{ROUTER}={{kind: static, input: chunk}}"], "input"),
    "an-input-of-a-table": ("delta_net", [TABLE, f"{ROUTER}.input=token"], "input"),
    "a-fixed-router-that-learns": (
        "delta_net",
        [TABLE, GROUP, "hierarchy.levels.task.groups=[all, routers]"],
        "hierarchy.groups.routers.match",
    ),
    "updates-after-the-last-read": ("lact", [STATIC, f"{LEVEL}.period=128"], f"{LEVEL}.period"),
    "updates-that-are-detached": ("lact", [STATIC, "training.unroll=64"], f"{LEVEL}.period"),
    "an-objective-of-no-router": (
        "delta_net",
        ["hierarchy.levels.task.objective={losses.outer.next_token: 1, losses.outer.router_balance: 0.1}"],
        "hierarchy.levels.task.objective.losses.outer.router_balance",
    ),
    "an-objective-of-a-table": (
        "delta_net",
        [TABLE, "hierarchy.levels.task.objective={losses.outer.next_token: 1, losses.outer.router_balance: 0.1}"],
        "hierarchy.levels.task.objective.losses.outer.router_balance",
    ),
}


@pytest.mark.parametrize("case", ROUTERS_REFUSED)
def test_routers_that_could_not_learn_or_gate_are_refused_with_what_is_accepted(case, config_of):
    preset, settings, key = ROUTERS_REFUSED[case]
    path = config_of(preset)
    result = check(path, *settings)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    full = re.escape(key if "." in key else f"{ROUTER}.{key}")
    assert re.search(rf"(command line|\S+\.yaml:\d+): {full.replace('surprise', '(surprise|0)')}", result.stderr), (
        result.stderr
    )
    alternatives = advice(result.stderr, None)
    assert alternatives, result.stderr
    for alternative in alternatives:
        keys = {"period": f"{LEVEL}.period"}
        instead = [
            f"{keys.get(key, key if '.' in key else f'{ROUTER}.{key}')}={json.dumps(value)}"
            for key, value in alternative.items()
        ]
        accepted = check(path, *settings, *instead)
        assert accepted.exit_code == 0, (alternative, accepted.output)


OTHER_ROUTERS = {
    "a group that is not there": (
        [f"{ROUTER}={{kind: static, over: [memry]}}"],
        "no group 'memry'; did you mean 'memory'?",
    ),
    "a group of slow weights": ([f"{ROUTER}={{kind: static, over: [all]}}"], "no token level moves the group 'all'"),
    "a level that is not there": ([f"{ROUTER}={{kind: fixed, table: {{suprise: 1}}}}"], "did you mean 'surprise'?"),
    "nothing open": (
        [f"{ROUTER}={{kind: fixed, table: {{surprise: 0}}}}"],
        "opens none of the memory's levels (surprise)",
    ),
    "a gate too few": ([f"{ROUTER}={{kind: fixed, granularity: head, table: {{surprise: [1]}}}}"], "has 2 groups"),
    "an objective inside": (
        [STATIC, f"{LEVEL}.objective={{losses.outer.router_z: 1}}"],
        "router_z is of routers (logits), which only an outer level can add to its loss",
    ),
}


@pytest.mark.parametrize("case", OTHER_ROUTERS)
def test_what_a_router_cannot_name_is_refused(case, config_of):
    settings, why = OTHER_ROUTERS[case]
    result = check(config_of("delta_net"), *settings)
    assert result.exit_code == 2 and why in result.stderr and len(result.stderr.splitlines()) == 1, result.output


def test_check_shows_the_router(config_of):
    shown = check(config_of("titans"), f"{ROUTER}={{kind: topk, granularity: block, blocks: 2}}").stdout
    table = shown[shown.index("\nrouter") :]
    for row in ("kind .* topk", "input .* token", "granularity .* block", "blocks .* 2", "hold .* True"):
        assert re.search(row, table), table
    assert re.search(r"memory\.router .* groups: 8; levels: surprise; parameters: 144", table), table


def test_check_shows_what_of_a_rule_is_not_the_default(config_of):
    """The signal and the rate always."""
    rule = {
        "signal": "predicted_targets",
        "window": "48",
        "step": "0.3",
        "retention": "{losses.retention.l2: 0.1}",
        "weight_norm": "true",
    }
    shown = check(config_of("atlas"), *(f"{RULE}.{key}={value}" for key, value in rule.items())).stdout
    for setting in ("window 48", "transform muon", "step 0.3", "momentum learned", "forget learned", "forget_to zero"):
        assert setting in shown
    for setting in ("predicted_targets", "lr learned", "0.1 × losses.retention.l2", "weight_norm"):
        assert setting in shown
    assert not re.search("lr_max|reduction", shown)
    plain = check(config_of("delta_net")).stdout
    assert "backprop" in plain and "lr learned" in plain
    assert not re.search("window|transform|retention|weight_norm|momentum|forget", plain)
