"""A session that is left running: a million bytes of clean text, then a hostile stream, then clean text again.

The quickstart's model of modern English, adapting as `configs/quickstart_light.yaml` says, under its default guards,
reads the Bible of 1611 (`kjv`): resident memory and state at fifty places, refused updates. Then, beside the same model
frozen, what nobody would want to learn from:

    random        bytes at random
    repeated      one byte
    not finite    clean text in which every hundredth byte has an embedding of nan
    alternating   50 bytes of clean text, 50 of Python source, in turn

and then clean text again. Bits per byte of the session over those of the frozen model are held against each other over
every 10,000 bytes. Before all that, bytes per second of both, in turn.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metamem import Config, Network, Session, load_config, load_run, train
from metamem.analysis import Claim, Study, open_study
from metamem.analysis.plots import stream_figure
from metamem.progress import training_bar
from metamem.tasks.sources import load_source

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SMOKE = ("training.steps=4", "training.batch=2", "training.length=128", "vars.dim=32")
PIECE, WINDOW = 128, 10_000
SILENT = range(1, 9)  # bytes that no text has: their embeddings are nan in the hostile stream
PAGE = 4096


@dataclass(frozen=True)
class Sizes:
    """Bytes of each part, of what the worst ratio is taken over, and of what throughput is timed on."""

    soak: int
    hostile: int
    after: int
    window: int
    timed: int


def resident() -> int:
    """Bytes of this process in memory now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def model_of(study: Study) -> tuple[Network, Config]:
    """A run's model, or one trained here, under the config that adapts it."""
    overrides = [*(SMOKE if study.smoke else ()), *study.options.overrides]
    if study.options.run is not None:
        model, _ = load_run(study.options.run)
        return model, load_config(CONFIGS / "quickstart_light.yaml", overrides)
    config = load_config(CONFIGS / "quickstart_light.yaml", [*overrides, f"seed={study.seeds[-1]}"])
    if not study.smoke:
        config = replace(config, training=replace(config.training, steps=study.options.steps))
    with training_bar() as show:
        return train(config, study.folder, progress=show).model, config


def read(session: Session, stream: Tensor) -> np.ndarray:
    """Bits of every byte."""
    losses = [session.observe(stream[None, at : at + PIECE].long()).losses[0] for at in range(0, len(stream), PIECE)]
    return torch.cat(losses).numpy() / math.log(2)


