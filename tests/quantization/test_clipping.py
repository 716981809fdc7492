"""Where values are cut off: histograms in bounded memory, and three rules against independent computations."""

import math
import tracemalloc

import numpy as np
import pytest
from onnxruntime.quantization.calibrate import HistogramCollector
from scipy.stats import entropy as scipy_entropy

from mmcompress.quantization.clipping import by_entropy, by_mse, by_percentile, squared_error
from mmcompress.quantization.histogram import Histogram
from mmcompress.quantization.ranges import collect_ranges

from .conftest import image_inputs


def counted(*batches: np.ndarray, bins: int = 8192) -> Histogram:
    found = Histogram(bins)
    for batch in batches:
        found.add(np.asarray(batch, dtype=np.float32))
    return found


def sample(kind: str, size: int = 40_000) -> np.ndarray:
    draw = np.random.default_rng(0)
    values = draw.normal(size=size)
    if kind == "outliers":
        values[:20] = 40 * np.sign(values[:20]) + values[:20]
    elif kind == "gelu":
        values = values * 0.5 * (1 + np.vectorize(math.erf)(values / math.sqrt(2)))
    elif kind == "probabilities":
        values = draw.beta(0.3, 8, size=size)
    return values.astype(np.float32)


def test_histogram_by_hand():
    """Four bins. 0..3 fit with a width of 1; 9 widens them to 4, and -1 needs the bin from -4 on."""
    found = counted([0, 1, 1, 2.5, 3], bins=4)
    assert (found.first, found.width, found.counts.tolist()) == (0, 1, [1, 2, 1, 1])
    found.add(np.array([9], dtype=np.float32))
    assert (found.first, found.width, found.counts.tolist()) == (0, 4, [5, 0, 1])
    found.add(np.array([-1], dtype=np.float32))
    assert (found.first, found.width, found.counts.tolist()) == (-1, 4, [1, 5, 0, 1])
    assert found.edges().tolist() == [-4, 0, 4, 8, 12]
    counts, width = found.absolute()
    assert (counts.tolist(), width) == ([6, 0, 1], 4)


@pytest.mark.parametrize("kind", ["plain", "outliers", "gelu", "probabilities"])
def test_histogram_is_numpys_of_all_values_in_any_order(kind):
    values = sample(kind)
    orders = [values, values[::-1], np.sort(values), np.sort(values)[::-1]]
    found = [counted(*np.array_split(order, cuts)) for order, cuts in zip(orders, (1, 7, 100, 3), strict=True)]
    for one in found:
        np.testing.assert_array_equal(one.counts, np.histogram(values, one.edges())[0])
        assert (one.first, one.width) == (found[0].first, found[0].width)
        assert 4096 <= len(one.counts) <= 8192


@pytest.mark.parametrize(
    "batches", [[[0.0]], [[5.0, 5.0]], [[-3e-7]], [[0.0], [1e30]], [[5.0], [-1e-20, 80.0]], [[-7], [-7.0001]]]
)
def test_histogram_of_few_values_counts_all(batches):
    found = counted(*batches)
    assert found.counts.sum() == sum(len(one) for one in batches)
    assert len(found.counts) <= 8192
    for rule in (lambda h, s: by_percentile(h, 99.99, s), by_entropy, by_mse):
        for symmetric in (False, True):
            low, high = rule(found, symmetric)
            assert np.isfinite([low, high]).all()
            assert low <= high


@pytest.mark.parametrize("kind", ["plain", "outliers", "gelu", "probabilities"])
@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 100.0])
def test_percentile_is_numpys_to_within_a_bin(kind, percentile):
    values = sample(kind)
    found = counted(*np.array_split(values, 5))
    tail = (100 - percentile) / 2
    # A sample's quantile is known no better than its neighbours lie apart.
    apart = np.sort(values)
    slack = found.width + float(max(np.diff(apart[:300]).max(), np.diff(apart[-300:]).max()) * (percentile < 100))
    low, high = by_percentile(found, percentile, False)
    np.testing.assert_allclose([low, high], np.percentile(values, [tail, 100 - tail]), atol=slack)
    low, high = by_percentile(found, percentile, True)
    assert -low == high == pytest.approx(np.percentile(np.abs(values), percentile), abs=slack)


def test_percentile_by_hand():
    """100 values in bins of 1: 1 in [0, 1), 98 in [1, 2), 1 in [9, 10). 2% off the ends leave what lies from 1 to 2."""
    found = counted([0.5] + 98 * [1.5] + [9.5], bins=16)
    assert found.width == 1.0
    assert by_percentile(found, 98, False) == (1.0, 2.0)
    assert by_percentile(found, 99, True) == (-2.0, 2.0)
    assert by_percentile(found, 100, False) == (0.5, 9.5)


def naive_divergence(counts: list[int], left: int, right: int, levels: int) -> float:
    """Migacz's slides, bin by bin."""
    p = [float(c) for c in counts]
    p[0] += left
    p[-1] += right
    q = [0.0] * len(counts)
    for level in range(levels):
        start, stop = level * len(counts) // levels, (level + 1) * len(counts) // levels
        places = [i for i in range(start, stop) if p[i] > 0]
        for i in places:
            q[i] = sum(counts[start:stop]) / len(places)
    kept = [i for i in range(len(p)) if p[i] > 0]
    return float(scipy_entropy([p[i] for i in kept], [max(q[i], 1e-3) for i in kept]))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["outliers", "gelu"])
