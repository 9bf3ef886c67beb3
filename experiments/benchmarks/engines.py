"""Speed of inner loops: an outer gradient of sinusoid MAML by every engine, beside a hand-batched closed form.

25 tasks, an MLP of widths 1, 40, 40, 1, ten points shown and ten asked, K inner updates of SGD, second and first
order, one thread. Contenders take turns, `--rounds` times around, in seconds of the process itself; the best of each
counts, as a shared machine only ever slows things down. Peak memory is that of tensors, by torch's profiler.

    closed form     batched weights, every inner gradient written out; nothing but torch.bmm and one outer backward
    functional      ours; `vmap` and `loop` are its other executors
    torchopt, torchopt_meta, higher   the libraries, as our engines run them
    plain loop      torch.autograd.grad task by task, as one would write it down
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.func import functional_call

from losses.recall import mse
from metamem.analysis import Claim, Study, open_study
from metamem.episodes import ENGINES, Batch, EpisodeLevel, adapt, predict
from metamem.episodes.executors import VMAP
from metamem.episodes.parameters import task_losses
from metamem.episodes.transforms import transform
from metamem.episodes.unroll import unroll

TASKS, POINTS, RATE = 25, 10, 0.01
UPDATES = (1, 5, 10, 20)
ORDERS = {"second": None, "first": 0}
SLOW = ("torchopt_meta", "higher", "loop", "plain loop")  # timed a few times only
OBJECTIVES = {mse: 2.0}
Loss = Callable[[], Tensor]


def network() -> nn.Sequential:
    """The module."""
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def batch() -> tuple[Batch, Batch]:
    """What is shown and what is asked."""
    shown, asked = (Batch(x, x.sin()) for x in (10 * torch.rand(2, TASKS, POINTS, 1) - 5))
    return shown, asked


def contenders(updates: int, order: str) -> dict[str, tuple[Loss, list[nn.Parameter]]]:
    """The outer loss of each, and what it is differentiated by."""
    torch.manual_seed(0)
    module, (shown, asked) = network(), batch()
    parameters = list(module.parameters())
    found = {"closed form": partial(closed_form, parameters, shown, asked, updates, order)}
    for engine in ENGINES:
        if engine == "implicit" or (engine == "torchopt_meta" and order == "first"):
            continue
        level = EpisodeLevel(OBJECTIVES, updates, rates=RATE, engine=engine, unroll=ORDERS[order])
        found[engine] = partial(by_engine, module, shown, asked, level)
    level = EpisodeLevel(OBJECTIVES, updates, rates=RATE, unroll=ORDERS[order])
    found["vmap"] = partial(by_vmap, module, shown, asked, level)
    found["plain loop"] = partial(plain_loop, module, shown, asked, updates, order)
    return {name: (loss, parameters) for name, loss in found.items()}


def by_engine(module: nn.Module, shown: Batch, asked: Batch, level: EpisodeLevel) -> Tensor:
    """The outer loss by an engine."""
    predictions = predict(module, adapt(module, shown, level), asked.inputs, level)
    return task_losses(OBJECTIVES, predictions, asked.targets).mean()


def by_vmap(module: nn.Module, shown: Batch, asked: Batch, level: EpisodeLevel) -> Tensor:
    """The outer loss by torch.func.vmap."""
    adapted = unroll(module, shown, level, VMAP, transform(level.optimizer))
    predictions = VMAP.predict(module, adapted.fast, adapted.buffers, asked.inputs)
    return task_losses(OBJECTIVES, predictions, asked.targets).mean()


def closed_form(parameters: list[nn.Parameter], shown: Batch, asked: Batch, updates: int, order: str) -> Tensor:
    """The outer loss with gradients written out, in as few operations as there can be."""
    weights = [parameter.expand(TASKS, *parameter.shape) for parameter in parameters]

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w1, b1, w2, b2, w3, b3 = weights
        a1 = torch.baddbmm(b1[:, None], x, w1.mT).relu()
        a2 = torch.baddbmm(b2[:, None], a1, w2.mT).relu()
        return a1, a2, torch.baddbmm(b3[:, None], a2, w3.mT)

    for _ in range(updates):
        with torch.set_grad_enabled(order == "second"):
            a1, a2, pred = forward(shown.inputs)
            d3 = (pred - shown.targets) * (2 / POINTS)
            d2 = (d3 @ weights[4]) * (a2 > 0)
            d1 = (d2 @ weights[2]) * (a1 > 0)
            steps = (d1.mT @ shown.inputs, d1.sum(1), d2.mT @ a1, d2.sum(1), d3.mT @ a2, d3.sum(1))
        weights = [torch.sub(weight, step, alpha=RATE) for weight, step in zip(weights, steps, strict=True)]
    return (forward(asked.inputs)[2] - asked.targets).square().mean()


def plain_loop(module: nn.Module, shown: Batch, asked: Batch, updates: int, order: str) -> Tensor:
    """The outer loss as one would write it down."""
    losses, second = [], order == "second"
    for x, y, x_asked, y_asked in zip(*shown, *asked, strict=True):
        fast: dict[str, Tensor] = dict(module.named_parameters())
        for _ in range(updates):
            loss = (functional_call(module, fast, (x,)) - y).square().mean()
            steps = torch.autograd.grad(loss, list(fast.values()), create_graph=second)
            fast = {name: value - RATE * step for (name, value), step in zip(fast.items(), steps, strict=True)}
        losses.append((functional_call(module, fast, (x_asked,)) - y_asked).square().mean())
    return torch.stack(losses).mean()


def gradient(loss: Loss, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """The outer gradient."""
    return torch.autograd.grad(loss(), parameters)


def agree(found: dict[str, tuple[Loss, list[nn.Parameter]]]) -> None:
    """Raises AssertionError where a contender computes something else."""
    wanted = gradient(*found["closed form"])
    for name, contender in found.items():
        for one, other in zip(gradient(*contender), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def measure(found: dict[str, tuple[Loss, list[nn.Parameter]]], rounds: int) -> dict[str, float]:
    """The best seconds of each; the slow ones take part in a tenth of the rounds."""
    best = dict.fromkeys(found, float("inf"))
    for turn in range(rounds):
        for name, contender in found.items():
            if name in SLOW and turn % 10:
                continue
            started = time.process_time()
            gradient(*contender)
            best[name] = min(best[name], time.process_time() - started)
    return best


def peak(contender: tuple[Loss, list[nn.Parameter]]) -> float:
    """The most MiB that tensors of an outer gradient take at once, by torch's own record of what is allocated."""
    gradient(*contender)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        gradient(*contender)
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / 2**20  # pyright: ignore[reportAttributeAccessIssue]


