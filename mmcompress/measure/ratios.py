"""Ratios of times from rounds in which models took turns.

In each round every model was timed for a moment, one right after the other, so that what makes the machine slower for seconds
touches all of them. The ratio is taken round by round, and of the rounds the Hodges-Lehmann estimate: the median of the means of
all pairs, which a round that something disturbed does not move. Its interval is that of Wilcoxon's signed-rank test, exact for
any distribution that is symmetric (Hollander, Wolfe and Chicken, Nonparametric Statistical Methods, 3.3). Both on logarithms.

Shapes: R rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from mmcompress.report.schema_speed import Ratio

LEVEL = 0.95
MOST_ROUNDS = 200
"""With more rounds neighbouring ones are put together: the signed-rank interval takes all pairs of them."""


def ratio(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> Ratio:
    """The time of one model over that of another, from rounds of calls.

    Args:
        above: for each round its calls in milliseconds.
        below: the same of the other model, in the same rounds.

    Raises:
        ValueError: there are no rounds, or not equally many.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"ratios need equally many rounds; found {len(above)} and {len(below)}")
    logs = np.log([np.median(calls) for calls in above]) - np.log([np.median(calls) for calls in below])
    if len(logs) > MOST_ROUNDS:
        logs = np.asarray([part.mean() for part in np.array_split(logs, MOST_ROUNDS)])
    middle, low, high = (float(v) for v in np.exp(hodges_lehmann(logs)))
    return Ratio(ratio=middle, low=low, high=high, rounds=len(above))


def hodges_lehmann(values: np.ndarray) -> tuple[float, float, float]:
    """The pseudo-median and its 95% interval; with fewer than 6 values the interval is all of the means, which is less than 95%.

    Args:
        values: shape (R,).
    """
    n = len(values)
    first, second = np.triu_indices(n)
    means = np.sort((values[first] + values[second]) / 2)
    k = _rank(n)
    return float(np.median(means)), float(means[k - 1]), float(means[len(means) - k])


@cache
def _rank(n: int) -> int:
    """The largest k >= 1 with P(W < k) <= 2.5%, W the signed-rank statistic of n values: the interval goes from the k-th smallest
    mean of two to the k-th largest.
    """
    # How many of the 2^n choices of signs give each sum of ranks, divided by 2^n as we go, so that nothing overflows.
    chances = np.zeros(n * (n + 1) // 2 + 1)
    chances[0] = 1.0
    for rank in range(1, n + 1):
        moved = np.zeros_like(chances)
        moved[rank:] = chances[:-rank]
        chances = (chances + moved) / 2
    below = np.cumsum(chances)
    return max(1, int(np.searchsorted(below, (1 - LEVEL) / 2, side="right")))
