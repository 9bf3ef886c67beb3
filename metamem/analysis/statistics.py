"""Means over seeds with their confidence intervals, by Student's t."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean over `count` values, and how far the interval reaches to either side of it (nan for one value)."""

    mean: float
    reach: float
    count: int

    def __str__(self) -> str:
        if self.count < 2:
            return f"{self.mean:.4g}"
        digits = 4 if self.reach == 0 else max(0, min(6, 1 - math.floor(math.log10(self.reach))))
        return f"{self.mean:.{digits}f} ± {self.reach:.{digits}f}"


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Where the mean lies with the given confidence, of independent and normal values."""
    count = len(values)
    mean = statistics.fmean(values) if values else math.nan
    if count < 2:
        return Interval(mean, math.nan, count)
    return Interval(mean, t_quantile((1 + level) / 2, count - 1) * statistics.stdev(values) / math.sqrt(count), count)


@functools.cache
def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t above its median, by bisection of the distribution in θ = atan(t / √degrees)."""
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _central(angle: float, degrees: int) -> float:
    """P(|T| < √degrees tan angle): a finite sum of powers of the cosine (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    cosine, term, total = math.cos(angle), 1.0, 0.0
    odd = degrees % 2
    if odd:
        term = cosine
    for index in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * index / (index + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