def test_entropy_is_that_of_a_plain_loop(kind, symmetric):
    """With 16 integers, so that a loop over all thresholds of 256 bins is quick."""
    values = sample(kind, 5000)
    found = counted(values, bins=256)
    end = max(found.first + len(found.counts), -found.first)
    best = (math.inf, 0)
    for limit in range(end, 0, -1):
        first, last = (-end, end) if symmetric else (found.first, found.first + len(found.counts))
        counts = [int(((values >= i * found.width) & (values < (i + 1) * found.width)).sum()) for i in range(first, last)]
        inside = [c for i, c in zip(range(first, last), counts, strict=True) if -limit <= i < limit]
        if len(inside) < 16:
            break
        left = sum(c for i, c in zip(range(first, last), counts, strict=True) if i < -limit)
        right = sum(c for i, c in zip(range(first, last), counts, strict=True) if i >= limit)
        best = min(best, (naive_divergence(inside, left, right, 16), limit), key=lambda one: one[0])
    limit = best[1] * found.width
    low, high = by_entropy(found, symmetric, levels=16)
    assert low == pytest.approx(-limit if symmetric else max(-limit, values.min()))
    assert high == pytest.approx(limit if symmetric else min(limit, values.max()))


@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_entropy_is_near_what_onnxruntime_finds(kind):
    """It cuts bins, rounds and smooths otherwise; of smooth distributions both cut about the same off."""
    values = getattr(np.random.default_rng(0), kind)(size=40_000).astype(np.float32)
    theirs = HistogramCollector("entropy", False, 2049, 255, 99.99, "same")
    theirs.collect({"x": [values]})
    low, high = theirs.compute_entropy()["x"][:2]
    assert high < 0.95 * values.max()
    np.testing.assert_allclose(by_entropy(counted(values), False), (float(low), float(high)), rtol=0.1)


def test_mse_of_a_normal_distribution_is_the_published_optimum():
    """J. Max 1960, table II: 16 levels over a normal distribution are best 0.3352 apart, 7.5 steps to either end."""
    values = np.random.default_rng(1).normal(size=400_000)
    low, high = by_mse(counted(values), False, levels=16)
    assert (high - low) / 15 == pytest.approx(0.3352, rel=0.03)


def true_error(values: np.ndarray, low: float, high: float, levels: int, symmetric: bool) -> float:
    """Of each value by itself."""
    steps = levels - 2 if symmetric else levels - 1
    scale = (high - low) / steps
    zero = 0.0 if symmetric else np.round(-low / scale)
    ends = (-steps / 2, steps / 2) if symmetric else (0, steps)
    return float(np.mean(((np.clip(np.round(values / scale) + zero, *ends) - zero) * scale - values) ** 2))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["plain", "outliers", "gelu", "probabilities"])
def test_mse_is_the_least_of_a_grid_over_all_values(kind, symmetric):
    values = sample(kind).astype(np.float64)
    found = counted(values)
    low, high = by_mse(found, symmetric)
    ours = true_error(values, low, high, 256, symmetric)
    assert ours == pytest.approx(squared_error(found, low, high, 256, symmetric), rel=0.05)
    shares = np.linspace(0.1, 1, 40)
    most = np.abs(values).max()
    if symmetric:
        grid = [(-most * s, most * s) for s in shares]
    else:
        grid = [(min(values.min(), 0) * a, values.max() * b) for a in shares for b in shares[::3]]
    assert ours <= 1.03 * min(true_error(values, *one, 256, symmetric) for one in grid)


def test_mse_by_hand():
    """Values 0 (100 times), 1 (100 times) and 10 (once), two integers: 0 and the end. An end of h costs
    100 (1 - h)^2 + (10 - h)^2 for h below 2, least at (100 + 10) / 101 = 1.089; above 2, ones become 0 and cost 100.
    """
    low, high = by_mse(counted([0] * 100 + [1] * 100 + [10]), False, levels=2)
    assert low == 0
    assert high == pytest.approx(110 / 101, abs=0.1)  # ends are tried in hundredths of 10


def test_ranges_of_a_graph_by_all_rules(exported):
    """Rows in other batches give the same ranges, and memory does not grow with their number."""
    rows = [{"pixel_values": image_inputs(3)["pixel_values"].numpy()} for _ in range(4)]
    whole = [{"pixel_values": np.concatenate([one["pixel_values"] for one in rows])}]
    for method in ("percentile", "entropy", "mse"):
        found, again = (collect_ranges(exported["vision"], feeds, method, 99.0) for feeds in (rows, whole))
        everything = collect_ranges(exported["vision"], rows)
        assert found.rows == again.rows == everything.rows == 12
        assert set(found.limits()) == set(everything.limits())
        narrower = 0
        for name, (low, high) in found.limits().items():
            seen = everything.limits()[name]
            assert min(seen.low, 0) - 1e-6 <= low <= high <= max(seen.high, 0) + 1e-6
            narrower += high - low < 0.99 * (seen.high - seen.low)
            np.testing.assert_allclose((low, high), again.limits()[name], rtol=1e-2, atol=1e-3)
            signed = found.limits(signed=True)[name]
            assert signed.low == -signed.high
        assert narrower > 3, method


def test_memory_does_not_grow_with_the_number_of_examples(exported):
    block = {"pixel_values": image_inputs(8)["pixel_values"].numpy()}
    peaks = []
    for count in (2, 40):
        tracemalloc.start()
        assert collect_ranges(exported["vision"], (dict(block) for _ in range(count)), "percentile").rows == 8 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.02 * peaks[0]
