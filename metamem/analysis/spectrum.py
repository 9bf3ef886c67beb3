"""The memory spectrum: how much a token τ tokens ago still moves what a memory gives now.

    S(τ) = √( mean over t of ‖∂y_t / ∂x_{t−τ}‖²_F )

By autograd: ‖J‖²_F is the mean of ‖u J‖² over probes u ~ N(0, I), without bias, or its sum over unit vectors. A level's
own spectrum is that of the path through its component: at t every other part of the state before t is a constant.
A memory that decays has S(τ) ∝ 2^(−τ / half-life).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from metamem.memory.base import Memory
from metamem.state import State, Stateful, tree_map

ALL = "all"  # of all levels, and of every other path through the state
FLOOR = 1e-6  # of the largest value: below it a float32 spectrum is noise
ITERATIONS, GRID = 200, 10  # of the fit of several half-lives


def memory_spectrum(
    memory: Stateful,
    x: Float[Tensor, "batch time dim"],
    lags: Sequence[int],
    targets: int = 16,
    probes: int | None = 2,
    seed: int = 0,
) -> dict[str, Float[Tensor, "lags"]]:
    """S at the given lags, by level of the memory, and of `all` of it: over `targets` tokens t, drawn among those that
    have all lags before them. `probes` per target; None takes all unit vectors, which is exact."""
    generator = torch.Generator().manual_seed(seed)
    batch, reach = x.shape[0], max(lags)
    if reach >= x.shape[1]:
        raise ValueError(f"a lag of {reach} needs more than {x.shape[1]} tokens")
    order = torch.randperm(x.shape[1] - reach, generator=generator)[:targets]
    at = (reach + order).sort().values.repeat_interleave(batch)
    rows = x.detach().repeat(len(order), 1, 1).requires_grad_()
    outputs = _outputs_at(memory, rows, at)
    like = outputs[ALL]
    if probes is None:
        vectors = list(torch.eye(like.shape[-1], dtype=x.dtype))
    else:  # the same for all: their differences are not those of the probes
        vectors = [torch.randn(like.shape, generator=generator, dtype=x.dtype) for _ in range(probes)]
    before = at[:, None] - torch.tensor(list(lags))
    found = {}
    for name, y in outputs.items():
        slopes = (torch.autograd.grad((y * u).sum(), rows, retain_graph=True)[0] for u in vectors)
        squares = sum(slope.double().square().sum(-1).gather(1, before).mean(0) for slope in slopes)
        found[name] = torch.as_tensor(squares / (probes or 1)).sqrt()
    return found


def _outputs_at(
    memory: Stateful, x: Float[Tensor, "rows time dim"], at: Int[Tensor, "rows"]
) -> dict[str, Float[Tensor, "rows dim_out"]]:
    """y_t of each row at its own t, of all and of each level; `at` ascends. Rows are read no further than their t."""
    state, start, outputs = memory.init_state(len(x)), 0, dict[str, list[Tensor]]()
    left = x
    for t in at.unique().tolist():
        if t > start:
            state = memory(left[:, start:t], state)[1]
        here = int((at == t).sum())
        mine, later = (tree_map(lambda leaf, part=part: leaf[part], state) for part in _halves(here))
        token = left[:here, t : t + 1]
        for name in (ALL, *state.get("levels", {})):
            before = mine if name == ALL else isolate(mine, name)
            outputs.setdefault(name, []).append(memory(token, before)[0][:, 0])
        state, left, start = later, left[here:], t
    return {name: torch.cat(parts) for name, parts in outputs.items()}


def _halves(count: int) -> tuple[slice, slice]:
    return slice(None, count), slice(count, None)


def isolate(state: State, level: str) -> State:
    """The same numbers, a constant but for one level's own part."""
    cut = tree_map(Tensor.detach, state)
    return cut | {"levels": cut["levels"] | {level: state["levels"][level]}}


def lags_up_to(longest: int, count: int = 20) -> list[int]:
    """Lags from 1 to the longest, as evenly spaced on a logarithmic axis as whole numbers are."""
    return sorted({round(longest ** (index / (count - 1))) for index in range(count)})


