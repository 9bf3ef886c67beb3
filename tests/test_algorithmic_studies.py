"""The studies of copy and of the algorithmic tasks: cells train what their rows say, and are summed up right."""

from dataclasses import replace

import pytest

from experiments import algorithmic_tasks, copy_task, memory_rows
from experiments.copy_task import BATCH, SMALL, Lengths, claims, summary, worst_bits
from experiments.memory_rows import ROWS, run_cells
from metamem import build, build_task
from metamem.analysis.results import Result
from metamem.memory.cell import MemoryCell
from metamem.memory.mnm import MNM
from metamem.memory.slots.slot_memory import SlotMemory


def tiny(cell):
    """The same with a few small steps."""
    training = replace(cell.config.training, steps=2, batch=2, evaluate_every=1)
    return replace(cell, config=replace(cell.config, training=training), fingerprint=f"{cell.fingerprint}-tiny")


@pytest.mark.parametrize("row", ROWS)
def test_a_row_on_copy_is_its_memory_with_a_slot_for_every_token(row):
    cell = copy_task.cell(ROWS[row], 3, steps=10, every=5, lengths=Lengths(8, (16, 64)))
    model, task = build(cell.config), build_task(cell.config)
    memory = model.blocks.get_submodule("0").memory
    assert isinstance(memory, MemoryCell) == ROWS[row].controlled and isinstance(memory, MNM) == row.startswith("MNM")
    if ROWS[row].controlled:
        assert memory.memories["memory"].options.slots == 24
    assert list(task.settings.values()) == [8, 1, 2, 3, 4, 5, 6, 7]
    assert (cell.seed, cell.config.seed, cell.config.training.length) == (3, 3, 18)
    assert model.dim_in == task.dim_in and model.dim_out == task.dim_out


@pytest.mark.parametrize(("row", "compiles"), [("DNC", True), ("SAM", False)])
def test_a_long_training_compiles_what_can_be_and_is_the_same_cell(row, compiles, monkeypatch):
    cells = []
    for least in (memory_rows.COMPILED_FROM, 10_000):
        monkeypatch.setattr(memory_rows, "COMPILED_FROM", least)
        cells.append(copy_task.cell(ROWS[row], 0, steps=8000, every=100, lengths=SMALL))
    assert cells[0].fingerprint == cells[1].fingerprint and cells[0].config.name == cells[1].config.name
    steps = [build(cell.config).blocks.get_submodule("0").memory.compile_step for cell in cells]
    assert steps == [compiles, False]


@pytest.mark.parametrize("name", algorithmic_tasks.TASKS)
def test_a_task_evaluates_the_sizes_that_its_table_shows(name):
    task = algorithmic_tasks.TASKS[name]
    cell = algorithmic_tasks.cell(task, ROWS["DNC"], 0, 20, smoke=False)
    built = build_task(cell.config)
    known = [f"pairs-{n}" for n in built.pairs] if name == "associative_recall" else list(built.settings)
    assert set(task.sizes) <= set(known)
    assert cell.config.training.steps == task.steps and cell.config.training.evaluate_every == task.steps // 20
    assert build(cell.config).dim_out == (getattr(built, "vocabulary", None) or built.dim_out)


def test_cells_differ_by_row_seed_and_budget_and_their_results_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = copy_task.cell(ROWS["LSTM"], 0, 10, 5, SMALL)
    others = [
        copy_task.cell(ROWS["NTM"], 0, 10, 5, SMALL),
        copy_task.cell(ROWS["LSTM"], 1, 10, 5, SMALL),
        copy_task.cell(ROWS["LSTM"], 0, 11, 5, SMALL),
    ]
    assert len({cell.fingerprint for cell in [first, *others]}) == len({cell.slug for cell in [first, *others]}) == 4
    cells = {"LSTM": [tiny(first)]}
    (result,) = run_cells("study", cells, 1)["LSTM"]
    assert result.status == "done", result.message
    assert result.curves["bits/length-2"]["x"] == [0, 1, 2] or result.curves["bits/length-2"]["x"] == [1, 2]
    assert {"accuracy/length-2", "exact/length-1", "bits/length-1"} <= set(result.metrics)
    assert run_cells("study", cells, 1)["LSTM"] == [result], "it ran again"
    assert (tmp_path / "runs/study_cells/rows.jsonl").read_text().count("\n") == 1


EXAMINED = {"exact/length-3": 1.0, "exact/length-4": 0.5}


@pytest.mark.parametrize("row", ["DNC", "NTM", "SAM", "SDNC"])
def test_an_exam_is_the_trained_memory_with_more_slots(row, tmp_path, monkeypatch):
    """The weights of the run on the lengths beyond, in 16 slots where it was trained with 8."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(copy_task, "EXAMPLES", 3)
    cell = copy_task.cell(copy_task.COPIERS[row], 0, 2, 1, SMALL)
    (result,) = run_cells(copy_task.NAME, {row: [cell]}, 1)[row]
    assert result.status == "done", result.message
    seen = set()
    forward = SlotMemory.step

    def step(memory, *inputs):
        seen.add(memory.options.slots)
        return forward(memory, *inputs)

    monkeypatch.setattr(SlotMemory, "step", step)
    found = copy_task.exam(cell, copy_task.COPIERS[row], SMALL)
    assert {"exact/length-3", "exact/length-4", "bits/length-4"} <= set(found) and seen == {16}


def measured(bits, status="done", every=100):
    """A result whose bits at length 1 are half of those at 2."""
    steps = [every * (number + 1) for number in range(len(bits))]
    curves = {
        "bits/length-1": {"x": steps, "y": [value / 2 for value in bits]},
        "bits/length-2": {"x": steps, "y": list(bits)},
    }
    return Result("c", "copy", {}, {}, 0, "f", status, {}, curves, {"seconds": 120.0})


def test_a_cell_is_solved_where_its_worst_trained_length_first_is():
    found = summary(measured([4.0, 0.02, 0.01, 0.5]), EXAMINED, SMALL)
    assert (found.sequences, found.bits, found.minutes) == (BATCH * 300, 0.5, 2.0)
    assert found.exact == {3: 1.0, 4: 0.5}
    assert worst_bits(measured([4.0, 0.02]), SMALL) == ([100, 200], [4.0, 0.02])
    assert summary(measured([4.0, 0.02]), EXAMINED, SMALL).sequences is None
    failed = summary(measured([0.0], status="failed"), {}, SMALL)
    assert failed.sequences is None and failed.bits == float("inf") and failed.exact == {3: 0.0, 4: 0.0}


def test_claims_take_the_worst_seed_of_short_copies_and_the_median_of_long_ones():
    cells = [
        summary(measured([bits]), {"exact/length-3": three, "exact/length-4": four}, SMALL)
        for bits, three, four in ((0.001, 1.0, 0.2), (0.02, 0.5, 0.4), (0.005, 1.0, 0.9))
    ]
    made = claims({"DNC": cells}, SMALL)
    assert [(claim.value, claim.holds) for claim in made] == [(0.02, False), (1.0, True), (0.4, False)]
    assert claims({"LSTM": cells}, SMALL) == []


def test_the_best_memory_is_none_of_the_lstm():
    def results(*shares):
        return [Result("c", "s", {}, {}, 0, "f", "done", {"accuracy/length-8": share}) for share in shares]

    rows = {"DNC": results(0.8, 1.0), "NTM": results(0.5, 0.5), "LSTM": results(1.0, 1.0)}
    (claim,) = algorithmic_tasks.claims({"sort": rows})
    assert claim.value == pytest.approx(0.9) and "(DNC)" in claim.what and not claim.holds
