"""How far a model's confidence can be believed: calibration errors, Brier score, log-likelihood, and one refitted temperature.

Confidence is the probability of the class that the model chose. Where a dual encoder's classes are prompts, probabilities are
the softmax over the classes of its scaled cosines. For models with a sigmoid (SigLIP) that is not what they were trained for,
but it is the choice among the classes that is scored; their bias is the same for all classes and falls out.

Shapes: N examples, C classes, B bins, R resamples.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from mmcompress.report.schema_behaviour import Calibration, CalibrationNumbers, Estimate, ReliabilityBin

BINS = 15
RESAMPLES = 1_999
TEMPERATURES = (0.01, 100.0)
"""Between these a temperature is looked for."""
FEWEST_TO_FIT = 40
"""With fewer examples half of them say too little of a temperature."""


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


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[ReliabilityBin]:
    """The bars of a reliability diagram, with bins of equal width."""
    number = equal_width(confidence, bins)
    found = []
    for i in range(bins):
        own = number == i
        n = int(own.sum())
        mean, hit = (float(confidence[own].mean()), float(right[own].mean())) if n else (None, None)
        found.append(ReliabilityBin(low=i / bins, high=(i + 1) / bins, n=n, confidence=mean, accuracy=hit))
    return found


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


def centred_interval(value: float, resampled: np.ndarray, floor: float = -np.inf) -> tuple[float, float]:
    """The 95% basic bootstrap interval (Davison & Hinkley 1997, section 5.2): the percentiles mirrored at the value.

    Calibration errors are biased upwards, of resamples as of the sample itself; the mirroring takes that bias out, where
    percentiles would double it. Where the value itself would lie outside, the interval is widened to hold it.
    """
    low, high = np.quantile(resampled, [0.025, 0.975])
    return max(floor, min(value, float(2 * value - high))), max(value, float(2 * value - low))


class _Model:
    """The numbers of one set of probabilities, and what a bootstrap sums of each example: columns (N, 3 + 2 B)."""

    def __init__(self, logs: np.ndarray, labels: np.ndarray) -> None:
        self.confidence, self.right = confidence_and_right(logs, labels)
        self.n = len(labels)
        gap = self.confidence - self.right
        each = [gap, brier(logs, labels), negative_log_likelihood(logs, labels)]
        self.bins = (equal_width(self.confidence), equal_mass(self.confidence))
        # The bins stay where the examples put them; only who is drawn varies.
        spread = [np.zeros((self.n, BINS)), np.zeros((self.n, BINS))]
        for columns, number in zip(spread, self.bins, strict=True):
            columns[np.arange(self.n), number] = gap
        self.columns = np.concatenate([np.stack(each, axis=1), *spread], axis=1)

    def values(self, sums: np.ndarray, n: np.ndarray) -> dict[str, np.ndarray]:
        """All numbers from sums of ``columns``, (R, 3 + 2 B), over ``n`` examples, (R,)."""
        found = {name: sums[:, i] / n for i, name in enumerate(("over_confidence", "brier", "nll"))}
        found["ece"] = np.abs(sums[:, 3 : 3 + BINS]).sum(axis=1) / n
        found["ece_adaptive"] = np.abs(sums[:, 3 + BINS :]).sum(axis=1) / n
        return found

    def own(self) -> dict[str, float]:
        """The numbers themselves."""
        all_of_them = self.values(self.columns.sum(axis=0, keepdims=True), np.array([self.n]))
        return {name: float(values[0]) for name, values in all_of_them.items()}


FLOORS = {"over_confidence": -1.0, "brier": 0.0, "nll": 0.0, "ece": 0.0, "ece_adaptive": 0.0}


def calibration(
    logits: np.ndarray, labels: np.ndarray, baseline: np.ndarray | None = None, clusters: np.ndarray | None = None
) -> Calibration:
    """All of it, with intervals from one bootstrap that is paired with the baseline's.

    The intervals after refitting take the two temperatures as given. The bias of the calibration error is larger the smaller the
    error: against a well calibrated baseline its change is understated.

    Args:
        logits: (N, C), with the model's own scale.
        labels: (N,), the true classes.
        baseline: (N, C), the baseline's logits on the same examples.
        clusters: (N,), which examples are drawn together.
    """
    logs = log_softmax(logits, axis=1)
    models = {"own": _Model(logs, labels)}
    temperatures: tuple[float, ...] = ()
    if len(labels) >= FEWEST_TO_FIT:
        after, temperatures = refitted(logits, labels)
        models["refitted"] = _Model(after, labels)
    if baseline is not None:
        models["baseline"] = _Model(log_softmax(baseline, axis=1), labels)
    sums, n = resampled(np.concatenate([model.columns for model in models.values()], axis=1), clusters)
    width = 3 + 2 * BINS
    drawn = {name: model.values(sums[:, i * width : (i + 1) * width], n) for i, (name, model) in enumerate(models.items())}
    own = models["own"]
    changes = {}
    if baseline is not None:
        now, before = own.own(), models["baseline"].own()
        for name in FLOORS:
            value = now[name] - before[name]
            low, high = centred_interval(value, drawn["own"][name] - drawn["baseline"][name])
            changes[name] = Estimate(value=value, low=low, high=high, n=own.n)
    return Calibration(
        n=own.n,
        classes=logits.shape[1],
        accuracy=float(own.right.mean()),
        confidence=float(own.confidence.mean()),
        as_it_is=_numbers(own, drawn["own"]),
        ece_if_calibrated=unavoidable_error(own.confidence, own.bins[0]),
        temperatures=list(temperatures),
        refitted=_numbers(models["refitted"], drawn["refitted"]) if temperatures else None,
        changes=changes,
    )


def _numbers(model: _Model, drawn: dict[str, np.ndarray]) -> CalibrationNumbers:
    found = {}
    for name, value in model.own().items():
        low, high = centred_interval(value, drawn[name], FLOORS[name])
        found[name] = Estimate(value=value, low=low, high=high, n=model.n)
    return CalibrationNumbers(**found, bins=reliability(model.confidence, model.right))


def resampled(columns: np.ndarray, clusters: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sums of columns (N, K) over 1,999 resamples of the examples or clusters, (R, K), and how many examples each holds, (R,)."""
    columns = np.concatenate([columns, np.ones((len(columns), 1))], axis=1)
    if clusters is not None:
        number = np.unique(clusters, return_inverse=True)[1].reshape(-1)
        together = np.zeros((int(number.max()) + 1, columns.shape[1]))
        np.add.at(together, number, columns)
        columns = together
    rng, n = np.random.default_rng(0), len(columns)
    at_once = max(1, 4_000_000 // n)
    found = []
    for start in range(0, RESAMPLES, at_once):
        rounds = min(at_once, RESAMPLES - start)
        drawn = rng.integers(0, n, size=(rounds, n)) + n * np.arange(rounds)[:, None]
        found.append(np.bincount(drawn.ravel(), minlength=rounds * n).reshape(rounds, n) @ columns)
    sums = np.concatenate(found)
    return sums[:, :-1], sums[:, -1]
