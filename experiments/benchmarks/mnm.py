"""Speed of Metalearned Neural Memory: one training step, ours against the naive loop over tokens.

Batch 16, 20 tokens, hidden 128, a memory of 3 layers of 128 × 128, 4 heads, one thread; forward, the paper's
meta-objective (the reconstruction after each write) added to a loss on the output, and backward. Contenders take turns,
`--rounds` times around, in seconds of the process itself; the best of each counts, as a shared machine only ever slows
things down.

    naive     the equations token by token, batched over rows and heads, each inner gradient by torch.autograd.grad
    ours      eager, the loop as one function with its gradient written out
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from losses.recall import mse
from metamem import TokenLevel
from metamem.analysis import Claim, Study, open_study
from metamem.memory.mnm import MNM

BATCH, TOKENS, HIDDEN, LAYERS, HEADS = 16, 20, 128, 3, 4
RATE = 0.05  # small: untrained weights must not diverge


class Naive(nn.Module):
    """MNM-g as one would write it down."""

    def __init__(self) -> None:
        super().__init__()
        self.controller = nn.LSTMCell(2 * HIDDEN, HIDDEN)
        self.interface = nn.Linear(HIDDEN, (3 * HEADS + 1) * HIDDEN)
        self.rate = nn.Linear(HIDDEN, 1)
        self.output = nn.Linear(2 * HIDDEN, HIDDEN)
        self.init = nn.ParameterList(torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5 for _ in range(LAYERS))

    def recall(self, weights: list[Tensor], keys: Tensor) -> Tensor:
        for weight in weights[:-1]:
            keys = torch.tanh(keys @ weight)
        return keys @ weights[-1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, cell, read = (x.new_zeros(len(x), HIDDEN) for _ in range(3))
        weights = [weight.expand(len(x), -1, -1) for weight in self.init]
        outputs, losses = [], []
        for x_t in x.unbind(1):
            hidden, cell = self.controller(torch.cat([x_t, read], 1), (hidden, cell))
            *vectors, strength = torch.tanh(self.interface(hidden)).split([HEADS * HIDDEN] * 3 + [HIDDEN], 1)
            write_keys, read_keys, values = (vector.view(-1, HEADS, HIDDEN) for vector in vectors)
            rate = RATE * torch.sigmoid(self.rate(strength)).unsqueeze(-1)
            here = [weight.clone() for weight in weights]
            loss = mse(self.recall(here, write_keys), values).mean(1).sum()
            steps = torch.autograd.grad(loss, here, create_graph=True)
            weights = [weight - rate * step for weight, step in zip(weights, steps, strict=True)]
            losses.append(mse(self.recall(weights, write_keys), values).mean(1))
            read = self.recall(weights, read_keys).mean(1)
            outputs.append(self.output(torch.cat([hidden, read], 1)))
        return torch.stack(outputs, 1), torch.stack(losses, 1)


def ours() -> MNM:
    """The same memory."""
    return MNM(HIDDEN, [TokenLevel("write", {mse: 1.0}, lr_max=RATE)], heads=HEADS, layers=LAYERS)


def contenders() -> dict[str, Callable[[], None]]:
    """A training step of each."""
    torch.manual_seed(0)
    x, naive, memory = torch.randn(BATCH, TOKENS, HIDDEN), Naive(), ours()

    def naive_step() -> None:
        naive.zero_grad()
        y, reconstruction = naive(x)
        (y.square().mean() + reconstruction.mean()).backward()

    def our_step() -> None:
        memory.zero_grad()
        y, _, aux = memory(x)
        (y.square().mean() + aux["reconstruction"].mean()).backward()

    return {"naive": naive_step, "ours": our_step}


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The best seconds of each, after a step that warms up."""
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(rounds + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if turn:
                best[name] = min(best[name], time.process_time() - started)
    return best


def report(study: Study, best: dict[str, float]) -> list[Claim]:
    """Prints the table, and gives what the issue asks for."""
    rows = []
    for name, seconds in best.items():
        times = best["naive"] / seconds
        study.add(f"{name}, training step", 1000 * seconds, "ms", "naive", seconds / best["naive"])
        rows.append([name, f"{1000 * seconds:.1f}", f"{BATCH * TOKENS / seconds:,.0f}", f"{times:.2f}"])
    title = f"A training step of {BATCH} × {TOKENS} tokens, hidden {HIDDEN}, {LAYERS} layers, {HEADS} heads"
    study.table(title, ["", "ms", "tokens/s", "times naive"], rows)
    return [Claim("ours, eager: times as fast as the naive loop", best["naive"] / best["ours"], 3.0)]


def options(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each contender; the best counts")


def main() -> int:
    """Measures in one run; the exit code is the verdict's."""
    study = open_study("benchmark-mnm", "Training steps of Metalearned Neural Memory.", options=options)
    torch.set_num_threads(1)
    return study.verdict(report(study, measure(contenders(), 1 if study.smoke else study.options.rounds)))


if __name__ == "__main__":
    sys.exit(main())
