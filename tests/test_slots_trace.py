"""`metamem trace`: what slot memories did, as PNGs of heat maps."""

import matplotlib.image
import pytest
import torch
from small_models import CONFIGS
from typer.testing import CliRunner

from metamem import load_config, train
from metamem.analysis.slot_trace import traces
from metamem.cli import app
from metamem.config import UserError
from metamem.memory.slots import DNC, SDNC, DNCOptions, SDNCOptions

SMALL = ["vars.dim=16", "vars.blocks=1", "training.steps=1", "training.batch=2", "training.length=32", "task.pairs=[4]"]


def trained(memory, folder):
    path = folder / f"{memory}.yaml"
    files = [CONFIGS / f"memory/{memory}.yaml", CONFIGS / "experiment/associative_recall.yaml"]
    path.write_text(f"extends: {[str(file) for file in files]}\n")
    return train(load_config(path, [*SMALL, "training.warmup=0"]), folder / "runs").folder


@pytest.mark.parametrize("memory", ["dnc", "sdnc", "window"])
def test_a_run_is_drawn(memory, tmp_path):
    folder = trained(memory, tmp_path)
    result = CliRunner().invoke(app, ["trace", str(folder), "--output", str(tmp_path / "figures"), "--length", "20"])
    assert result.exit_code == 0, result.output
    png = tmp_path / "figures" / "trace-blocks.0.memory.png"
    assert result.stdout.strip() == str(png)
    assert matplotlib.image.imread(png)[..., :3].std() > 0.05


def test_a_model_without_slots_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["trace", str(trained("delta_net", tmp_path))])
    assert result.exit_code == 2 and "the model has no memory of slots" in result.output


def test_traces_are_of_the_first_sequence_and_leave_the_model_as_it_was():
    memory = DNC(4, DNCOptions(slots=6, word=3))
    x = torch.randn(2, 5, 4)
    found = traces(memory, x)
    assert list(found) == ["memory"]
    assert {name: tuple(values.shape) for name, values in found["memory"].items()} == {
        "memory": (5, 6, 3),
        "usage": (5, 6),
        "links": (5, 1, 6, 6),
        "precedence": (5, 1, 6),
        "write_weights": (5, 1, 6),
        "read_weights": (5, 2, 6),
    }
    assert memory(x).aux == {} and not memory.options.trace
    with pytest.raises(UserError, match="no memory of slots"):
        traces(_Silent(), x)


class _Silent(torch.nn.Module):
    def forward(self, x):
        return DNC(4, DNCOptions(slots=6, word=3))(x)


def test_sparse_memories_trace_dense_weights():
    memory = SDNC(4, SDNCOptions(slots=12, word=3, k=2, trace=True))
    out = memory(torch.randn(2, 5, 4))
    trace = {name.removeprefix("trace."): value for name, value in out.aux.items()}
    assert set(trace) == {"memory", "accessed", "read_weights", "write_weights", "links", "precedence"}
    read, state = trace["read_weights"][:, -1], out.state
    torch.testing.assert_close(read.gather(-1, state["read_slots"]).sum(-1), state["read_weights"].sum(-1))
    torch.testing.assert_close(read.sum(-1), state["read_weights"].sum(-1))
    assert torch.equal(trace["memory"][:, -1], state["memory"])
    reads = torch.einsum("btrn,btnw->btrw", trace["read_weights"], trace["memory"]).flatten(2)
    torch.testing.assert_close(reads, out.y)
