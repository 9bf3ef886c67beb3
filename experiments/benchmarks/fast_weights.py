"""Speed of the fast-weight engine: tokens/s forward and forward+backward, and peak memory, on the CPU.

Batch 4 × 1024 tokens, width 256, chunk 64, each contender in a process of its own, one after the other, `--rounds`
times around. In a process the best of `--repeats` calls counts, as a shared machine only ever slows things down. What
is claimed is the median over rounds of the ratio in a round: the peer's speed differs from process to process (its
tensors of 134 MB are mapped anew at every use), so that the ratio of the best rounds, printed beside it, hangs on one
lucky process.

    one head     a 2-layer MLP memory 256 → 1024 → 256 (the peer's default expansion), momentum and forgetting learned
    four heads   the same at 4 × 64
    linear       4 × 64, exact token signals, beside causal scaled_dot_product_attention of the same width

Contenders: ours at period 64 (`lag`: the peer's own semantics, a read sees the weights of the last chunk), eager and
compiled; ours at period 1 (`token`: every read sees all writes before it, and momentum and forgetting act at every
token, which is more work); the same memory by `vmap(grad)`; the peer `titans-pytorch` NeuralMemory; the floor, the
projections alone; the ceiling, the float32 matrix products that `lag` cannot do without and nothing between them
(`products`), by the faster of torch's two libraries: no memory of these semantics is faster on the machine at hand, and
its ratio to the peer is the most that any implementation reaches there.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from reference_layers import Projections, SelfAttention
from timing import PASSES, Key, Results, best, measure_module, options, run_all, table
from torch import Tensor, nn
from torch.func import grad, vmap

from losses.recall import mse
from metamem import FastWeights, TokenLevel
from metamem.analysis import Claim, Study, open_study
from metamem.memory.networks import Network

BATCH, WIDTH, CHUNK = 4, 256, 64
EXPANSION = 4
HEADS = {"one head": 1, "four heads": 4}


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
        assert isinstance(network, Network)

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

        heads_of: dict[str, Any] = {} if heads == 1 else {"heads": heads, "dim_head": WIDTH // heads}
        self.memory = NeuralMemory(dim=WIDTH, chunk_size=CHUNK, **heads_of)

    def forward(self, x: Tensor) -> Tensor:
        return self.memory(x)[0]


class Products:
    """The matrix products of `lag`, forward and backward, with operands that stand ready.

    A chunk's keys and queries go through every layer at once; the signals go back through all layers but the first;
    each layer's writes are one product. Backward, a product has two, where both operands have a gradient: the input
    has none, nor what the last chunk writes, which nothing reads.
    """

    def __init__(self, heads: int) -> None:
        head = WIDTH // heads
        self.dims = (head, EXPANSION * head, head)
        self.rows = BATCH * heads

    def shapes(self, tokens: int, backward: bool) -> Counter[tuple[int, int, int, int]]:
        """How often a product [batch, n, k] · [batch, k, m] is computed, by (batch, n, k, m)."""
        found: Counter[tuple[int, int, int, int]] = Counter()

        def add(shape: tuple[int, int, int, int], forward: int, left: int, right: int) -> None:
            batch, n, k, m = shape
            found[shape] += forward
            if backward:
                found[batch, n, m, k] += left
                found[batch, k, n, m] += right

        chunks = tokens // CHUNK
        read = chunks - 1  # the chunks whose writes are read
        for layer, (d_in, d_out) in enumerate(zip(self.dims[:-1], self.dims[1:], strict=True)):
            add((self.rows, 2 * CHUNK, d_in, d_out), chunks, read, read)
            add((self.rows, CHUNK, d_in, d_out), 0, 1, 1)
            if layer:
                add((self.rows, CHUNK, d_out, d_in), chunks, read, read)
            add((self.rows, d_in, CHUNK, d_out), chunks, read, read)
        add((1, BATCH * tokens, WIDTH, WIDTH), 4, 1, 4)
        return +found

    def operations(self, tokens: int, backward: bool) -> int:
        """Multiplications and additions of all products."""
        return sum(2 * b * n * k * m * count for (b, n, k, m), count in self.shapes(tokens, backward).items())

    def runs(self, tokens: int, backward: bool, device: str) -> list[Callable[[], None]]:
        """All products, once by each of the libraries that torch has."""
        operands = [
            (*(torch.randn(batch, *size, device=device) for size in ((n, k), (k, m), (n, m))), count)
            for (batch, n, k, m), count in self.shapes(tokens, backward).items()
        ]

        def bmm() -> None:
            for a, b, out, count in operands:
                for _ in range(count):
                    torch.bmm(a, b, out=out)

        def onednn() -> None:
            linear = torch.ops.mkldnn._linear_pointwise
            for a, b, _, count in operands:
                for _ in range(count):
                    for x, y in zip(a, b, strict=True):
                        linear(x, y.mT, None, "none", [], "")

        return [bmm, onednn] if device == "cpu" and torch.backends.mkldnn.is_available() else [bmm]


MAKERS: dict[str, Callable[[], nn.Module | Products]] = {
    "projections": lambda: Projections(WIDTH),
    "attention": lambda: SelfAttention(WIDTH),
    "linear": lambda: FastWeights(WIDTH, [level(1)], heads=4, chunk=CHUNK, signal_at="token"),
}
for _name, _heads in HEADS.items():
    MAKERS[f"{_name}, products"] = lambda heads=_heads: Products(heads)
    MAKERS[f"{_name}, peer"] = lambda heads=_heads: Peer(heads)
    MAKERS[f"{_name}, vmap(grad)"] = lambda heads=_heads: VmapGrad(heads)
    MAKERS[f"{_name}, lag"] = lambda heads=_heads: mlp(heads, CHUNK)
    MAKERS[f"{_name}, token"] = lambda heads=_heads: mlp(heads, 1)


def measure(name: str, tokens: int, compiled: bool, repeats: int, device: str = "cpu") -> dict[str, float]:
    """Best seconds of a forward and of a forward+backward, and the peak memory that they took, in MiB."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    module = MAKERS[name]()
    if isinstance(module, Products):
        every = {what: module.runs(tokens, what != "forward", device) for what in PASSES}
        return {what: min(best(run, repeats, device) for run in runs) for what, runs in every.items()}
    return measure_module(module, BATCH, tokens, WIDTH, compiled, repeats, device)


