"""Intervals for means, weighted means and metrics over a whole corpus, and for paired differences of them.

A weighted mean (a word error rate: errors over words) and a corpus metric (BLEU) are functions of sums over the examples. All
bootstraps here resample the examples, or clusters of them, as counts, and take the sums as a product of matrices.

The bootstrap is BCa (bias-corrected and accelerated: Efron, JASA 82, 1987), at the normal quantiles replaced by Student's with a
factor of sqrt(n / (n - 1)), as Hesterberg (The American Statistician 69, 2015) widens percentile intervals for small n. A plain
percentile interval is too narrow with few clusters and of skewed error rates; this one holds, and stays inside the data's range,
as a studentised one does not. tests/measure/test_coverage.py simulates how often it holds the truth.

Shapes: N examples, G clusters, K statistics of an example, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

RESAMPLES = 9_999
FEWEST_RESAMPLES = 1_999
MOST_DRAWS = 50_000_000
"""Large data gets fewer resamples, so that an interval takes seconds: its ends then vary by 2% of its width instead of 1%."""
LEVEL = 0.95
FEW_KINDS = 64

Value = Callable[[np.ndarray], np.ndarray]
"""Sums of statistics, shape (R, K), to the metric's values, shape (R,)."""


def ratio(sums: np.ndarray) -> np.ndarray:
    """The weighted mean from its two sums: column 0 is the sum of weight times value, column 1 that of the weights."""
    found: np.ndarray = sums[:, 0] / sums[:, 1]
    return found


