"""A DNC that copies.

An LSTM that writes and reads a memory of slots learns to read vectors of bits and write them out again, and its traces
show how: it writes down one slot after the other, and follows the links from one to the next.

Run it with `python docs/tutorials/dnc_copy.py [STEPS]`.
"""

import json
import sys
from pathlib import Path

import torch

from metamem import build_task, load_config, train
from metamem.analysis.slot_trace import trace_figure, traces

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# %% Train
# The shipped config, for copies of one to three vectors. The memory is one line of it, and another memory another line.
config = load_config(
    CONFIGS / "algorithmic/copy_dnc.yaml",
    [
        "task.lengths=[1, 3]",
        "task.tested=[6]",
        "task.examples=64",
        "training.length=8",
        "vars.memory.slots=16",
        f"training.steps={STEPS}",
        "training.batch=16",
        f"training.evaluate_every={max(1, STEPS // 4)}",
        "hierarchy.levels.task.optimizer.lr=3.0e-3",
    ],
)
trained = train(config, Path("runs"))
for line in (trained.folder / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    if row["kind"] == "evaluation":
        print({key: round(value, 3) for key, value in row.items() if key.startswith(("step", "bits", "exact"))})

# %% Look inside
# `trace: true` puts the memory after every token into `aux`; `metamem trace RUN` does the same from the command line.
inputs, _ = build_task(config).sample(torch.Generator().manual_seed(1), batch=1, length=8)
for memory, found in traces(trained.model.eval(), inputs).items():
    path = trained.folder / f"trace-{memory}.png"
    trace_figure(found, path, f"{memory}: a copy of up to three vectors")
    print(path)
