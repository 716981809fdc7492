"""How often the 95% intervals hold the truth: exactly where it can be counted, else by simulation.

Published guarantees are asymptotic; these are what the functions that reports use do at the sizes that people have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from mmcompress.measure.statistics import corpus_difference_interval, difference_interval, mean_interval

Draw = Callable[[np.random.Generator], tuple[tuple[float, float], float]]


@pytest.mark.parametrize("n", [200, 500, 1000])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_of_a_share_counted_exactly(p: float, n: int) -> None:
    inside = 0.0
    for hits in range(n + 1):
        weight = float(stats.binom.pmf(hits, n, p))
        if weight > 1e-7:
            low, high = mean_interval(np.repeat([1.0, 0.0], [hits, n - hits]))
            inside += weight * (low <= p <= high)
    assert 0.93 <= inside <= 0.97


@pytest.mark.parametrize(("lost", "won", "n"), [(0.05, 0.02, 200), (0.02, 0.005, 500), (0.03, 0.03, 1000)])
def test_of_a_paired_difference_counted_exactly(lost: float, won: float, n: int) -> None:
    """Correlated models: most examples are right, or wrong, in both."""
    inside = 0.0
    most = [int(stats.binom.ppf(1 - 1e-6, n, share)) for share in (won, lost)]
    for more in range(most[0] + 1):
        for less in range(most[1] + 1):
            weight = float(stats.multinomial.pmf([more, less, n - more - less], n, [won, lost, 1 - won - lost]))
            if weight > 1e-6:
                new, old = np.repeat([1.0, 0.0, 1.0], [more, less, n - more - less]), np.ones(n)
                old[:more] = 0
                low, high = difference_interval(new, old)
                inside += weight * (low <= won - lost <= high)
    assert 0.93 <= inside <= 0.97


def transcripts(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors and words: a tenth of the recordings is hopeless."""
    words = rng.integers(1, 30, n)
    return rng.binomial(words, np.where(rng.random(n) < 0.1, 0.6, 0.15)).astype(float), words.astype(float)


def error_rate(rng: np.random.Generator) -> tuple[tuple[float, float], float]:
    errors, words = transcripts(rng, 200)
    return mean_interval(errors / words, int(rng.integers(1 << 30)), weights=words), 0.1 * 0.6 + 0.9 * 0.15


def paired_error_rates(rng: np.random.Generator) -> tuple[tuple[float, float], float]:
    """The new model makes one mistake more in a tenth of the recordings; words are 15 on average."""
    old, words = transcripts(rng, 200)
    new = old + rng.binomial(1, 0.1, 200)
    return difference_interval(new / words, old / words, int(rng.integers(1 << 30)), weights=(words, words)), 0.1 / 15


def few_speakers(rng: np.random.Generator) -> tuple[tuple[float, float], float]:
    """An error rate over 40 speakers, each with a rate of its own and 3 to 14 recordings."""
    speakers = np.repeat(np.arange(40), rng.integers(3, 15, 40))
    words = rng.integers(1, 30, len(speakers))
    errors = rng.binomial(words, rng.beta(1.2, 8, 40)[speakers])
    found = mean_interval(errors / words, int(rng.integers(1 << 30)), weights=words.astype(float), clusters=speakers)
    return found, 1.2 / 9.2


def questions_about_pictures(rng: np.random.Generator) -> tuple[tuple[float, float], float]:
    """Shares right, 5 questions to each of 100 pictures, some pictures harder."""
    pictures = np.repeat(np.arange(100), 5)
    right = rng.random(500) < rng.beta(3.6, 0.4, 100)[pictures]
    return mean_interval(right.astype(float), int(rng.integers(1 << 30)), clusters=pictures), 0.9


def paired_questions(rng: np.random.Generator) -> tuple[tuple[float, float], float]:
    """The new model loses what the old one has, on some pictures more: 1/16 of 0.9 on average."""
    pictures = np.repeat(np.arange(100), 5)
    old = rng.random(500) < rng.beta(3.6, 0.4, 100)[pictures]
    new = old & (rng.random(500) >= rng.beta(1, 15, 100)[pictures])
    found = difference_interval(new.astype(float), old.astype(float), int(rng.integers(1 << 30)), clusters=pictures)
    return found, -0.9 / 16


def skewed_mean(rng: np.random.Generator) -> tuple[tuple[float, float], float]:
    return mean_interval(rng.gamma(1.0, 1.0, 200), int(rng.integers(1 << 30))), 1.0


def corpus_rates(rng: np.random.Generator) -> tuple[tuple[float, float], float]:
    """The difference of geometric means of two corpus rates, as in BLEU: of 0.6 and 0.3, and of 0.57 and 0.285."""
    old = np.stack([rng.binomial(9, 0.6, 200), rng.binomial(8, 0.3, 200)], axis=1)
    new = rng.binomial(old, 0.95)

    def value(sums: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.sqrt(sums[:, 0] / (9 * 200) * sums[:, 1] / (8 * 200))
        return found

    truth = 0.18**0.5
    found = corpus_difference_interval(new.astype(float), old.astype(float), value, int(rng.integers(1 << 30)))
    return found, 0.95 * truth - truth


SITUATIONS: list[Draw] = [
    error_rate, paired_error_rates, few_speakers, questions_about_pictures, paired_questions, skewed_mean, corpus_rates
]  # fmt: skip


def coverage(draw: Draw, rounds: int) -> float:
    inside = 0
    for seed in range(rounds):
        (low, high), truth = draw(np.random.default_rng([seed, 1]))
        inside += low <= truth <= high
    return inside / rounds


@pytest.mark.parametrize("draw", SITUATIONS)
def test_of_bootstraps(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcompress.measure.statistics.RESAMPLES", 499)
    monkeypatch.setattr("mmcompress.measure.statistics.FEWEST_RESAMPLES", 499)
    # 400 rounds: the standard error is 1.1%.
    assert 0.92 <= coverage(draw, 400) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("draw", SITUATIONS)
def test_of_bootstraps_closely(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcompress.measure.statistics.RESAMPLES", 999)
    monkeypatch.setattr("mmcompress.measure.statistics.FEWEST_RESAMPLES", 999)
    # 2,000 rounds: the standard error is 0.5%.
    assert 0.93 <= coverage(draw, 2_000) <= 0.97
