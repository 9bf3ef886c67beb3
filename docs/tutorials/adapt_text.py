"""Meta-train, then adapt to a text.

A byte-level language model with a fast-weight memory learns the prose of Python's documentation, and is then streamed a
text of another kind, source code, that it has never read. Frozen it stays bad at it; adapting, it learns on the way.

Run it with `python docs/tutorials/adapt_text.py [STEPS]`.
"""

import argparse
import pydoc_data.topics
import sys
from pathlib import Path

import torch

from metamem import Session, load_config, load_run, train

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 150
CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# %% Meta-train
# The quickstart's config on another text, smaller. `task.path` takes any file or folder of UTF-8.
config = load_config(
    CONFIGS / "quickstart.yaml",
    [
        f"task.path={pydoc_data.topics.__file__}",
        f"training.steps={STEPS}",
        "training.batch=4",
        "training.length=256",
        "training.warmup=10",
        "vars.dim=48",
        "vars.blocks=1",
    ],
)
trained = train(config, Path("runs"))
print(f"{trained.step} steps in {trained.seconds:.0f} s, in {trained.folder}")

# %% Adapt
# Every byte is predicted before anything learns from it. Three sessions read the same: one whose memory is never
# written, one whose memory is, and one in which the level `stream` also moves the slow weights, every 128 bytes.
text = torch.tensor([list(Path(argparse.__file__).read_bytes()[: 40 * STEPS + 512])])
model, config = load_run(trained.folder)
for name, settings in {
    "frozen": {"inner": False, "writing": False},
    "memory": {"inner": False, "writing": True},
    "memory and slow weights": {"inner": True, "writing": True},
}.items():
    session = Session(model, config, **settings)
    observed = session.observe(text)
    print(f"{name}: {observed.bits_per_token:.2f} bits per byte, {observed.updates} updates")

# %% Go on later
# A session is saved whole, and the next goes on as if nothing had happened.
session.save(Path("session.safetensors"))
again = Session(model, config)
again.load(Path("session.safetensors"))
print("goes on at byte", again.position)
