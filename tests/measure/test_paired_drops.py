"""Drops of two models under conditions: by hand, against scipy's bootstrap, and their verdicts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mmcompress.measure.paired_drops import Drops, Sample, Scored, holm, judged
from mmcompress.measure.statistics import difference_interval
from mmcompress.report.schema_robustness import Condition, Degree, Estimate


def scored(*values: float, kept: list[int] | None = None) -> Scored:
    return Scored(np.array(values, dtype=np.float64), np.array(kept if kept is not None else range(len(values))))


def by_hand() -> Drops:
    # Of 4 examples the baseline loses 1 in fog and 2 in rain, the compressed model 2 and 4.
    return Drops(
        {
            (0, "clean"): scored(1, 1, 1, 0),
            (1, "clean"): scored(1, 1, 1, 1),
            (0, "fog"): scored(1, 1, 0, 0),
            (1, "fog"): scored(1, 1, 0, 0),
            (0, "rain"): scored(1, 0, 0, 0),
            (1, "rain"): scored(0, 0, 0, 0),
        },
        "clean",
        lower_is_better=False,
    )


def test_drops_by_hand() -> None:
    drops = by_hand()
    assert drops.metric(0, "clean").value == 0.75
    assert drops.drop(0, "fog").value == 0.25
    assert drops.drop(1, "fog").value == 0.5
    assert drops.extra("fog").value == 0.25
    assert drops.extra("rain").value == 0.5
    assert drops.mean_extra(["fog", "rain"]).value == pytest.approx(0.375)


def test_corruption_errors_by_hand() -> None:
    drops = by_hand()
    # Errors: the baseline's 0.5 and 0.75, the compressed model's 0.5 and 1.
    ratio = drops.error_ratio(["fog", "rain"])
    assert ratio is not None
    assert ratio.value == pytest.approx(1.5 / 1.25)
    # The baseline's drops, 0.25 and 0.5 over 4 examples, are not clearly above nothing: no ratio is taken to them.
    assert drops.drop_ratio(["fog"]) is None
    many = Drops(
        {key: Scored(np.tile(one.values, 50), np.arange(200)) for key, one in _plain().items()}, "clean", lower_is_better=False
    )
    ratio = many.drop_ratio(["fog", "rain"])
    assert ratio is not None
    assert ratio.value == pytest.approx(1.5 / 0.75)


def _plain() -> dict[tuple[int, str], Scored]:
    return {
        (0, "clean"): scored(1, 1, 1, 0),
        (1, "clean"): scored(1, 1, 1, 1),
        (0, "fog"): scored(1, 1, 0, 0),
        (1, "fog"): scored(1, 1, 0, 0),
        (0, "rain"): scored(1, 0, 0, 0),
        (1, "rain"): scored(0, 0, 0, 0),
    }


def test_a_rise_of_an_error_rate_is_a_drop_and_weights_count() -> None:
    def wer(*values: float) -> Scored:
        return Scored(np.array(values), np.arange(2), weights=np.array([1.0, 3.0]))

    drops = Drops(
        {(0, "clean"): wer(0, 0), (1, "clean"): wer(0, 0), (0, "noise"): wer(1, 0), (1, "noise"): wer(0, 1)},
        "clean",
        lower_is_better=True,
    )
    assert drops.drop(0, "noise").value == 0.25
    assert drops.drop(1, "noise").value == 0.75
    assert drops.errors(1, ["noise"]).value == 0.75


def test_the_interval_of_a_difference_of_differences_is_scipys() -> None:
    rng = np.random.default_rng(5)
    n = 300
    four = {
        key: rng.random(n) ** power for key, power in zip([(0, "c"), (1, "c"), (0, "x"), (1, "x")], (1, 2, 3, 4), strict=True)
    }
    drops = Drops({key: Scored(v, np.arange(n)) for key, v in four.items()}, "c", lower_is_better=False)
    found = drops.extra("x").estimate(n)
    extra = (four[1, "c"] - four[1, "x"]) - (four[0, "c"] - four[0, "x"])
    theirs = stats.bootstrap((extra,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(1))
    assert found.value == pytest.approx(extra.mean())
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.04 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.04 * width)


def test_the_p_value_is_that_of_a_t_test_for_many_examples() -> None:
    rng = np.random.default_rng(3)
    n = 500
    base, own = rng.normal(0, 1, n), rng.normal(0.1, 1, n)
    zero = np.zeros(n)
    drops = Drops(
        {(0, "c"): Scored(zero, np.arange(n)), (1, "c"): Scored(zero, np.arange(n)), (0, "x"): Scored(-base, np.arange(n)),
         (1, "x"): Scored(-own, np.arange(n))}, "c", lower_is_better=False,
    )  # fmt: skip
    assert drops.extra("x").p() == pytest.approx(stats.ttest_rel(own, base).pvalue, abs=0.02)


def test_only_examples_that_all_could_score_count() -> None:
    cells = _plain()
    cells[1, "rain"] = scored(0, 0, 0, kept=[0, 1, 3])
    drops = Drops(cells, "clean", lower_is_better=False)
    assert drops.n == 3
    assert drops.metric(0, "fog").value == pytest.approx(2 / 3)
    cells[1, "rain"] = scored(1.0, kept=[9])
    with pytest.raises(ValueError, match="no example was scored under all conditions"):
        Drops(cells, "clean", lower_is_better=False)
    del cells[1, "rain"]
    with pytest.raises(ValueError, match="both models are needed under every condition; one lacks rain"):
        Drops(cells, "clean", lower_is_better=False)


def test_no_difference_among_few_examples_is_not_certain() -> None:
    same = {(who, name): scored(*[1.0] * 20) for who in (0, 1) for name in ("clean", "fog")}
    found = Drops(same, "clean", lower_is_better=False).extra("fog")
    none = np.zeros(20)
    assert found.p() == 1
    assert (found.estimate(20).low, found.estimate(20).high) == difference_interval(none, none)
    assert found.estimate(20).high > 0.05


def test_holm_by_hand() -> None:
    # 3 x 0.01, then 2 x 0.03, then at least as much as before.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_verdicts_are_of_adjusted_p_values() -> None:
    estimate = Estimate(value=0, low=0, high=0)
    degree = Degree(severity=1, baseline=estimate, final=estimate, baseline_drop=estimate, final_drop=estimate, extra=estimate)

    def condition(extra: float, p: float) -> Condition:
        found = Estimate(value=extra, low=extra, high=extra)
        return Condition(
            name="x",
            group="media",
            description="",
            degrees=[degree],
            extra=found,
            p=p,
            p_adjusted=1,
            verdict="no clear difference",
        )

    # 0.03 alone would be clear; beside a clear and an unclear one, twice 0.03 is not.
    found = judged([condition(0.1, 0.01), condition(-0.1, 0.001), condition(0.1, 0.03), condition(0.1, 0.4)])
    assert [c.verdict for c in found] == ["loses more", "loses less", "no clear difference", "no clear difference"]
    assert [c.p_adjusted for c in found] == pytest.approx([0.03, 0.004, 0.06, 0.4])


def test_samples_that_cannot_be_divided_stay_out_of_the_interval() -> None:
    ratio = Sample(1.0, np.array([1.0, 1.0, 1.0])) / Sample(2.0, np.array([2.0, 0.0, 4.0]))
    assert ratio.value == 0.5
    assert ratio.estimate(3).high <= 0.5


@pytest.mark.slow
def test_the_interval_of_an_extra_drop_holds_the_truth_as_often_as_it_says() -> None:
    def answers(rng: np.random.Generator, hard: np.ndarray, right: float) -> Scored:
        # Hard examples are hard for both models under all conditions: the sum of two uniform draws has this quantile.
        values = hard + rng.random(len(hard))
        limit = np.sqrt(2 * right) if right < 0.5 else 2 - np.sqrt(2 * (1 - right))
        return Scored((values < limit).astype(np.float64), np.arange(len(hard)))

    held, rounds = 0, 300
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        hard = rng.random(150)
        shares = {(0, "c"): 0.9, (1, "c"): 0.85, (0, "x"): 0.7, (1, "x"): 0.55}
        found = Drops({key: answers(rng, hard, share) for key, share in shares.items()}, "c", lower_is_better=False)
        interval = found.extra("x").estimate(150)
        held += interval.low <= (0.85 - 0.55) - (0.9 - 0.7) <= interval.high
    # Three standard errors of 95% over 300 rounds.
    assert 0.91 <= held / rounds <= 0.985
