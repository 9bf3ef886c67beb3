"""Mixed precision: products in bfloat16, weights, states and losses in float32, and a loss that is near."""

import pytest
import torch
from small_models import CONFIGS, SMALL, inner_level, recurrent, tiny

from losses.outer import next_token
from metamem import build, load_config, train
from metamem.config import ConfigError
from metamem.hierarchy import InnerLoop, inner_levels, inner_loop
from metamem.state import flatten
from metamem.training import build_task

CASES = {
    "quickstart": (*SMALL, "training.length=16"),
    "titans_gate": (),
    "mnm_dictionary": ("vars.dim=16", "vars.width=8"),
    "algorithmic/copy_dnc": (),
}


def in_both(config, batch):
    """What a config's network makes of a batch in each precision."""
    inputs, targets = batch
    found = {}
    for precision, low in (("float32", None), ("bfloat16", torch.bfloat16)):
        model = build(config)
        out = InnerLoop(model, inner_levels(config, model), low=low).run(inputs, targets)
        found[precision] = out
    return found


@pytest.mark.parametrize("case", CASES)
def test_states_stay_in_float32_and_predictions_are_near(case):
    config = load_config(CONFIGS / f"{case}.yaml", [*CASES[case], "training.batch=2"])
    batch = build_task(config).sample(torch.Generator().manual_seed(0), 2, config.training.length)
    found = in_both(config, batch)
    plain, low = found["float32"], found["bfloat16"]
    states, expected = flatten(low.state), flatten(plain.state)
    assert states.keys() == expected.keys() and low.y.dtype == torch.float32
    assert [name for name, value in states.items() if value is not None and value.dtype != expected[name].dtype] == []
    apart = float((low.y - plain.y).detach().norm() / plain.y.detach().norm())
    assert 1e-4 < apart < 0.05


def test_fast_copies_and_their_gradients_stay_in_float32():
    config = recurrent(inner_level("quick"), "training.precision=bfloat16")
    loop, tokens = inner_loop(config, build(config)), torch.randint(7, (2, 9))
    assert loop.low == torch.bfloat16
    fast = []
    apply = loop.apply
    loop.apply = lambda level, state, gradients: fast.append((apply(level, state, gradients), gradients)) or fast[-1][0]
    out = loop.run(tokens[:, :-1], tokens[:, 1:])
    assert len(fast) == 3 and out.y.dtype == torch.float32
    for state, gradients in fast:
        assert {value.dtype for value in [*state.fast.values(), *gradients]} == {torch.float32}
    gradients = torch.autograd.grad(next_token(out.y, tokens[:, 1:]).mean(), list(loop.network.parameters()))
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


def test_a_training_learns_in_it(tmp_path):
    class Same:
        def sample(self, generator, batch, length):
            return torch.ones(batch, length).long(), torch.ones(batch, length).long()

    sizes = ("training.steps=30", "training.batch=2", "training.length=8", "training.warmup=0")
    seen = []
    train(tiny("", "training.precision=bfloat16", *sizes), tmp_path, task=Same(), progress=seen.append)
    assert seen[-1].losses["task"] < 0.5 * seen[0].losses["task"]


def test_other_precisions_are_refused():
    with pytest.raises(ConfigError, match=r"training\.precision"):
        tiny("", "training.precision=float16")
