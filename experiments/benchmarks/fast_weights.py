"""Speed of the fast-weight engine: tokens/s forward and forward+backward, and peak memory, on the CPU.

Batch 4 × 1024 tokens, width 256, chunk 64, each contender in a process of its own, one after the other, `--rounds`
times around; the best call counts, as a shared machine only ever slows things down.

    one head     a 2-layer MLP memory 256 → 1024 → 256 (the peer's default expansion), momentum and forgetting learned
    four heads   the same at 4 × 64
    linear       4 × 64, exact token signals, beside causal scaled_dot_product_attention of the same width

Contenders: ours at period 64 (`lag`: the peer's own semantics, a read sees the weights of the last chunk), eager and
compiled; ours at period 1 (`token`: every read sees all writes before it, and momentum and forgetting act at every
token, which is more work); the same memory by `vmap(grad)`; the peer `titans-pytorch` NeuralMemory; the floor, the
projections alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional

from losses.recall import mse
from metamem import FastWeights, TokenLevel
from metamem.analysis import Claim, Study, open_study

BATCH, WIDTH, CHUNK = 4, 256, 64
EXPANSION = 4


def level(period: int, **settings: object) -> TokenLevel:
    """The level of every memory here; a small rate keeps untrained weights from diverging."""
    return TokenLevel("surprise", {mse: 1.0}, period=period, lr_max=0.01, **settings)  # pyright: ignore


def mlp(heads: int, period: int) -> FastWeights:
    """A 2-layer memory with the peer's gates."""
    gates = {"momentum": "learned", "forget": "learned", "forget_to": "zero"}
    return FastWeights(WIDTH, [level(period, **gates)], heads=heads, hidden=[EXPANSION * WIDTH // heads], chunk=CHUNK)


class VmapGrad(nn.Module):
    """The memory of period 64 with its inner gradient by torch.func: per sample and head the gradient of the chunk's
    weighted loss, the way of most published implementations."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.memory = mlp(heads, CHUNK)

    def forward(self, x: Tensor) -> Tensor:
        memory, network = self.memory, self.memory.network
        writes, queries = memory.writer(x, x.dtype), memory.reader.query(x, x.dtype)[..., 0, :]
        gates = writes.gates["surprise"]

        def loss(weights: tuple[Tensor, ...], keys: Tensor, values: Tensor, rates: Tensor) -> Tensor:
            recalled = network.forward(keys, lambda layer, a: a @ weights[layer]).output
            return (rates * mse(recalled, values)).sum()

        weights = tuple(weight.expand(x.shape[0], *weight.shape) for weight in memory.init)
        momenta = tuple(torch.zeros_like(weight) for weight in weights)
        reads = []
        for start in range(0, x.shape[1], CHUNK):
            here = slice(start, start + CHUNK)
            keys, values = writes.keys[:, :, here, 0], writes.values[:, :, here, 0]
            forward = network.forward(queries[:, :, here], lambda layer, a, at=weights: a @ at[layer])
            reads.append(forward.output)
            gradients = vmap(vmap(grad(loss)))(weights, keys, values, gates.lr[:, :, here, 0])
            last = here.stop - 1
            assert gates.log_momentum is not None and gates.log_keep is not None
            beta, alpha = (gate[:, :, last, None, None].exp() for gate in (gates.log_momentum, gates.log_keep))
            momenta = tuple(beta * momentum - gradient for momentum, gradient in zip(momenta, gradients, strict=True))
            weights = tuple(alpha * weight + momentum for weight, momentum in zip(weights, momenta, strict=True))
        return memory.reader(torch.cat(reads, 2).unsqueeze(3))


class Peer(nn.Module):
    """titans-pytorch 0.5.5's NeuralMemory with its defaults."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        from titans_pytorch import NeuralMemory  # pyright: ignore[reportMissingImports]

        heads_of = {} if heads == 1 else {"heads": heads, "dim_head": WIDTH // heads}
        self.memory = NeuralMemory(dim=WIDTH, chunk_size=CHUNK, **heads_of)

    def forward(self, x: Tensor) -> Tensor:
        return self.memory(x)[0]


class Projections(nn.Module):
    """The floor: keys, values, queries and output, and nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values, output = self.project
        return output(queries(x) + keys(x) + values(x))


class SelfAttention(Projections):
    """Causal attention, 4 heads of 64."""

    def forward(self, x: Tensor) -> Tensor:
        *inputs, output = self.project
        queries, keys, values = (project(x).unflatten(-1, (4, -1)).transpose(1, 2) for project in inputs)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return output(attended.transpose(1, 2).flatten(2))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "projections": Projections,
    "attention": SelfAttention,
    "linear": lambda: FastWeights(WIDTH, [level(1)], heads=4, chunk=CHUNK, signal_at="token"),
}
for _heads, _name in ((1, "one head"), (4, "four heads")):
    MAKERS[f"{_name}, peer"] = lambda heads=_heads: Peer(heads)
    MAKERS[f"{_name}, vmap(grad)"] = lambda heads=_heads: VmapGrad(heads)
    MAKERS[f"{_name}, lag"] = lambda heads=_heads: mlp(heads, CHUNK)
    MAKERS[f"{_name}, token"] = lambda heads=_heads: mlp(heads, 1)


def measure(name: str, tokens: int, compiled: bool, repeats: int) -> dict[str, float]:
    """Best seconds of a forward and of a forward+backward, and the peak memory that they took, in MiB."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    module = MAKERS[name]()
    run = torch.compile(module, fullgraph=True) if compiled else module
    x = torch.randn(BATCH, tokens, WIDTH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def output() -> Tensor:
        y = run(x)
        return y if isinstance(y, Tensor) else y[0]

    def forward() -> None:
        with torch.no_grad():
            output()

    def both() -> None:
        output().square().mean().backward()

    result = {"forward+backward": best(both, repeats), "forward": best(forward, repeats)}
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {**result, "peak": peak}


def best(function: Callable[[], None], repeats: int) -> float:
    """The best of some timed calls, after one that warms up (and compiles)."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def contenders(smoke: bool) -> list[tuple[str, int, bool]]:
    """(maker, tokens, compiled), in the order of the tables."""
    tokens = 128 if smoke else 1024
    found = [("projections", tokens, False)]
    for name in ("one head", "four heads"):
        found += [(f"{name}, peer", tokens, False), (f"{name}, vmap(grad)", tokens, False)]
        found += [(f"{name}, lag", tokens, False), (f"{name}, lag", tokens, True), (f"{name}, token", tokens, False)]
    for length in (tokens, 4 * tokens):
        found += [("attention", length, False), ("linear", length, False)]
    return [one for one in found if not (smoke and one[2])]


def run_all(study: Study, rounds: int, repeats: int) -> dict[tuple[str, int, bool], dict[str, float]]:
    """Every contender in its own process, some rounds; the best times and the largest peak of all rounds."""
    results: dict[tuple[str, int, bool], dict[str, float]] = {}
    for turn in range(rounds):
        for key in contenders(study.smoke):
            name, tokens, compiled = key
            print(f"\rround {turn + 1}/{rounds}: {name} {tokens} {'compiled' if compiled else 'eager':40}", end="\r")
            spec = json.dumps({"name": name, "tokens": tokens, "compiled": compiled, "repeats": repeats})
            command = [sys.executable, __file__, "--one", spec]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            new: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            old = results.get(key, new)
            best_of = {"peak": max}
            results[key] = {what: best_of.get(what, min)(old[what], value) for what, value in new.items()}
    print(" " * 100, end="\r")
    return results


def report(study: Study, results: dict[tuple[str, int, bool], dict[str, float]]) -> list[Claim]:
    """Prints the tables, and gives what the issue asks for."""

    def speed(key: tuple[str, int, bool], what: str) -> float:
        return BATCH * key[1] / results[key][what]

    def rows(keys: Sequence[tuple[str, int, bool]], against: tuple[str, int, bool]) -> list[list[str]]:
        table = []
        for key in keys:
            name = f"{key[0]}{', compiled' if key[2] else ''} ({BATCH} × {key[1]})"
            cells = [name]
            for what in ("forward", "forward+backward"):
                ratio = speed(key, what) / speed(against, what)
                cells += [f"{speed(key, what):,.0f}", f"{ratio:.2f}"]
                study.add(f"{name}, {what}", speed(key, what), "tokens/s", against[0], ratio)
            study.add(f"{name}, peak memory", results[key]["peak"], "MiB")
            table.append([*cells, f"{results[key]['peak']:,.0f}"])
        return table

    claims = []
    for name, eager, compiled in (("one head", 5.0, 10.0), ("four heads", 1.5, 1.5)):
        keys = [key for key in results if key[0].startswith(name)]
        peer = keys[0]
        headings = ["", "forward, tokens/s", "× peer", "forward+backward", "× peer", "peak, MiB"]
        floor = next(key for key in results if key[0] == "projections")
        study.table(f"MLP memory, {name}", headings, rows([floor, *keys], peer))
        for key in keys:
            if key[0].endswith("lag"):
                for what in ("forward", "forward+backward"):
                    bound = compiled if key[2] else eager
                    kind = "compiled" if key[2] else "eager"
                    claims.append(Claim(f"{name} {kind} {what} × peer", speed(key, what) / speed(peer, what), bound))
    keys = [key for key in results if key[0] in ("attention", "linear")]
    headings = ["", "forward, tokens/s", "× attention", "forward+backward", "× attention", "peak, MiB"]
    for length in sorted({key[1] for key in keys}):
        both = [key for key in keys if key[1] == length]
        study.table(f"Linear memory, exact token signals, {length} tokens", headings, rows(both, both[0]))
        ratio = results[both[1]]["forward+backward"] / results[both[0]]["forward+backward"]
        bound = 1.25 if length == min(key[1] for key in keys) else 1.0
        claims.append(Claim(f"linear forward+backward time / attention, {length}", ratio, bound, at_most=True))
    return claims


def options(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--rounds", type=int, default=1, help="how often each contender is measured, in turn")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of a measurement; the best counts")


def main() -> int:
    """Measures everything in one run; the exit code is the verdict's."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return 0
    study = open_study("benchmark-fast-weights", "Tokens per second of fast-weight memories.", options=options)
    smoke = study.smoke
    results = run_all(study, 1 if smoke else study.options.rounds, 1 if smoke else study.options.repeats)
    return study.verdict(report(study, results))


if __name__ == "__main__":
    sys.exit(main())
