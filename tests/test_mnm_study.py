"""The study of dictionary inference: its cells train what their rows say, and what they measured is summed up right."""

import pytest

from experiments.mnm_dictionary import METHODS, Cell, claims, config_of, run_cell, shown, summary, trained
from metamem import build
from metamem.layers import RMSNorm
from metamem.memory.mnm import MNM

SMALL = ("vars.dim=8", "vars.width=4", "training.batch=2", "task.examples=4")


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_built_as_it_says_and_trains(name):
    cell = Cell(name, 0, updates=3, every=2, overrides=SMALL)
    block = build(config_of(cell)).get_submodule("blocks.0")
    assert isinstance(block.norm, RMSNorm) == ("raw" not in name)
    memory = block.memory
    if isinstance(memory, MNM):
        write, read = memory.interface.weight[: 4 * memory.width].chunk(2)
        assert write.equal(read) == ("alike" in name)
        assert memory.level.signal == ("predicted_targets" if "MNM-p" in name else "backprop")
    rows = list(trained(cell))
    assert [row["update"] for row in rows] == [2, 3]
    assert all((row["value_norm"] is not None) == ("MNM" in name) for row in rows)
    assert all(row["accuracy"] == row["accuracy/pairs-4"] and "accuracy/pairs-8" in row for row in rows)


def test_what_a_row_adds_to_the_loss_is_in_its_config():
    def objective(name):
        return config_of(Cell(name, 0, 3, 2, SMALL)).hierarchy.levels[-1].objective

    task = {"losses.outer.next_token": 1.0}
    assert objective("MNM-g") == objective("MNM-p, alike") == objective("LSTM") == task
    assert objective("MNM-g, raw + norm") == {**task, "aux.**.value_norm": -0.03}
    reconstructions = {"aux.**.surprise": 0.1, "aux.**.reconstruction": 0.1}
    assert objective("MNM-g, raw + reconstruction") == {**task, **reconstructions}


def test_a_finished_cell_leaves_all_that_it_measured_and_goes_by_its_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = Cell("LSTM", 1, updates=2, every=1, overrides=SMALL)
    assert cell.rows() == []
    run_cell(cell)
    assert [row["update"] for row in cell.rows()] == [1, 2]
    assert [path.suffix for path in cell.path.parent.iterdir()] == [".jsonl"]
    assert Cell("LSTM", 1, updates=3, every=1, overrides=SMALL).rows() == []


def measured(*accuracies, norms=None):
    return [
        {
            "update": 10 * (i + 1),
            "seconds": 30.0 * (i + 1),
            "accuracy": accuracy,
            "accuracy/pairs-8": accuracy / 2,
            "value_norm": norms and norms[i],
        }
        for i, accuracy in enumerate(accuracies)
    ]


def test_a_cells_summary_says_when_it_left_the_plateau_and_when_it_was_done():
    found = summary(measured(0.2, 0.5, 0.7, 0.99, norms=[2.0, 1.5, 3.0, 4.0]))
    assert found.left is not None and found.solved is not None
    assert (found.left["update"], found.solved["update"], found.last["update"]) == (20, 40, 40)
    assert found.lowest_norm == 1.5
    stuck = summary(measured(0.2, 0.3))
    assert (stuck.left, stuck.solved, stuck.lowest_norm) == (None, None, None)
    assert shown([30, None], 10, ".1f", 50) == "3.0 · > 5.0"


def test_claims_compare_the_means_over_seeds_and_count_a_cell_that_never_left_as_its_budget():
    def row(*cells):
        return [summary(measured(*accuracies)) for accuracies in cells]

    slow, fast = row([0.2, 0.2, 0.6], [0.2, 0.2, 0.2]), row([0.6, 0.99], [0.2, 0.99])
    found = {"MNM-g, raw": slow, "MNM-g, alike": fast, "MNM-p, raw": fast, "MNM-p, alike": fast}
    found |= {"LSTM": slow, "LSTM + attention": fast}
    values = [claim.value for claim in claims(found, updates=50)]
    assert values == pytest.approx([(30 + 50) / (10 + 20), 1.0, 0.99 / 0.4, 1.0, 0.99, 0.99])
