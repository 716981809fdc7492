"""Ratios from rounds: worked by hand, against scipy's signed-rank test, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mmcompress.measure.ratios import _rank, hodges_lehmann, ratio
from mmcompress.report.schema_speed import Ratio, speed_verdict_of


def test_by_hand() -> None:
    """Of 0, 1, 5 the means of pairs are 0, 0.5, 1, 2.5, 3, 5: their median is 1.75, and too few for less than all of them."""
    assert hodges_lehmann(np.asarray([0.0, 1.0, 5.0])) == (1.75, 0.0, 5.0)


def test_a_ratio_by_hand() -> None:
    """Every round is twice as slow whatever the machine does meanwhile, but for one that something disturbed."""
    below = [[1.0, 1.1, 9.0], [3.0, 3.0, 3.0], [2.0, 2.0, 2.2]] * 7
    above = [[2 * t for t in calls] for calls in below]
    above[4] = [60.0, 60.0, 60.0]
    found = ratio(above, below)
    assert (found.ratio, found.low, found.high, found.rounds) == (pytest.approx(2), pytest.approx(2), pytest.approx(2), 21)


@pytest.mark.parametrize("n", [6, 9, 20, 50])
def test_ranks_are_those_of_scipys_signed_rank_test(n: int) -> None:
    """W below the rank rejects at 5% two-sided, W at the rank does not: W is the sum of the ranks of the negative values."""

    def p(negative: int) -> float:
        signs = np.ones(n)
        for rank in range(n, 0, -1):
            if negative >= rank:
                signs[rank - 1], negative = -1, negative - rank
        return float(stats.wilcoxon(np.arange(1, n + 1) * signs, method="exact").pvalue)

    k = _rank(n)
    assert p(k - 1) <= 0.05 < p(k)


def test_the_interval_holds_the_truth_in_95_of_100() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        _, low, high = hodges_lehmann(rng.standard_t(3, 20))
        held += low <= 0 <= high
    assert 0.93 < held / 2000 < 0.97


def test_many_rounds_are_put_together() -> None:
    rng = np.random.default_rng(0)
    calls = [[float(t)] for t in np.exp(rng.normal(0, 0.1, 1000))]
    found = ratio(calls, [[1.0]] * 1000)
    assert found.rounds == 1000
    assert found.low < 1 < found.high < 1.02


def test_rounds_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="equally many rounds; found 1 and 0"):
        ratio([[1.0]], [])


def test_a_difference_lies_outside_of_the_noise() -> None:
    noise = Ratio(ratio=0.99, low=0.96, high=1.01, rounds=30)
    assert noise.band == (0.96, pytest.approx(1 / 0.96))
    spans = {
        (1.05, 1.09): "faster",
        (1.03, 1.09): "no clear difference",
        (0.97, 1.2): "no clear difference",
        (0.8, 0.95): "slower",
    }
    for (low, high), verdict in spans.items():
        found = Ratio(ratio=math.sqrt(low * high), low=low, high=high, rounds=30)
        assert speed_verdict_of(found, noise) == verdict
    assert speed_verdict_of(Ratio(ratio=1.02, low=1.01, high=1.03, rounds=30), None) == "faster"
