"""Intervals against worked examples, scipy, and simulation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from mmcompress.measure.statistics import (
    corpus_difference_interval,
    corpus_interval,
    difference_interval,
    mean_interval,
    median_interval,
    ratio,
    resampled_sums,
)


def test_wilson_by_hand() -> None:
    # 81 of 263, Newcombe (Statistics in Medicine 17, 1998, table I): score interval 0.2553 to 0.3662.
    values = np.array([1.0] * 81 + [0.0] * 182)
    low, high = mean_interval(values)
    assert low == pytest.approx(0.2553, abs=5e-5)
    assert high == pytest.approx(0.3662, abs=5e-5)


def test_perfect_scores_of_few_examples_are_not_certain() -> None:
    low, high = mean_interval(np.ones(10))
    assert high == pytest.approx(1.0)
    assert low < 0.75


def test_bootstrap_of_real_values_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).gamma(2.0, 1.0, 300)
    ours = mean_interval(values)
    assert ours == pytest.approx(scipy_interval(lambda v: float(np.mean(v)), values), abs=0.02)


def test_bootstrap_of_few_distinct_values_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).choice([0.0, 0.3, 0.6, 1.0], 200)
    ours = mean_interval(values)
    assert ours == pytest.approx(scipy_interval(lambda v: float(np.mean(v)), values), abs=0.01)


def test_agresti_min_by_hand() -> None:
    # 20 pairs: 6 lost, 2 won. With half an example more in each cell: won 2.5, lost 6.5, n 22;
    # middle -4/22, spread sqrt(9 - 16/22)/22 = 0.130738, half width 1.959964 * 0.130738.
    old = np.array([1.0] * 6 + [0.0] * 2 + [1.0] * 12)
    new = np.array([0.0] * 6 + [1.0] * 2 + [1.0] * 12)
    low, high = difference_interval(new, old)
    assert low == pytest.approx(-4 / 22 - 1.959964 * 0.1307380, abs=1e-5)
    assert high == pytest.approx(-4 / 22 + 1.959964 * 0.1307380, abs=1e-5)


def test_no_discordant_pair_among_few_examples_stays_wide() -> None:
    few = difference_interval(np.ones(20), np.ones(20))
    many = difference_interval(np.ones(2000), np.ones(2000))
    assert few[0] < -0.08
    assert many[0] > -0.001
    assert few[1] == -few[0]


def test_median_interval_by_hand() -> None:
    # n = 10: P(Bin(10, 1/2) < 2) = 11/1024 = 0.0107, < 3: 0.0547. So the 2nd and the 9th value.
    assert median_interval(np.arange(1.0, 11.0)) == (2.0, 9.0)
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)


def test_median_coverage() -> None:
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(2000):
        low, high = median_interval(rng.exponential(size=41))
        inside += low <= np.log(2) <= high
    assert 0.93 <= inside / 2000 <= 0.985


def test_nothing_to_measure_is_an_error() -> None:
    for call in (mean_interval, median_interval):
        with pytest.raises(ValueError, match="at least one"):
            call(np.array([]))
    with pytest.raises(ValueError, match="equal shapes"):
        difference_interval(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="at least one"):
        corpus_interval(np.zeros((0, 2)), ratio)
    with pytest.raises(ValueError, match="equal shapes"):
        corpus_difference_interval(np.ones((3, 2)), np.ones((4, 2)), ratio)


def errors_and_words(seed: int, n: int = 300, rate: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    """Word errors of made-up transcripts: some speakers' recordings are hopeless, most have few errors or none."""
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 30, n)
    errors = rng.binomial(words, np.where(rng.random(n) < 0.1, 0.6, rate))
    return errors.astype(float), words.astype(float)