def memory_inputs(model: nn.Module, x: Shaped[Tensor, "batch time *dims"]) -> dict[str, tuple[Memory, Tensor]]:
    """What each memory of a model reads while the model reads x, by its path."""
    found: dict[str, tuple[Memory, Tensor]] = {}

    def keep(path: str, memory: Memory):
        return memory.register_forward_pre_hook(lambda _, given: found.update({path: (memory, given[0].detach())}))

    hooks = [keep(path, part) for path, part in model.named_modules() if isinstance(part, Memory)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


# ------------------------------------------------------------------------------------------------------------ fits


class Decay(NamedTuple):
    """`amplitude · 2^(−τ / half_life)`, with the share of the variance of log S that it explains."""

    half_life: float
    amplitude: float
    explained: float


def fit_half_life(lags: Sequence[float], values: Sequence[float], first: int = 1) -> Decay:
    """The exponential through a spectrum from lag `first` on (a level's period: before it, only some tokens have been
    written), by least squares of log S; a spectrum that does not fall has the half-life inf, one that vanishes nan."""
    top = max(values, default=0.0)
    points = [(lag, math.log(s)) for lag, s in zip(lags, values, strict=True) if lag >= first and s > FLOOR * top]
    if len(points) < 2:
        return Decay(math.nan, top, math.nan)
    at, log = np.array(points).T
    slope, height = np.polyfit(at, log, 1)
    spread = log.var()
    explained = 1 - (log - slope * at - height).var() / spread if spread > 0 else 1.0
    half_life = -math.log(2) / slope if slope * (at[-1] - at[0]) < -1e-6 else math.inf
    return Decay(float(half_life), math.exp(height), float(explained))


def fit_half_lives(lags: Sequence[float], values: Sequence[float], count: int) -> list[Decay]:
    """The sum of `count` exponentials through a spectrum, fast to slow, by least squares of log S: Levenberg and
    Marquardt over the logarithms of amplitudes and half-lives, from the best of a grid of half-lives."""
    at, log = np.array(lags, float), np.log(np.array(values, float))
    grid = itertools.combinations(np.geomspace(0.5, 2 * at[-1], GRID), count)
    theta = min((_start(lives, at, log) for lives in grid), key=lambda start: _loss(start, at, log))
    damping, loss = 1e-2, math.inf
    for _ in range(ITERATIONS):
        terms, slopes = _log_sum(theta, at)
        residual = log - terms
        curvature = slopes.T @ slopes
        step = np.linalg.solve(curvature + damping * np.diag(curvature.diagonal() + 1e-12), slopes.T @ residual)
        loss, moved = float(residual @ residual), theta + step
        after = _loss(moved, at, log)
        theta, damping = (moved, damping / 3) if after < loss else (theta, damping * 4)
        if abs(loss - after) < 1e-14 * (1 + loss) and after <= loss:
            break
    spread = float(np.square(log - log.mean()).sum())
    explained = 1 - loss / spread if spread else 1.0
    amplitudes, lives = np.exp(theta).reshape(2, count)
    return sorted(Decay(float(h), float(a), explained) for h, a in zip(lives, amplitudes, strict=True))


def _start(lives: Sequence[float], at: np.ndarray, log: np.ndarray) -> np.ndarray:
    """Parameters of these half-lives, with the amplitudes that are best for relative errors."""
    decays = 0.5 ** (at[:, None] / np.array(lives))
    amplitudes = np.linalg.lstsq(decays / np.exp(log)[:, None], np.ones(len(at)), rcond=None)[0]
    return np.log(np.concatenate([np.maximum(amplitudes, 1e-6 * np.exp(log.max())), lives]))


def _loss(theta: np.ndarray, at: np.ndarray, log: np.ndarray) -> float:
    return float(np.square(log - _log_sum(theta, at)[0]).sum())


def _log_sum(theta: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log Σ_i a_i 2^(−τ / h_i) over the lags, and its slopes by log a and log h."""
    amplitudes, lives = np.exp(np.clip(theta, -60, 60)).reshape(2, -1)
    decays = math.log(2) * at[:, None] / lives
    terms = amplitudes * np.exp(-decays)
    total = terms.sum(1, keepdims=True) + 1e-300
    return np.log(total[:, 0]), np.concatenate([terms / total, terms * decays / total], 1)
