"""Intervals for means and for paired differences of means.

Shapes: N examples, R resamples.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

RESAMPLES = 9_999
LEVEL = 0.95


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a mean.

    Of values that are all 0 or 1 it is Wilson's score interval (Wilson 1927), which stays honest near 0 and 1 where a
    bootstrap of few examples shrinks to a point; else the percentile bootstrap.

    Args:
        values: shape (N,).

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    if np.isin(values, (0.0, 1.0)).all():
        found = stats.binomtest(int(values.sum()), n).proportion_ci(LEVEL, method="wilson")
        return float(found.low), float(found.high)
    return _bootstrap(values, seed)


def difference_interval(new: np.ndarray, old: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of ``mean(new) - mean(old)`` over the same examples.

    Of values that are all 0 or 1 it is the adjusted Wald interval for matched proportions of Agresti and Min (Statistics in
    Medicine 24, 2005), which adds half an example to each cell of the 2 x 2 table: with no discordant pair among few examples it
    stays wide, where a bootstrap would claim certainty. Else the percentile bootstrap of the differences.

    Args:
        new: shape (N,).
        old: shape (N,), the same examples in the same order.

    Raises:
        ValueError: the shapes differ, or there are no values.
    """
    new, old = np.asarray(new, dtype=np.float64), np.asarray(old, dtype=np.float64)
    if new.shape != old.shape:
        raise ValueError(f"paired values need equal shapes; found {new.shape} and {old.shape}")
    n = len(new)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    if np.isin(new, (0.0, 1.0)).all() and np.isin(old, (0.0, 1.0)).all():
        won, lost = float(((new == 1) & (old == 0)).sum()) + 0.5, float(((new == 0) & (old == 1)).sum()) + 0.5
        total = n + 2
        middle = (won - lost) / total
        spread = math.sqrt(won + lost - (won - lost) ** 2 / total) / total
        z = float(stats.norm.ppf((1 + LEVEL) / 2))
        return max(-1.0, middle - z * spread), min(1.0, middle + z * spread)
    return _bootstrap(new - old, seed)


def median_interval(times: np.ndarray) -> tuple[float, float]:
    """The 95% interval of a median from order statistics (binomial; no assumption on the distribution).

    With too few values for 95% (under 6) it is the whole range.

    Args:
        times: shape (N,).
    """
    ordered = np.sort(np.asarray(times, dtype=np.float64))
    n = len(ordered)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    below = int(stats.binom.ppf((1 - LEVEL) / 2, n, 0.5))
    # The interval from the k-th to the (n+1-k)-th value holds the median with probability 1 - 2 P(Bin(n, 1/2) < k).
    k = max(below, 1)
    return float(ordered[k - 1]), float(ordered[n - k])


def _bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of a mean; equal values are drawn together, as counts, which is the same and far faster."""
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    n = len(values)
    if len(distinct) <= 64:
        means = rng.multinomial(n, counts / n, size=RESAMPLES) @ distinct / n
    else:
        means = np.array([rng.choice(values, size=n).mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
