"""First memory.

A fast-weight memory is an `nn.Module` that writes as it reads. Here one learns to be a dictionary: it is shown eight
pairs of key and value, once each, then the keys alone, and has to say the values. Nothing but its state can hold them.

Run it with `python docs/tutorials/first_memory.py [STEPS]`.
"""

import sys

import torch
from torch import nn

from losses.recall import mse
from metamem import FastWeights, TokenLevel
from metamem.memory.base import writing

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 400
PAIRS, WIDTH = 8, 8


# %% What is asked
# A token holds a key and a value, or a key and nothing. Keys are directions, values numbers of either sign.
def dictionary(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [batch, 2 PAIRS, 2 WIDTH], and the values [batch, PAIRS, WIDTH] that the second half asks for."""
    keys = nn.functional.normalize(torch.randn(batch, PAIRS, WIDTH), dim=-1)
    values = torch.randn(batch, PAIRS, WIDTH)
    order = torch.randperm(PAIRS)
    shown = torch.cat([keys, values], -1)
    asked = torch.cat([keys[:, order], torch.zeros_like(values)], -1)
    return torch.cat([shown, asked], 1), values[:, order]


# %% The memory
# One level: at every token the fast weights take a step down `½ ‖W k − v‖²`, at a rate that is learned, and a function
# of the token, as are k and v. With `signal_at="token"` the step is at the weights right before it: the delta rule.
torch.manual_seed(0)
surprise = TokenLevel("surprise", {mse: 1.0}, lr="learned")
memory = FastWeights(2 * WIDTH, [surprise], heads=2, signal_at="token", chunk=2 * PAIRS)
head = nn.Linear(2 * WIDTH, WIDTH)

# State goes in and comes out. Reading in two pieces is reading in one.
tokens, _ = dictionary(4)
whole = memory(tokens).y
first, state, _ = memory(tokens[:, :5])
rest, state, _ = memory(tokens[:, 5:], state)
torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-3, atol=1e-4)
print("the state:", {name: tuple(delta.shape) for name, delta in state["levels"]["surprise"]["delta"].items()})

# %% Meta-training
# What is trained is how to write and to read: keys, values, rates, and where the fast weights start. The gradient goes
# through every inner update, by one ordinary `backward`.
optimizer = torch.optim.Adam([*memory.parameters(), *head.parameters()], 1e-2)
for step in range(1, STEPS + 1):
    tokens, wanted = dictionary(32)
    y, _, aux = memory(tokens)
    loss = (head(y[:, PAIRS:]) - wanted).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0 or step == STEPS:
        print(f"step {step}: error {loss.item():.3f} (1 is knowing nothing)")

# %% Is it the memory?
# Switched off, the same model reads and never writes; its error is that of a guess.
tokens, wanted = dictionary(256)
with torch.no_grad(), writing(memory, False):
    guessed = head(memory(tokens).y[:, PAIRS:])
print(f"without writing: error {(guessed - wanted).square().mean().item():.3f}")
