"""Verdicts in words and the number of examples that would settle them, by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mmcompress.measure.conclusion import conclusion, examples_needed, rounded
from mmcompress.measure.quality import changes
from mmcompress.measure.statistics import difference_interval, mcnemar
from mmcompress.report.schema import Change
from mmcompress.tasks.base import Scores


@pytest.mark.parametrize(
    ("difference", "low", "high", "words"),
    [
        (0.020, 0.010, 0.030, "better"),
        (-0.005, -0.009, -0.001, "worse, but by less than the margin of 1 point"),
        (-0.030, -0.040, -0.020, "worse by more than the margin of 1 point"),
        (-0.012, -0.020, -0.004, "worse"),
        (0.000, -0.008, 0.008, "no worse than the margin of 1 point"),
        # h 0.02 at 500 examples; the farther limit is 0.01 away: 500 * (2.801585 / 1.959964 * 0.02 / 0.01)^2 = 4086.4
        (0.000, -0.020, 0.020, "not enough examples to say (about 4,100 would be needed)"),
    ],
)
def test_every_verdict_by_hand(difference: float, low: float, high: float, words: str) -> None:
    assert conclusion(difference, low, high, 500, 1.0)[0] == words
    mirrored = conclusion(-difference, -high, -low, 500, 1.0, lower_is_better=True)
    assert mirrored == conclusion(difference, low, high, 500, 1.0)


def test_needed_is_counted_against_the_limit_that_is_farther() -> None:
    # -0.8 points: 0 is 0.8 away and the margin of 1 point 0.2; 500 * (2.801585 / 1.959964 * 0.02 / 0.008)^2 = 6385.1
    assert examples_needed(-0.008, -0.028, 0.012, 500, 1.0) == 6386
    assert examples_needed(0.0, -0.02, 0.02, 500, 0.0) is None
    assert conclusion(0.0, -0.02, 0.02, 500, 0.0) == ("not enough examples to say", None)
    assert conclusion(0.0, -0.1, 0.1, 5, 1.0, identical=True) == ("identical", None)
    assert (rounded(7), rounded(4217), rounded(99_001)) == ("7", "4,300", "100,000")


def test_needed_agrees_with_the_formula_for_matched_pairs() -> None:
    # Connor (Biometrics 43, 1987): n = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 / d^2 for a share psi of flips and difference d.
    n, lost, won = 2000, 50, 36
    old, new = np.ones(n), np.ones(n)
    new[:lost] = 0
    old[lost : lost + won] = 0
    low, high = difference_interval(new, old)
    psi, d = (lost + won) / n, (won - lost) / n
    z = stats.norm.ppf([0.975, 0.8])
    connor = (z[0] * psi**0.5 + z[1] * (psi - d**2) ** 0.5) ** 2 / d**2
    assert examples_needed(d, low, high, n, 0.0) == pytest.approx(connor, rel=0.03)


def test_with_that_many_examples_four_of_five_are_settled() -> None:
    rng = np.random.default_rng(0)
    # 3% lost, 3% won: at 400 examples 1 point of margin is out of reach. The interval of a typical data set says how many.
    old, new = np.ones(400), np.ones(400)
    new[:12] = 0
    old[12:24] = 0
    needed = examples_needed(0.0, *difference_interval(new, old), 400, 1.0)
    assert needed is not None
    assert needed > 4000
    settled = 0
    for _ in range(300):
        won, lost = rng.multinomial(needed, [0.03, 0.03, 0.94])[:2]
        pair = np.zeros(needed), np.zeros(needed)
        pair[0][:won] = 1
        pair[1][won : won + lost] = 1
        settled += conclusion(0, *difference_interval(*pair), needed, 1.0)[1] is None
    assert settled / 300 == pytest.approx(0.8, abs=0.07)


def test_mcnemar_against_scipy_and_a_published_table() -> None:
    # Approval of the prime minister at two surveys, Agresti, Categorical Data Analysis (2nd edition, 2002), table 10.1:
    # 794 and 570 agree, 150 and 86 changed. The difference is -0.04, its 95% interval -0.06 to -0.02.
    old = np.repeat([1.0, 1.0, 0.0, 0.0], [794, 150, 86, 570])
    new = np.repeat([1.0, 0.0, 1.0, 0.0], [794, 150, 86, 570])
    found = changes(Scores({"accuracy": new}), Scores({"accuracy": old}))["accuracy"]
    assert found.difference == pytest.approx(-0.04)
    assert (round(found.low, 2), round(found.high, 2)) == (-0.06, -0.02)
    assert found.p_value == pytest.approx(stats.binomtest(86, 236, 0.5).pvalue)
    # His z^2 is 17.36 with 1 degree of freedom; the exact value lies near it.
    assert found.p_value == pytest.approx(float(stats.chi2.sf(17.36, 1)), rel=0.35)
    assert found.conclusion == "worse by more than the margin of 1 point"
    # By hand: 1 of 6 flips; 2 * (1 + 6) / 2^6.
    assert mcnemar(1, 5) == pytest.approx(14 / 64)
    assert mcnemar(0, 0) == 1.0


def test_changes_carry_margin_and_needed() -> None:
    old, new = np.ones(50), np.ones(50)
    new[:2] = 0
    plain = changes(Scores({"a": new}), Scores({"a": old}))["a"]
    assert (plain.margin, plain.verdict) == (1.0, "no clear difference")
    assert plain.p_value == 0.5
    assert plain.needed is not None
    assert plain.needed > 50
    wide = changes(Scores({"a": new}), Scores({"a": old}), margins={"a": 15.0})["a"]
    assert (wide.margin, wide.needed, wide.words) == (15.0, None, "no worse than the margin of 15 points")
    # Shares and clustered examples have no exact test of flips.
    assert changes(Scores({"a": new / 2}), Scores({"a": old / 2}))["a"].p_value is None
    twins = np.arange(50) // 2
    assert changes(Scores({"a": new}, twins), Scores({"a": old}, twins))["a"].p_value is None


def test_reports_of_earlier_versions_are_read() -> None:
    old = {"difference": 0.0, "low": -0.1, "high": 0.1, "n": 5, "lost": 1, "won": 1, "verdict": "no clear difference"}
    assert Change.model_validate(old).words == "no clear difference"