def ratio_statistics(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """What ``ratio`` needs of each example, (N, 2); without weights all examples count the same."""
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    return np.stack([values * weights, weights], axis=1)


def mean_interval(
    values: np.ndarray, seed: int = 0, *, weights: np.ndarray | None = None, clusters: np.ndarray | None = None
) -> tuple[float, float]:
    """The 95% interval of a mean or weighted mean.

    Of values that are all 0 or 1, count the same and stand alone it is Wilson's score interval (Wilson 1927), which stays
    honest near 0 and 1 where a bootstrap of few examples shrinks to a point; else the bootstrap. Where all values are the same
    share the bootstrap, of clusters too, shrinks to a point, and it is Wilson's interval over the examples.

    Args:
        values: shape (N,).
        weights: shape (N,), not negative; all the same where left out.
        clusters: shape (N,), which examples are drawn together; each by itself where left out.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    clusters = _real_clusters(clusters)
    alone = weights is None and clusters is None
    one_share = values.min() == values.max() and 0 <= values[0] <= 1
    if one_share or (alone and np.isin(values, (0.0, 1.0)).all()):
        return _wilson(float(values.mean()), n)
    return corpus_interval(ratio_statistics(values, weights), ratio, seed, clusters=clusters)


def difference_interval(
    new: np.ndarray,
    old: np.ndarray,
    seed: int = 0,
    *,
    weights: tuple[np.ndarray, np.ndarray] | None = None,
    clusters: np.ndarray | None = None,
) -> tuple[float, float]:
    """The 95% interval of ``mean(new) - mean(old)`` over the same examples, or of the difference of weighted means.

    Of values that are all 0 or 1, count the same and stand alone it is the adjusted Wald interval for matched proportions of
    Agresti and Min (Statistics in Medicine 24, 2005), which adds half an example to each cell of the 2 x 2 table: with no
    discordant pair among few examples it stays wide, where a bootstrap would claim certainty. Else the bootstrap of the pairs;
    where no pair differs, shares that count differently or stand in clusters get that of Agresti and Min too.

    Args:
        new: shape (N,).
        old: shape (N,), the same examples in the same order.
        weights: of the new and of the old values, each (N,).
        clusters: shape (N,), which examples are drawn together.

    Raises:
        ValueError: the shapes differ, or there are no values.
    """
    new, old = np.asarray(new, dtype=np.float64), np.asarray(old, dtype=np.float64)
    if new.shape != old.shape:
        raise ValueError(f"paired values need equal shapes; found {new.shape} and {old.shape}")
    n = len(new)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    clusters = _real_clusters(clusters)
    if weights is None and clusters is None and np.isin(new, (0.0, 1.0)).all() and np.isin(old, (0.0, 1.0)).all():
        return _agresti_min(int(((new == 1) & (old == 0)).sum()), int(((new == 0) & (old == 1)).sum()), n)
    one, two = (None, None) if weights is None else weights
    ours, theirs = ratio_statistics(new, one), ratio_statistics(old, two)
    if np.array_equal(ours, theirs) and min(new.min(), old.min()) >= 0:
        # Error rates may pass 1, but rarely: they are shares for this purpose.
        return _agresti_min(0, 0, n)
    return corpus_difference_interval(ours, theirs, ratio, seed, clusters=clusters)


def _wilson(share: float, n: int) -> tuple[float, float]:
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    spread = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def _agresti_min(won: int, lost: int, n: int) -> tuple[float, float]:
    more, less, total = won + 0.5, lost + 0.5, n + 2
    middle = (more - less) / total
    spread = math.sqrt(more + less - (more - less) ** 2 / total) / total
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    return max(-1.0, middle - z * spread), min(1.0, middle + z * spread)


def corpus_interval(
    statistics: np.ndarray, value: Value, seed: int = 0, *, clusters: np.ndarray | None = None
) -> tuple[float, float]:
    """The 95% bootstrap interval of a metric that is a function of sums over the examples.

    Args:
        statistics: shape (N, K).
        clusters: shape (N,), which examples are drawn together.

    Raises:
        ValueError: there are no examples.
    """
    return _bca(_together(statistics, clusters), value, seed)


def corpus_difference_interval(
    new: np.ndarray, old: np.ndarray, value: Value, seed: int = 0, *, clusters: np.ndarray | None = None
) -> tuple[float, float]:
    """The same of ``value(new) - value(old)``: every resample draws the same examples for both.

    Args:
        new: shape (N, K).
        old: shape (N, K), the same examples in the same order.

    Raises:
        ValueError: the shapes differ, or there are no examples.
    """
    if new.shape != old.shape:
        raise ValueError(f"paired values need equal shapes; found {new.shape} and {old.shape}")
    k = new.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        return value(sums[:, :k]) - value(sums[:, k:])

    return _bca(_together(np.concatenate([new, old], axis=1), clusters), difference, seed)


def _bca(statistics: np.ndarray, value: Value, seed: int) -> tuple[float, float]:
    """The interval of ``value`` from rows that are drawn one by one; see the module."""
    n = len(statistics)
    total = statistics.sum(axis=0, keepdims=True)
    drawn, found = value(resampled_sums(statistics, seed)), float(value(total)[0])
    drawn = drawn[np.isfinite(drawn)]  # a resample of empty transcripts has no rate
    if not len(drawn) or n == 1:
        return found, found
    below = (np.sum(drawn < found) + 0.5 * np.sum(drawn == found)) / len(drawn)
    bias = stats.norm.ppf(np.clip(below, 1 / (len(drawn) + 1), len(drawn) / (len(drawn) + 1)))
    kinds, counts = np.unique(statistics, axis=0, return_counts=True)
    without = value(total - kinds)  # the jackknife
    usable = np.isfinite(without)
    gaps = np.average(without[usable], weights=counts[usable]) - without[usable] if usable.any() else np.zeros(0)
    square = float((counts[usable] * gaps**2).sum())
    acceleration = float((counts[usable] * gaps**3).sum()) / (6 * square**1.5) if square > 0 else 0.0
    wide = math.sqrt(n / (n - 1)) * stats.t.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], n - 1)
    moved = bias + (bias + wide) / np.maximum(1 - acceleration * (bias + wide), 1e-3)
    low, high = np.quantile(drawn, stats.norm.cdf(moved))
    return float(low), float(high)


def resampled_sums(statistics: np.ndarray, seed: int = 0, *, clusters: np.ndarray | None = None) -> np.ndarray:
    """Sums of statistics over resamples of the examples, drawn with replacement: (R, K).

    Equal rows are drawn together, as counts, which is the same and far faster.

    Args:
        statistics: shape (N, K).
        clusters: shape (N,); with them as many clusters are drawn as there are, each with all of its examples.

    Raises:
        ValueError: there are no examples.
    """
    statistics = _together(statistics, clusters)
    rng = np.random.default_rng(seed)
    n = len(statistics)
    resamples = int(np.clip(MOST_DRAWS // n, FEWEST_RESAMPLES, RESAMPLES))
    kinds, counts = np.unique(statistics, axis=0, return_counts=True)
    if len(kinds) <= FEW_KINDS:
        return np.asarray(rng.multinomial(n, counts / n, size=resamples) @ kinds, dtype=np.float64)
    found = []
    at_once = max(1, 4_000_000 // n)
    for start in range(0, resamples, at_once):
        rounds = min(at_once, resamples - start)
        drawn = rng.integers(0, n, size=(rounds, n)) + n * np.arange(rounds)[:, None]
        found.append(np.bincount(drawn.ravel(), minlength=rounds * n).reshape(rounds, n) @ statistics)
    return np.concatenate(found)


def _together(statistics: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """The statistics of what is drawn together, added up: (G, K), or (N, K) where each stands alone.

    Raises:
        ValueError: there are no examples.
    """
    statistics = np.asarray(statistics, dtype=np.float64)
    if not len(statistics):
        raise ValueError("an interval needs at least one value")
    clusters = _real_clusters(clusters)
    if clusters is None:
        return statistics
    together = np.zeros((int(clusters.max()) + 1, statistics.shape[1]))
    np.add.at(together, clusters, statistics)
    return together


def grouped(clusters: np.ndarray | None) -> bool:
    """Whether some examples really stand together."""
    return _real_clusters(clusters) is not None


def _real_clusters(clusters: np.ndarray | None) -> np.ndarray | None:
    """Clusters numbered from 0; None where each holds one example, or where one holds all and there is nothing to resample."""
    if clusters is None:
        return None
    names, numbers = np.unique(clusters, return_inverse=True)
    return None if len(names) in (1, len(numbers)) else numbers.reshape(-1)


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided p-value of the flips between two models on the same examples (McNemar, Psychometrika 12, 1947).

    If neither model were better, each example that only one of them gets right would be either's with probability 1/2: the
    binomial test. Without such examples it is 1.
    """
    return float(stats.binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


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