def scipy_interval(statistic: Callable[..., float], *data: np.ndarray) -> tuple[float, float]:
    """Its BCa interval, at the level that Student's quantiles with the factor for small n stand for."""
    n = len(data[0])
    level = 2 * stats.norm.cdf((n / (n - 1)) ** 0.5 * stats.t.ppf(0.975, n - 1)) - 1
    found = stats.bootstrap(
        data, statistic, paired=True, vectorized=False, method="BCa", confidence_level=level, n_resamples=9999, rng=2
    )
    return found.confidence_interval.low, found.confidence_interval.high


def test_weighted_mean_agrees_with_scipy() -> None:
    errors, words = errors_and_words(1)
    ours = mean_interval(errors / words, weights=words)
    theirs = scipy_interval(lambda e, w: e.sum() / w.sum(), errors, words)
    assert ours == pytest.approx(theirs, abs=0.002)
    # An unweighted mean of the rates is another number with another interval.
    assert abs(mean_interval(errors / words)[1] - ours[1]) > 0.002


def test_difference_of_weighted_means_is_paired_and_agrees_with_scipy() -> None:
    old, words = errors_and_words(1)
    new = old + np.random.default_rng(5).binomial(1, 0.1, len(old))
    ours = difference_interval(new / words, old / words, weights=(words, words))
    theirs = scipy_interval(lambda a, b, w: (a.sum() - b.sum()) / w.sum(), new, old, words)
    assert ours == pytest.approx(theirs, abs=0.0005)
    one, other = mean_interval(new / words, weights=words), mean_interval(old / words, weights=words)
    assert ours[1] - ours[0] < 0.3 * (one[1] - one[0] + other[1] - other[0])


def test_a_product_of_shares_agrees_with_scipy() -> None:
    """A metric that is no mean: the geometric mean of two corpus rates, as in BLEU."""
    rng = np.random.default_rng(7)
    counts = np.stack([rng.binomial(9, 0.6, 200), rng.binomial(8, 0.3, 200)], axis=1).astype(float)
    worse = np.stack([rng.binomial(counts[:, k].astype(int), 0.95) for k in (0, 1)], axis=1).astype(float)

    def value(sums: np.ndarray) -> np.ndarray:
        return np.sqrt(sums[:, 0] / (9 * 200) * sums[:, 1] / (8 * 200))

    def one(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(a.mean() / 9 * b.mean() / 8))

    assert corpus_interval(counts, value) == pytest.approx(scipy_interval(one, *counts.T), abs=0.002)
    ours = corpus_difference_interval(worse, counts, value)
    assert ours == pytest.approx(scipy_interval(lambda a, b, c, d: one(a, b) - one(c, d), *worse.T, *counts.T), abs=0.001)


def test_resamples_by_hand() -> None:
    # Two examples with (1, 10) and (3, 0): a resample is (2, 20), (4, 10) or (6, 0), with odds 1 : 2 : 1.
    sums = resampled_sums(np.array([[1.0, 10.0], [3.0, 0.0]]))
    kinds, counts = np.unique(sums, axis=0, return_counts=True)
    assert kinds.tolist() == [[2, 20], [4, 10], [6, 0]]
    assert counts / len(sums) == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_equal_rows_together_or_one_by_one_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).integers(0, 5, 400).astype(float)
    weights = np.random.default_rng(2).integers(1, 4, 400).astype(float)
    together = mean_interval(values, weights=weights)
    monkeypatch.setattr("mmcompress.measure.statistics.FEW_KINDS", 0)
    assert mean_interval(values, weights=weights) == pytest.approx(together, abs=0.02)
    assert mean_interval(values, weights=weights) != together


def test_large_data_gets_fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).random((100, 2))
    assert len(resampled_sums(rows)) == 9_999
    monkeypatch.setattr("mmcompress.measure.statistics.MOST_DRAWS", 300_000)
    assert len(resampled_sums(rows)) == 3_000
    monkeypatch.setattr("mmcompress.measure.statistics.MOST_DRAWS", 1_000)
    assert len(resampled_sums(rows)) == 1_999


