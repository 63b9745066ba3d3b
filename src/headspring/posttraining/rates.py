"""Rates with intervals: Wilson's for one rate, a paired bootstrap for the difference of two on the same tasks.

Two models answer the same tasks, so their difference is resampled task by task: pairing removes the spread between easy
and hard tasks, which two separate intervals would count twice. Sources: Wilson 1927 (score interval); Efron and
Tibshirani 1993, chapter 13 (percentile bootstrap).
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a rate; (0, 1) where nothing was measured."""
    if total == 0:
        return 0.0, 1.0
    rate, spread = right / total, Z95**2 / total
    centre = (rate + spread / 2) / (1 + spread)
    half = Z95 * sqrt(rate * (1 - rate) / total + spread / (4 * total)) / (1 + spread)
    return (max(0.0, centre - half) if right else 0.0), (min(1.0, centre + half) if right < total else 1.0)


def rate(right: Sequence[bool]) -> dict[str, Any]:
    """`{"rate", "low", "high", "n"}` of answers that are right or wrong. The rate of nothing is 0 of 0."""
    low, high = wilson(sum(right), len(right))
    return {"rate": sum(right) / len(right) if right else 0.0, "low": low, "high": high, "n": len(right)}


def difference(before: Sequence[bool], after: Sequence[bool], seed: int = 0, num_resamples: int = 4000) -> dict[str, float]:
    """`{"mean", "low", "high"}`: rate after − rate before on the same tasks; 95 % interval of a paired bootstrap."""
    if len(before) != len(after):
        raise ValueError(f"{len(before)} answers before and {len(after)} after: they must be to the same tasks")
    if not before:
        return {"mean": 0.0, "low": -1.0, "high": 1.0}
    gains = np.asarray(after, dtype=np.int64) - np.asarray(before, dtype=np.int64)
    counts = np.array([(gains == value).sum() for value in (-1, 0, 1)])  # resampling n tasks = one multinomial draw
    drawn = np.random.default_rng(seed).multinomial(len(gains), counts / len(gains), size=num_resamples)
    means = (drawn[:, 2] - drawn[:, 0]) / len(gains)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(gains.mean()), "low": float(low), "high": float(high)}
