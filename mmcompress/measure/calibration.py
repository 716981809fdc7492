"""How far a model's confidence can be believed: calibration errors, Brier score, log-likelihood, and one refitted temperature.

Confidence is the probability of the class that the model chose. Where a dual encoder's classes are prompts, probabilities are
the softmax over the classes of its scaled cosines. For models with a sigmoid (SigLIP) that is not what they were trained for,
but it is the choice among the classes that is scored; their bias is the same for all classes and falls out.

Shapes: N examples, C classes, B bins, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

BINS = 15
RESAMPLES = 1_999
TEMPERATURES = (0.01, 100.0)
"""Between these a temperature is looked for."""
FEWEST_TO_FIT = 40
"""With fewer examples half of them say too little of a temperature."""


@dataclass(frozen=True, eq=False)
class Bin:
    """One bar of a reliability diagram: the mean confidence and accuracy of the ``n`` examples in it, NaN where it is empty."""

    low: float
    high: float
    confidence: float
    accuracy: float
    n: int


def confidence_and_right(log_probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probability of the chosen class and whether it is the true one, (N,) each.

    Args:
        log_probabilities: (N, C).
        labels: (N,).
    """
    chosen = log_probabilities.argmax(axis=1)
    confidence: np.ndarray = np.exp(log_probabilities[np.arange(len(chosen)), chosen])
    return np.minimum(confidence, 1.0), (chosen == labels).astype(np.float64)


def equal_width(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The number of each confidence's bin, (N,), of bins of equal width that are closed above: (0, 1/15], (1/15, 2/15], ..."""
    return np.clip(np.ceil(confidence * bins - 1e-12).astype(np.int64) - 1, 0, bins - 1)


def equal_mass(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The number of each confidence's bin, (N,), of bins with as many examples each, as near as whole numbers allow."""
    n = len(confidence)
    number = np.empty(n, dtype=np.int64)
    number[np.argsort(confidence, kind="stable")] = np.arange(n) * min(bins, n) // n
    return number


def calibration_error(confidence: np.ndarray, right: np.ndarray, number: np.ndarray) -> float:
    """The expected calibration error (Naeini et al. 2015; Guo et al. 2017, equation 3): over bins, weighted by how many lie in
    them, the distance of mean confidence and accuracy. With bins of equal mass it is the adaptive one (Nguyen & O'Connor 2015).

    Args:
        number: (N,), the bin of each example.
    """
    gaps = np.bincount(number, weights=confidence - right)
    return float(np.abs(gaps).sum() / len(confidence))


def brier(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each example's squared distance between the probabilities of all classes and the truth, 0 to 2 (Brier 1950): (N,)."""
    wanted = np.zeros_like(log_probabilities)
    wanted[np.arange(len(labels)), labels] = 1.0
    found: np.ndarray = np.square(np.exp(log_probabilities) - wanted).sum(axis=1)
    return found


def negative_log_likelihood(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each example's surprise at the truth, in nats: (N,)."""
    found: np.ndarray = -log_probabilities[np.arange(len(labels)), labels]
    return found


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[Bin]:
    """The bars of a reliability diagram, with bins of equal width."""
    number = equal_width(confidence, bins)
    n = np.bincount(number, minlength=bins)
    some = np.maximum(n, 1)
    mean = np.where(n > 0, np.bincount(number, weights=confidence, minlength=bins) / some, np.nan)
    hit = np.where(n > 0, np.bincount(number, weights=right, minlength=bins) / some, np.nan)
    return [Bin(i / bins, (i + 1) / bins, float(mean[i]), float(hit[i]), int(n[i])) for i in range(bins)]


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T that makes ``softmax(logits / T)`` most likely (Guo et al. 2017, section 4.2).

    Args:
        logits: (N, C), with the model's own scale.
    """

    def surprise(log_t: float) -> float:
        return float(negative_log_likelihood(log_softmax(logits / np.exp(log_t), axis=1), labels).mean())

    # In 1 / T the negative log-likelihood is convex, so that there is one minimum, in log T too.
    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(surprise, bounds=(low, high), method="bounded", options={"xatol": 1e-5}).x))


def refitted(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Log-probabilities after refitting one temperature, (N, C), and the two temperatures.

    Cross-fitted: the examples are halved by a fixed seed, and each half is given the temperature that was fitted on the other,
    so that no example is scored by what it was fitted on.
    """
    order = np.random.default_rng(0).permutation(len(logits))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    found = np.empty_like(logits)
    fitted = []
    for own, other in (halves, halves[::-1]):
        t = fit_temperature(logits[other], labels[other])
        found[own] = log_softmax(logits[own] / t, axis=1)
        fitted.append(t)
    return found, (fitted[0], fitted[1])


def unavoidable_error(confidence: np.ndarray, number: np.ndarray, rounds: int = 400) -> float:
    """The calibration error that a perfectly calibrated model would show on as many examples with these confidences, on average.

    Found by drawing whether it is right from its confidence (the consistency resampling of Bröcker & Smith 2007). The error
    is biased upwards by about this much where the model is well calibrated, and by less where it is not.
    """
    rng = np.random.default_rng(0)
    found = [
        calibration_error(confidence, (rng.random(len(confidence)) < confidence).astype(np.float64), number)
        for _ in range(rounds)
    ]
    return float(np.mean(found))


def bin_gaps(confidence: np.ndarray, right: np.ndarray, number: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Confidence less correctness in the column of each example's bin, (N, B): what a bootstrap of the error sums up."""
    found = np.zeros((len(confidence), bins))
    found[np.arange(len(confidence)), number] = confidence - right
    return found


def error_of_sums(sums: np.ndarray, n: int) -> np.ndarray:
    """The calibration error from sums of ``bin_gaps`` over resamples of ``n`` examples: (R, B) to (R,)."""
    found: np.ndarray = np.abs(sums).sum(axis=1) / n
    return found


def centred_interval(value: float, resampled: np.ndarray, floor: float = -np.inf) -> tuple[float, float]:
    """The 95% basic bootstrap interval (Davison & Hinkley 1997, section 5.2): the percentiles mirrored at the value.

    Calibration errors are biased upwards, of resamples as of the sample itself; the mirroring takes that bias out, where
    percentiles would double it.
    """
    low, high = np.quantile(resampled, [0.025, 0.975])
    return max(floor, float(2 * value - high)), max(floor, float(2 * value - low))