def report(study: Study, order: str, times: dict[int, dict[str, float]], peaks: dict[str, float]) -> list[Claim]:
    """Prints the table of an order, and gives what the issue asks for."""
    rows = []
    for name in times[UPDATES[0]]:
        cells = []
        for updates, best in times.items():
            ratio = best[name] / best["closed form"]
            study.add(f"{name}, {order} order, K = {updates}", 1000 * best[name], "ms", "closed form", ratio)
            cells.append(f"{1000 * best[name]:.2f} (× {ratio:.2f})")
        study.add(f"{name}, {order} order, peak memory", peaks[name], "MiB")
        rows.append([name, *cells, f"{peaks[name]:.1f}"])
    headings = ["", *(f"K = {updates}, ms" for updates in times), f"peak at K = {max(times)}, MiB"]
    study.table(f"An outer gradient, {order} order; × the closed form", headings, rows)
    fast = max(best["functional"] / best["closed form"] for best in times.values())
    slow = min(best["higher"] / best["functional"] for best in times.values())
    return [
        Claim(f"{order} order, functional: times the closed form, at worst", fast, 2.0, at_most=True),
        Claim(f"{order} order, functional: times faster than higher, at worst", slow, 10.0),
    ]


def options(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--rounds", type=int, default=40, help="timed gradients of each contender; the best counts")


def main() -> int:
    """Measures in one run; the exit code is the verdict's."""
    torch.set_num_threads(1)
    study = open_study("benchmark-engines", "Outer gradients of inner loops, by engine.", options=options)
    found: list[Claim] = []
    for order in ORDERS:
        agree(contenders(5, order))
        counts = UPDATES[:2] if study.smoke else UPDATES
        times = {
            updates: measure(contenders(updates, order), 2 if study.smoke else study.options.rounds)
            for updates in counts
        }
        peaks = {name: peak(contender) for name, contender in contenders(max(counts), order).items()}
        found += report(study, order, times, peaks)
    return study.verdict(found)


if __name__ == "__main__":
    sys.exit(main())
