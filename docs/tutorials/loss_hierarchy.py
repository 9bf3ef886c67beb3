"""A hierarchy of losses.

A stream of regressions whose weights drift, some rows fast, some slowly, some never: one level has to choose what to
forget, several levels with a router between them need not. Errors are over those of the Kalman filter that knows all
speeds, so that 1 is the best there is.

Run it with `python docs/tutorials/loss_hierarchy.py [STEPS]`.
"""

import sys
from pathlib import Path

from metamem import build, load_config, train
from metamem.config import ownership

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 30
CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# %% One level
# The shipped config at a small size. Its level `regress` writes at every token; `outer` learns one rate and one
# forgetting, `prior` keeps the initial weights at zero.
SMALL = [
    f"training.steps={STEPS}",
    f"training.evaluate_every={STEPS}",
    "task.features=8",
    "vars.features=8",
    "task.half_lives=[10, 100, null]",
    "vars.rows=3",
    "vars.inputs=19",
    "task.stream=800",
    "task.examples=8",
    "training.length=256",
]
config = load_config(CONFIGS / "drift.yaml", SMALL)
print([(level.name, level.clock, level.period) for level in config.hierarchy.levels])

# Each slow weight belongs to one outer level.
for level, owned in ownership(dict(build(config).named_parameters()), config.hierarchy).items():
    print(level, owned)

# %% More levels, and a router
# `drift_routed.yaml` has three, of periods 1, 8 and 64, and a router that learns which row is written at which.
routed = load_config(CONFIGS / "drift_routed.yaml", [*SMALL, "hierarchy.router.blocks=3"])
print([(level.name, level.clock, level.period) for level in routed.hierarchy.levels], routed.hierarchy.router.kind)

# %% Which is better?
# `train` leaves a run folder for each; the task's evaluation is in its metrics.
for each in (config, routed):
    folder = train(each, Path("runs")).folder
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    print(each.name, "error over the optimum's:", last.partition('"ratio": ')[2].partition(",")[0])
