"""Which timescale helps.

Is one level enough, and how often should it write? A grid over a config, a process a cell, and a page that shows it.

Run it with `python docs/tutorials/ablate_timescales.py [STEPS]`.
"""

import sys
from pathlib import Path

from metamem.analysis import plan_ablation, run_ablation, write_report

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PERIOD = "hierarchy.levels.regress.period"


# %% A grid
# The shipped ablation has three families of cells: a level at three periods, its writes summed; the same, averaged; and
# two levels, each taken out in turn. Every cell is loaded, checked and built before the first one runs. Cells are
# processes that import this file: hence the function, and the guard at its end.
def main() -> None:
    """Plans, runs and reports."""
    overrides = [f"training.steps={STEPS}", "seeds=[0]"]
    if STEPS < 10:  # to see that it runs
        overrides.append("cells={sum: {grid: {" + PERIOD + ": [16]}}}")
    plan = plan_ablation(CONFIGS / "ablation/write_period.yaml", overrides)
    print(len(plan.cells), "cells:", ", ".join(cell.name for cell in plan.cells))

    rows = run_ablation(plan, Path("runs/write_period"), workers=2)
    for row in rows:
        print(f"{row.cell}: error over the optimum's {row.metrics['ratio']:.2f}, {row.cost['seconds']:.1f} s")

    print(write_report([Path("runs/write_period")]))


# %% Read it
# `report.html` has quality against the period, which level carries the gain, cost against quality, and the memory
# spectrum: how far back each level still sees, with its half-life. A single seed has no band; `seeds=[0, 1, 2]` has.
if __name__ == "__main__":
    main()
