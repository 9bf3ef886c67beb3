"""Few shots.

MAML around a plain `nn.Module`: from ten points of a sine that it has never seen, one gradient step has to find it.
Which weights move, how far and how often is an inner level, as in a memory; its outer gradient goes through the steps.

Run it with `python docs/tutorials/few_shot.py [STEPS]`.
"""

import sys

import torch
from torch import nn

from losses.recall import mse
from metamem.episodes import EpisodeLevel, Rates, adapt, predict
from metamem.episodes.tasks import Sinusoid

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1500

# %% The task, the module, the level
# `losses.recall.mse` is half the squared error, hence the weight of 2. The rates are learned, one for each number of
# each tensor: that is Meta-SGD, and `rates=0.01` would be MAML.
torch.manual_seed(0)
task = Sinusoid(shots=10)
module = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
rates = Rates(dict(module.named_parameters()), 0.01, learned=True, per="element", positive=False, steps=1)
level = EpisodeLevel({mse: 2.0}, steps=1, rates=rates)

# %% The outer loop
# 25 tasks at a time, batched: `adapted.fast` has a leading axis of tasks, and `module` itself never changes inside.
outer = torch.optim.Adam([*module.parameters(), *rates.parameters()], 1e-3)
generator = torch.Generator().manual_seed(0)
for step in range(1, STEPS + 1):
    support, query = task.sample(generator, tasks=25)
    adapted = adapt(module, support, level)
    loss = (predict(module, adapted, query.inputs, level) - query.targets).square().mean()
    outer.zero_grad()
    loss.backward()
    outer.step()
    if step % 500 == 0 or step == STEPS:
        print(f"step {step}: error after one update {loss.item():.2f}")

# %% New tasks
# On tasks that nothing was trained on, before and after adapting.
support, query = task.evaluation(tasks=100)
with torch.no_grad():
    before = (module(query.inputs) - query.targets).square().mean()
    after = (predict(module, adapt(module, support, level), query.inputs, level) - query.targets).square().mean()
print(f"new tasks: error {before.item():.2f} before, {after.item():.2f} after one update from ten points")