def test_clusters_by_hand_and_against_scipy() -> None:
    # Five copies of each of 40 values say no more than the 40 values: the clustered interval is theirs.
    values = np.random.default_rng(3).gamma(2.0, 1.0, 40)
    copies, speakers = np.repeat(values, 5), np.repeat(np.arange(40), 5)
    clustered = mean_interval(copies, clusters=speakers)
    theirs = scipy_interval(lambda v: float(np.mean(v)), values)
    assert clustered == pytest.approx(theirs, abs=0.04)
    naive = mean_interval(copies)
    assert naive[1] - naive[0] < 0.5 * (clustered[1] - clustered[0])
    named = np.array([f"speaker {i}" for i in speakers])
    assert mean_interval(copies, clusters=named) == pytest.approx(clustered, abs=0.04)


def test_clusters_widen_shares_and_differences_too() -> None:
    rng = np.random.default_rng(4)
    speakers = np.repeat(np.arange(30), 20)
    hard = np.repeat(rng.random(30) < 0.3, 20)
    old, new = np.where(hard, 0.0, 1.0), np.where(hard | np.repeat(rng.random(30) < 0.2, 20), 0.0, 1.0)
    for clustered, naive in (
        (mean_interval(old, clusters=speakers), mean_interval(old)),
        (difference_interval(new, old, clusters=speakers), difference_interval(new, old)),
    ):
        assert clustered[1] - clustered[0] > 1.5 * (naive[1] - naive[0])


def test_one_example_a_cluster_is_no_cluster_and_one_cluster_is_none() -> None:
    values = np.array([1.0, 0.0, 1.0, 1.0])
    for clusters in (np.arange(4), np.zeros(4)):
        assert mean_interval(values, clusters=clusters) == mean_interval(values)
        assert difference_interval(values, 1 - values, clusters=clusters) == difference_interval(values, 1 - values)


def test_no_error_among_few_examples_is_not_certain() -> None:
    # 0 of 20: Wilson's upper end is z^2 / (n + z^2) = 3.8415 / 23.8415 = 0.16113.
    words = np.arange(1.0, 21.0)
    assert mean_interval(np.zeros(20), weights=words) == pytest.approx((0.0, 0.16113), abs=1e-5)
    # Clusters do not change it: one error among them would give an interval of this width, not one many times as wide.
    clusters = np.arange(20) // 2
    assert mean_interval(np.zeros(20), weights=words, clusters=clusters) == pytest.approx((0.0, 0.16113), abs=1e-5)
    # And of a difference without a differing pair: 1.959964 * sqrt(1) / 22.
    low, high = difference_interval(np.full(20, 0.5), np.full(20, 0.5), weights=(words, words))
    assert (low, high) == pytest.approx((-1.959964 / 22, 1.959964 / 22), abs=1e-6)
    assert difference_interval(np.full(20, 0.5), np.full(20, 0.5), clusters=clusters) == pytest.approx((low, high))


def test_ratio_by_hand() -> None:
    assert ratio(np.array([[3.0, 4.0], [1.0, 2.0]])).tolist() == [0.75, 0.5]


def test_skewed_values_move_the_interval_towards_the_tail() -> None:
    """The bias correction and the acceleration: a percentile interval is nearly symmetric here."""
    values = np.random.default_rng(1).exponential(1.0, 60)
    low, high = mean_interval(values)
    assert (low, high) == pytest.approx(scipy_interval(lambda v: float(np.mean(v)), values), abs=0.03)
    assert high - values.mean() > 1.3 * (values.mean() - low)


def test_equal_shares_are_not_certain() -> None:
    # Every answer half right: Wilson's interval of 5 in 10.
    ends = stats.binomtest(5, 10).proportion_ci(0.95, method="wilson")
    assert mean_interval(np.full(10, 0.5)) == pytest.approx((ends.low, ends.high))