def contenders(smoke: bool) -> list[Key]:
    """In the order of the tables."""
    tokens = 128 if smoke else 1024
    found = [("projections", tokens, False)]
    for name in HEADS:
        found += [(f"{name}, {one}", tokens, False) for one in ("peer", "products", "vmap(grad)", "lag")]
        found += [(f"{name}, lag", tokens, True), (f"{name}, token", tokens, False)]
    for length in (tokens, 4 * tokens):
        found += [("attention", length, False), ("linear", length, False)]
    return [one for one in found if not (smoke and one[2])]


def ceiling(study: Study, results: Results, name: str, ours: Sequence[Key]) -> None:
    """Prints what the products' arithmetic allows, and the share of it that ours reach."""
    bound = next(key for key in results.rounds[0] if key[0] == f"{name}, products")
    peer = (f"{name}, peer", *bound[1:])
    products = Products(HEADS[name])
    cells = []
    for what in PASSES:
        operations = products.operations(bound[1], what != "forward")
        rate, most = operations / results.seconds(bound, what), results.ratio(bound, peer, what)
        shares = [results.ratio(key, bound, what) for key in ours]
        study.add(f"{name}, {what}, operations", operations / (BATCH * bound[1]) / 1e6, "MFLOP/token")
        study.add(f"{name}, {what}, rate of products", rate / 1e9, "GFLOP/s")
        study.add(f"{name}, {what}, ceiling", most, "ratio", peer[0])
        for key, share in zip(ours, shares, strict=True):
            study.add(f"{name}, {what}, {'compiled' if key[2] else 'eager'}", share, "share of the ceiling", bound[0])
        figures = [f"{operations / (BATCH * bound[1]) / 1e6:.2f}", f"{rate / 1e9:.0f}", f"{most:.2f}"]
        cells.append([what, *figures, *(f"{share:.0%}" for share in shares)])
    headings = ["", "MFLOP/token", "GFLOP/s", "ceiling, × peer", *("compiled" if key[2] else "eager" for key in ours)]
    study.table(f"Share of the ceiling, {name}", headings, cells)


def report(study: Study, results: Results) -> list[Claim]:
    """Prints the tables, and gives what the issue asks for."""
    found = list(results.rounds[0])
    claims = []
    for name, eager, compiled in (("one head", 5.0, 10.0), ("four heads", 1.5, 1.5)):
        keys = [key for key in found if key[0].startswith(name)]
        ours, peer = [key for key in keys if key[0].endswith("lag")], keys[0]
        floor = next(key for key in found if key[0] == "projections")
        table(study, f"MLP memory, {name}", results, [floor, *keys], peer, BATCH)
        ceiling(study, results, name, ours)
        for key in ours:
            bound, kind = (compiled, "compiled") if key[2] else (eager, "eager")
            claims += [Claim(f"{name} {kind} {what} × peer", results.ratio(key, peer, what), bound) for what in PASSES]
    keys = [key for key in found if key[0] in ("attention", "linear")]
    lengths = sorted({key[1] for key in keys})
    for length in lengths:
        attention, linear = (key for key in keys if key[1] == length)
        title = f"Linear memory, exact token signals, {length} tokens"
        table(study, title, results, [attention, linear], attention, BATCH)
        time = results.ratio(attention, linear, "forward+backward")
        bound = 1.25 if length == lengths[0] else 1.0
        claims.append(Claim(f"linear forward+backward time / attention, {length}", time, bound, at_most=True))
    return claims


def main() -> int:
    """Measures everything in one run; the exit code is the verdict's."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return 0
    study = open_study("benchmark-fast-weights", "Tokens per second of fast-weight memories.", options=options)
    results = run_all(study, __file__, contenders(study.smoke))
    return study.verdict(report(study, results))


if __name__ == "__main__":
    sys.exit(main())