def soak(study: Study, session: Session, text: Tensor) -> list[Claim]:
    """Clean text, to its end: what grows, and what is refused."""
    kept, every = [], max(PIECE, len(text) // 50 // PIECE * PIECE)
    bits, started = [], time.perf_counter()
    for start in range(0, len(text), every):
        bits.append(read(session, text[start : start + every]))
        kept.append((session.position, resident(), session.state_bytes))
    warm = [row for row in kept if row[0] >= len(text) // 5] or kept
    growth, refused = warm[-1][1] / warm[0][1] - 1, sum(session.refused.values())
    sizes = {row[2] for row in kept}
    report = session.report()
    rows = [
        ["bytes read", f"{session.position:,}"],
        ["bits per byte", f"{np.concatenate(bits).mean():.3f}"],
        ["bytes per second", f"{len(text) / (time.perf_counter() - started):,.0f}"],
        ["updates made", f"{report.updates:,}"],
        ["updates refused", ", ".join(f"{count} {why}" for why, count in session.refused.items()) or "0"],
        ["state, bytes", f"{min(sizes):,} to {max(sizes):,}"],
        ["resident memory, MiB", f"{warm[0][1] / 2**20:.1f} to {warm[-1][1] / 2**20:.1f} ({growth:+.2%})"],
        ["a gradient goes back, tokens", f"{report.gradient_tokens}"],
        ["an update takes, ms", f"{1e3 * report.seconds_per_update:.1f}, at most {1e3 * report.longest_update:.1f}"],
    ]
    study.table("Clean text", ["", "the session"], rows)
    study.add("growth of resident memory", growth, "share")
    study.add("updates refused on clean text", refused, "updates")
    return [
        Claim("resident memory grows by", growth, 0.01, at_most=True),
        Claim("sizes of the state", len(sizes), 1, at_most=True),
        Claim("refused on clean text", refused, 0, at_most=True),
    ]


def hostile_stream(clean: Tensor, code: Tensor, size: int, seed: int) -> dict[str, Tensor]:
    """The parts of the hostile stream by name."""
    generator = torch.Generator().manual_seed(seed)
    broken = clean[:size].clone()
    at = torch.randperm(len(broken), generator=generator)[: max(1, len(broken) // 100)]
    broken[at] = torch.randint(SILENT[0], SILENT[-1] + 1, (len(at),), generator=generator).to(torch.uint8)
    halves = [text[: size // 2].split(50) for text in (clean[size:], code)]
    alternating = torch.cat([part for pair in zip(*halves, strict=False) for part in pair])
    return {
        "random": torch.randint(256, (size,), generator=generator).to(torch.uint8),
        "repeated": torch.full((size,), ord("a"), dtype=torch.uint8),
        "not finite": broken,
        "alternating": alternating,
    }


def worst(ours: np.ndarray, frozen: np.ndarray, window: int) -> float:
    """The largest ratio of the two sums over any `window` bytes."""

    def sums(bits: np.ndarray) -> np.ndarray:
        total = np.cumsum(np.concatenate([[0.0], bits.astype(np.float64)]))
        return total[window:] - total[:-window]

    return float((sums(ours) / sums(frozen)).max())


def hostile(study: Study, session: Session, frozen: Session, parts: dict[str, Tensor], sizes: Sizes) -> list[Claim]:
    """Clean text, the hostile parts, clean text again, by the session and by the frozen model: where it is worse."""
    names = list(parts)
    ours, theirs, refused, rows = {}, {}, {}, []
    for name, text in parts.items():
        before = session.refused.copy()
        ours[name], theirs[name] = read(session, text), read(frozen, text)
        refused[name] = session.refused - before
    curves = {name: {"session": ours[name][None], "frozen": theirs[name][None]} for name in names}
    stream_figure(curves, study.folder / "hostile.png", "A hostile stream, and back", window=2048)
    a, f = (np.concatenate([one[name] for name in names]) for one in (ours, theirs))
    window = min(sizes.window, min(map(len, parts.values())))
    ends = np.cumsum([len(parts[name]) for name in names])
    for name, end in zip(names, ends, strict=True):
        # The windows that end in this part.
        first = max(0, end - len(parts[name]) - window + 1)
        ratio, why = worst(a[first:end], f[first:end], window), ", ".join(f"{n} {w}" for w, n in refused[name].items())
        cells = [f"{ours[name].mean():.3f}", f"{theirs[name].mean():.3f}", f"{ratio:.3f}", why or "–"]
        rows.append([name, *cells])
        study.add(f"{name}: bits per byte", float(ours[name].mean()), "bits/byte", "frozen", ratio)
    headings = ["part", "session", "frozen", f"worst over {window:,} bytes", "refused"]
    study.table("Bits per byte on the hostile stream", headings, rows)
    clean = ours["clean"].mean() / theirs["clean"].mean()
    again = ours["clean again"][-window:].mean() / theirs["clean again"][-window:].mean()
    print(f"of the frozen model's bits: {clean:.4f} before, {again:.4f} over the last {window:,} bytes after")
    back = _back(ours["clean again"] / theirs["clean again"].mean(), clean * 1.02)
    print(f"back within 2 % of it after {back:,} bytes (mean of the 2,048 after)")
    return [
        Claim("worst ratio to frozen", worst(a, f, window), 1.05, at_most=True),
        Claim("after it, over before", float(again / clean), 1.02, at_most=True),
    ]


def _back(ratios: np.ndarray, bound: float, window: int = 2048) -> int:
    window = min(window, len(ratios))
    total = np.cumsum(np.concatenate([[0.0], ratios]))
    running = (total[window:] - total[:-window]) / window
    return int(np.argmax(running <= bound)) if (running <= bound).any() else len(ratios)


def throughput(study: Study, model: Network, config: Config, text: Tensor, rounds: int = 5) -> list[Claim]:
    """Bytes per second streaming with batch 1, in turns, the best of each: adapting, the same model frozen, and
    adapting with every weight moving, as the quickstart does."""
    everything = replace(config, hierarchy=replace(config.hierarchy, levels=_moving_all(config)))
    sessions = {
        "frozen": lambda: Session(model, config, inner=False),
        "session": lambda: Session(model, config),
        "session, all weights": lambda: Session(model, everything),
        "frozen, writes off": lambda: Session(model, config, inner=False, writing=False),
    }
    best = dict.fromkeys(sessions, 0.0)
    for _ in range(rounds):
        for name, make in sessions.items():
            session, started = make(), time.process_time()
            read(session, text)
            best[name] = max(best[name], len(text) / (time.process_time() - started))
    rows = [[name, f"{rate:,.0f}", f"{rate / best['frozen']:.2f}"] for name, rate in best.items()]
    study.table(f"Bytes per second in pieces of {PIECE}, one thread", ["", "bytes/s", "of frozen"], rows)
    for name, rate in best.items():
        study.add(f"throughput, {name}", rate, "bytes/s", "frozen", rate / best["frozen"])
    return [Claim("throughput of frozen", best["session"] / best["frozen"], 0.6)]


def _moving_all(config: Config) -> list:
    return [replace(level, groups=["all"]) if level.clock == "inner" else level for level in config.hierarchy.levels]


def options(parser: argparse.ArgumentParser) -> None:
    """The soak's own options."""
    parser.add_argument("--run", type=Path, help="a trained run of the quickstart (default: train one here)")
    parser.add_argument("--steps", type=int, default=500, help="outer steps of the training")
    parser.add_argument("--bytes", type=int, default=1_000_000, help="of clean text")
    parser.add_argument("--hostile", type=int, default=20_000, help="bytes of each hostile part")
    parser.add_argument("--clean", type=int, default=60_000, help="bytes of clean text before and after those")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of the config")


def main() -> int:
    """Soaks, is hostile, times; the exit code is the verdict's."""
    study = open_study("soak", "A session that is left running.", options=options)
    torch.set_num_threads(1)
    asked = study.options
    sizes = Sizes(asked.bytes, asked.hostile, asked.clean, WINDOW, 16_384)
    if study.smoke:
        sizes = Sizes(6144, 1024, 2048, 1024, 2048)
    model, config = model_of(study)
    clean, code = load_source("kjv").train, load_source("python").train
    claims = throughput(study, model, config, clean[: sizes.timed], rounds=1 if study.smoke else 5)
    with torch.no_grad():
        model.get_parameter("embed.weight")[list(SILENT)] = torch.nan
    session, frozen = Session(model, config), Session(model, config, inner=False)
    claims += soak(study, session, clean[: sizes.soak])
    rest = clean[sizes.soak :]
    parts = {"clean": rest[: sizes.after]}
    parts |= hostile_stream(rest[sizes.after :], code, sizes.hostile, seed=0)
    parts["clean again"] = rest[sizes.after + 3 * sizes.hostile :][: sizes.after]
    claims += hostile(study, session, frozen, parts, sizes)
    return study.verdict(claims)


if __name__ == "__main__":
    sys.exit(main())
