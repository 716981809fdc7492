"""Intervals against worked examples, scipy, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mmcompress.measure.statistics import difference_interval, mean_interval, median_interval


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
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=2).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_bootstrap_of_few_distinct_values_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).choice([0.0, 0.3, 0.6, 1.0], 200)
    ours = mean_interval(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=2).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)


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


@pytest.mark.parametrize(("p_lost", "p_won", "n"), [(0.05, 0.02, 200), (0.01, 0.01, 500), (0.15, 0.05, 60)])
def test_coverage_of_paired_differences(p_lost: float, p_won: float, n: int) -> None:
    rng = np.random.default_rng(3)
    inside, rounds = 0, 1500
    for _ in range(rounds):
        kind = rng.choice(3, size=n, p=[p_lost, p_won, 1 - p_lost - p_won])
        old, new = (kind != 1).astype(float), (kind != 0).astype(float)
        low, high = difference_interval(new, old)
        inside += low <= p_won - p_lost <= high
    assert 0.93 <= inside / rounds <= 0.985


def test_coverage_of_a_mean() -> None:
    rng = np.random.default_rng(4)
    inside = 0
    for _ in range(1500):
        low, high = mean_interval((rng.random(120) < 0.9).astype(float))
        inside += low <= 0.9 <= high
    assert 0.93 <= inside / 1500 <= 0.98


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
