"""Where to cut a tensor's values off before they become 8-bit integers, from a histogram of them.

Integers stand for ``low + n * (high - low) / (levels - 1)``; one of them stands for 0 exactly, so a range holds 0. What lies
outside becomes the nearest end. A narrower range has finer steps and cuts off more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mmcompress.quantization.histogram import Floats, Histogram

ENTROPY_STEPS = 256
MSE_STEPS, MSE_ROUNDS = 91, 3
SMALLEST = 0.1
"""Ranges narrower than this share of what was seen are not tried."""


def by_percentile(histogram: Histogram, percentile: float, symmetric: bool) -> tuple[float, float]:
    """The range that holds a percentage of the values: the same share is cut off at either end, or of the absolute values.

    Within a bin, values count as spread evenly.

    Args:
        percentile: above 50, at most 100.
        symmetric: whether the range is to have 0 in the middle.
    """
    if symmetric:
        counts, width = histogram.absolute()
        limit = min(_quantile(counts, np.arange(len(counts) + 1) * width, percentile / 100), _largest(histogram))
        return -limit, limit
    tail = (100 - percentile) / 200
    edges = histogram.edges()
    found = np.clip([_quantile(histogram.counts, edges, share) for share in (tail, 1 - tail)], histogram.low, histogram.high)
    return float(found[0]), float(found[1])


def _quantile(counts: NDArray[np.int64], edges: Floats, share: float) -> float:
    below = np.concatenate([[0], np.cumsum(counts)])
    wanted = share * below[-1]
    place = int(np.clip(np.searchsorted(below, wanted, side="left") - 1, 0, len(counts) - 1))
    inside = (wanted - below[place]) / counts[place] if counts[place] else 0.0
    return float(edges[place] + inside * (edges[place + 1] - edges[place]))


def by_entropy(histogram: Histogram, symmetric: bool, levels: int = 256) -> tuple[float, float]:
    """The range [-t, t], less what was never seen, whose integers lose least information of the distribution.

    The Kullback-Leibler divergence of the values, those outside moved to the ends, and of what is left of them after their bins
    were joined to as many as there are integers (S. Migacz, 8-bit inference with TensorRT, 2017).
    """
    limits = list(_thresholds(histogram, symmetric, levels))
    if not limits:
        return _everything(histogram, symmetric)
    losses = [_divergence(*_slices(histogram, limit, symmetric), levels) for limit in limits]
    limit = limits[int(np.argmin(losses))] * histogram.width
    low, high = _everything(histogram, symmetric)
    return max(low, -limit), min(high, limit)


def _thresholds(histogram: Histogram, symmetric: bool, levels: int) -> Iterator[int]:
    """Numbers of bins from 0 that a threshold may lie at: those whose range has at least as many bins as there are integers."""
    end = max(histogram.first + len(histogram.counts), -histogram.first)
    step = max(1, end // ENTROPY_STEPS)
    for limit in range(end, 0, -step):
        if len(_slices(histogram, limit, symmetric)[0]) < levels:
            return
        yield limit


def _slices(histogram: Histogram, limit: int, symmetric: bool) -> tuple[NDArray[np.int64], int, int]:
    """The counts within a threshold, and how many values lie to the left and to the right of them."""
    begin, end = histogram.first, histogram.first + len(histogram.counts)
    counts = histogram.counts
    if symmetric:  # the integers cover both sides, whatever was seen
        most = max(-begin, end)
        counts = np.pad(counts, (begin + most, most - end))
        begin, end = -most, most
    left, right = max(-limit - begin, 0), max(end - limit, 0)
    inside = counts[left : len(counts) - right]
    return inside, int(counts[:left].sum()), int(counts[len(counts) - right :].sum())


def _divergence(inside: NDArray[np.int64], left: int, right: int, levels: int) -> float:
    """KL(p || q) in nats: p the counts with what lies outside at the ends, q those inside spread evenly over each integer's bins.

    Bins that are empty in p are in q too; bins of p that are empty in q, as only what lies outside fills them, count as a
    thousandth of a value.
    """
    p = inside.astype(np.float64)
    p[0] += left
    p[-1] += right
    filled = p > 0
    starts = (np.arange(levels) * len(inside)) // levels
    sizes = np.diff(np.append(starts, len(inside)))
    sums = np.add.reduceat(inside, starts).astype(np.float64)
    used = np.add.reduceat(filled.astype(np.int64), starts)
    q = np.where(filled, np.repeat(sums / np.maximum(used, 1), sizes), 0.0)
    q = np.maximum(q[filled], 1e-3)
    p = p[filled]
    return float((p / p.sum() * np.log((p / p.sum()) / (q / q.sum()))).sum())


def by_mse(histogram: Histogram, symmetric: bool, levels: int = 256) -> tuple[float, float]:
    """The range with the least mean squared error of values as integers (J. Max, Quantizing for minimum distortion, 1960).

    Each end is moved in hundredths of what was seen, the other one held, in turns.
    """
    low, high = _everything(histogram, symmetric)
    shares = np.linspace(1, SMALLEST, MSE_STEPS)
    if symmetric:
        losses = [squared_error(histogram, -high * share, high * share, levels, True) for share in shares]
        limit = high * float(shares[int(np.argmin(losses))])
        return -limit, limit
    best = (low, high)
    for _ in range(MSE_ROUNDS):
        before = best
        for end, most in ((1, high), (0, low)):
            tried = [(best[0], most * float(share)) if end else (most * float(share), best[1]) for share in shares]
            best = min(tried, key=lambda one: squared_error(histogram, one[0], one[1], levels, False)) if most else best
        if best == before:
            break
    return best


def squared_error(histogram: Histogram, low: float, high: float, levels: int, symmetric: bool) -> float:
    """Mean squared error of the values, each in the middle of its bin, as integers."""
    steps = levels - 2 if symmetric else levels - 1
    scale = (high - low) / steps
    if scale <= 0:
        return float((histogram.counts * histogram.centres() ** 2).sum() / max(histogram.counts.sum(), 1))
    zero = 0 if symmetric else np.rint(-low / scale)
    least, most = (-(steps // 2), steps // 2) if symmetric else (0, steps)
    values = histogram.centres()
    integers = np.clip(np.rint(values / scale) + zero, least, most)
    return float((histogram.counts * ((integers - zero) * scale - values) ** 2).sum() / max(histogram.counts.sum(), 1))


def _largest(histogram: Histogram) -> float:
    return float(max(abs(histogram.low), abs(histogram.high)))


def _everything(histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    """What was seen, with 0."""
    if symmetric:
        return -_largest(histogram), _largest(histogram)
    return min(float(histogram.low), 0.0), max(float(histogram.high), 0.0)
