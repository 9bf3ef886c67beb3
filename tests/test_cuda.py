"""On a GPU: what the CPU computes, from one memory to a session. Skipped where there is none.

`METAMEM_DEVICE=cuda pytest tests/test_conformance.py tests/test_contract.py` runs every gate of every memory on a GPU;
with `-m slow`, compiled.
"""

import copy
import json

import pytest
import torch
from conformance import DIM, MEMORIES, TIME, gradients, tensors
from small_models import CONFIGS, SENTENCE, close, inner_level, recurrent, shaken, small_quickstart, write_text
from test_resume import Died, dying, rows
from typer.testing import CliRunner

from metamem import Session, load_run
from metamem.cli import app
from metamem.episodes.schema import load_episodes
from metamem.episodes.training import train_episodes
from metamem.training import resume, train

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EPISODES = ("maml", "maml_plus_plus", "cavia", "sparse_maml", "routed_maml", "meta_sgd", "imaml")


def on_both(module, *inputs):
    """A module and tensors on the CPU and on the GPU."""
    return [(copy.deepcopy(module).to(place), *(tensor.to(place) for tensor in inputs)) for place in ("cpu", "cuda")]


def on_cpu(named):
    """Tensors by name, where they can be compared."""
    return {name: tensor.cpu() for name, tensor in named.items()}


def losses_of(folder):
    """The logged loss of every outer step."""
    return torch.tensor([row["loss/task"] for row in rows(folder) if "loss/task" in row], dtype=torch.float64)


# Memories


@gpu
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_memory_computes_what_it_does_on_the_cpu(memory):
    """float64: outputs, state, what is measured, outer gradients; over two calls, a row beginning anew between them.
    Of SDNC the outputs alone, nearly: the cosine with a slot that was emptied is one with what rounding left there.
    1e-15 on its input moves them by 1e-6 on one CPU, and makes others of the links that it keeps."""
    x, anew, results = torch.randn(2, 6 + TIME, DIM, dtype=torch.float64), torch.tensor([True, False]), []
    for module, x_there in on_both(MEMORIES[memory].build(), x):
        x_there.requires_grad_()
        out = module(x_there[:, 6:], module.reset_state(module(x_there[:, :6]).state, anew))
        steepness = {f"d {name}": value for name, value in gradients(module, x_there, out).items()}
        results.append(on_cpu({**tensors(out), **steepness}))
    if memory == "sdnc":
        return close(*({"y": found["y"]} for found in results), rtol=1e-2, atol=1e-4)
    close(*results, rtol=1e-8, atol=1e-9)


# From training to a session


@gpu
def test_training_follows_the_cpu_and_a_run_goes_on_bit_for_bit(tmp_path):
    text = write_text(tmp_path / "text.txt")
    settings = (f"task.path={text}", "training.steps=6", "training.log_every=1", "training.checkpoint_every=3")
    found = {}
    for place in ("cpu", "cuda"):
        config = small_quickstart(*settings, f"training.device={place}")
        found[place] = train(config, tmp_path / place)
    torch.testing.assert_close(*(losses_of(one.folder) for one in found.values()), rtol=1e-3, atol=1e-4)
    with pytest.raises(Died):
        train(config, tmp_path / "died", progress=dying(5))
    again = resume(tmp_path / "died" / config.name)
    for one, other in zip(again.model.parameters(), found["cuda"].model.parameters(), strict=True):
        assert torch.equal(one, other)


@gpu
def test_a_session_learns_the_same_and_goes_on_on_the_other_device(tmp_path, float64):
    """A run's inner level with an optimizer that has a state, guards, the model as trained beside: in float64."""
    config = recurrent(inner_level(period=4, optimizer="{name: adam, lr: 0.01}"))
    model, tokens, losses = shaken(config), torch.randint(7, (1, 41)), {}
    for (there,) in on_both(model):
        session = Session(there, config)
        losses[session.device.type] = session.observe(tokens[:, :20]).losses
        session.save(tmp_path / session.device.type)
        distribution = session.predict()
        assert distribution.device.type == losses[session.device.type].device.type == session.device.type
    torch.testing.assert_close(losses["cuda"].cpu(), losses["cpu"], rtol=1e-8, atol=1e-9)
    later = {}
    for (there,), saved in zip(on_both(model), ("cuda", "cpu"), strict=True):
        session = Session(there, config)
        session.load(tmp_path / saved)
        later[saved] = session.observe(tokens[:, 20:]).losses
    torch.testing.assert_close(later["cpu"].cpu(), later["cuda"], rtol=1e-8, atol=1e-9)


@gpu
def test_a_transformers_model_adapts_on_a_gpu(tmp_path):
    pytest.importorskip("transformers", reason="needs the extra hf")
    from test_hugging_face import gpt2

    gpt2().save_pretrained(tmp_path / "lm")
    (tmp_path / "text.txt").write_text(SENTENCE * 4)
    command = ["adapt", str(tmp_path / "lm"), "--input", str(tmp_path / "text.txt"), "hierarchy.levels.stream.period=8"]
    printed = {}
    for place in ("cpu", "cuda"):
        result = CliRunner().invoke(app, [*command, "--device", place, "--jsonl", str(tmp_path / place)])
        assert result.exit_code == 0, result.output
        told = [json.loads(line) for line in (tmp_path / place).read_text().splitlines()]
        printed[place] = torch.tensor([row["bits_per_byte"] for row in told])
    torch.testing.assert_close(printed["cpu"], printed["cuda"], rtol=1e-3, atol=1e-3)


@gpu
@pytest.mark.parametrize("name", EPISODES)
def test_learners_follow_the_cpu(name, tmp_path):
    settings = ("training.steps=4", "training.evaluated_tasks=8", "training.batch=4", "training.log_every=1")
    losses = []
    for place in ("cpu", "cuda"):
        config = load_episodes(CONFIGS / f"episodes/{name}.yaml", [*settings, f"training.device={place}"])
        trained = train_episodes(config, tmp_path / place)
        losses.append(torch.tensor([found.loss.mean for found in trained.evaluation.values()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=1e-3)


@gpu
def test_a_run_trained_on_a_gpu_adapts_on_either(tmp_path):
    text = write_text(tmp_path / "text.txt")
    config = small_quickstart(f"task.path={text}", "training.steps=2", "training.device=cuda")
    folder = train(config, tmp_path).folder
    model, _ = load_run(folder)
    assert model.device.type == "cpu"
    for place in ("cpu", "cuda"):
        result = CliRunner().invoke(app, ["adapt", str(folder), "--input", str(text), "--device", place])
        assert result.exit_code == 0, result.output


def test_adapt_refuses_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = write_text(tmp_path / "text.txt")
    folder = train(small_quickstart(f"task.path={text}", "training.steps=1"), tmp_path).folder
    result = CliRunner().invoke(app, ["adapt", str(folder), "--input", str(text), "--device", "cuda"])
    assert result.exit_code == 2 and "--device cuda: torch finds no GPU" in result.stderr
