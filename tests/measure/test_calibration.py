from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from mmcompress.measure import calibration as c
from mmcompress.report.schema_behaviour import Estimate


def sample(n: int, classes: int, scale: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a perfectly calibrated model, times ``scale``: labels are drawn from its own probabilities."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.standard_normal((n, classes))
    labels = np.array([rng.choice(classes, p=p) for p in np.exp(log_softmax(logits, axis=1))])
    return scale * logits, labels


def test_calibration_error_by_hand() -> None:
    # Bins of a tenth: (0.9, right), (0.85, wrong) share (0.8, 0.9]; 0.35 stands alone in (0.3, 0.4].
    confidence, right = np.array([0.9, 0.85, 0.35]), np.array([1.0, 0.0, 0.0])
    assert c.equal_width(confidence, 10).tolist() == [8, 8, 3]
    # 2/3 * |0.875 - 0.5| + 1/3 * |0.35 - 0|
    assert c.calibration_error(confidence, right, c.equal_width(confidence, 10)) == pytest.approx(0.25 + 0.35 / 3)
    # Two bins of equal mass: {0.35, 0.85} and {0.9}.
    number = c.equal_mass(confidence, 2)
    assert number.tolist() == [1, 0, 0]
    assert c.calibration_error(confidence, right, number) == pytest.approx((1.2 + 0.1) / 3)


def test_the_published_example_of_torchmetrics() -> None:
    # The example in the documentation of torchmetrics' MulticlassCalibrationError, norm l1, three bins: 0.2000.
    chances = np.array([[0.25, 0.20, 0.55], [0.55, 0.05, 0.40], [0.10, 0.30, 0.60], [0.90, 0.05, 0.05]])
    confidence, right = c.confidence_and_right(np.log(chances), np.array([0, 1, 2, 0]))
    assert c.calibration_error(confidence, right, c.equal_width(confidence, 3)) == pytest.approx(0.2, abs=1e-12)


def test_against_torchmetrics() -> None:
    logits, labels = sample(500, 6, 1.7, 0)
    logs = log_softmax(logits, axis=1)
    confidence, right = c.confidence_and_right(logs, labels)
    theirs = multiclass_calibration_error(
        torch.from_numpy(np.exp(logs)), torch.from_numpy(labels), num_classes=6, n_bins=15, norm="l1"
    )
    assert c.calibration_error(confidence, right, c.equal_width(confidence)) == pytest.approx(float(theirs), abs=1e-6)


def test_brier_and_surprise_by_hand_and_against_torch() -> None:
    logs = np.log(np.array([[0.7, 0.2, 0.1]]))
    assert c.brier(logs, np.array([0]))[0] == pytest.approx(0.09 + 0.04 + 0.01)
    assert c.negative_log_likelihood(logs, np.array([1]))[0] == pytest.approx(-np.log(0.2))
    logits, labels = sample(200, 5, 1.0, 1)
    ours = c.negative_log_likelihood(log_softmax(logits, axis=1), labels)
    theirs = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), reduction="none")
    assert np.allclose(ours, theirs.numpy())
    wanted = F.mse_loss(
        torch.from_numpy(logits).softmax(1), F.one_hot(torch.from_numpy(labels), 5).double(), reduction="none"
    ).sum(1)
    assert np.allclose(c.brier(log_softmax(logits, axis=1), labels), wanted.numpy())


def test_the_temperature_is_that_of_another_optimiser() -> None:
    logits, labels = sample(800, 4, 3.0, 2)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(torch.from_numpy(logits) / log_t.exp(), torch.from_numpy(labels))
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    found = c.fit_temperature(logits, labels)
    assert found == pytest.approx(float(log_t.exp().detach()), rel=1e-3)
    assert found == pytest.approx(3.0, rel=0.2)


def test_a_temperature_is_never_fitted_on_what_it_is_scored_on(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = sample(101, 3, 2.0, 3)
    fitted: list[set[bytes]] = []
    real = c.fit_temperature

    def spy(own: np.ndarray, known: np.ndarray) -> float:
        fitted.append({row.tobytes() for row in own})
        return real(own, known)

    monkeypatch.setattr(c, "fit_temperature", spy)
    found, temperatures = c.refitted(logits, labels)
    assert fitted[0].isdisjoint(fitted[1])
    assert len(fitted[0]) + len(fitted[1]) == 101
    for row, after in zip(logits, found, strict=True):
        t = temperatures[1] if row.tobytes() in fitted[0] else temperatures[0]
        assert np.allclose(after, log_softmax(row / t))


def test_over_confidence_is_seen_and_one_temperature_mends_it() -> None:
    sure, labels = sample(1500, 5, 3.0, 4)
    found = c.calibration(sure, labels, baseline=sure / 3)
    assert found.as_it_is.over_confidence.low is not None
    assert found.as_it_is.over_confidence.low > 0.1
    assert found.changes["ece"].low is not None
    assert found.changes["ece"].low > 0.1
    assert found.refitted is not None
    assert found.refitted.ece.value < 0.03
    assert found.temperatures == pytest.approx([3.0, 3.0], rel=0.15)
    assert sum(b.n for b in found.as_it_is.bins) == 1500
    assert found.confidence - found.accuracy == pytest.approx(found.as_it_is.over_confidence.value)


def test_a_calibrated_model_shows_no_more_error_than_is_unavoidable() -> None:
    logits, labels = sample(2000, 5, 1.0, 5)
    found = c.calibration(logits, labels)
    assert found.as_it_is.ece.value == pytest.approx(found.ece_if_calibrated, abs=0.008)
    assert found.as_it_is.over_confidence.low is not None
    assert found.as_it_is.over_confidence.high is not None
    assert found.as_it_is.over_confidence.low < 0 < found.as_it_is.over_confidence.high


def test_intervals_cover_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 60 draws from a model whose truth is known; the change of the ECE is understated, but never claims too much."""
    monkeypatch.setattr(c, "RESAMPLES", 299)
    large, known = sample(50_000, 4, 1.8, 100)
    truth = {}
    for name, logits in (("new", large), ("old", large / 1.8)):
        confidence, right = c.confidence_and_right(log_softmax(logits, axis=1), known)
        truth[name] = float((confidence - right).mean()), c.calibration_error(confidence, right, c.equal_width(confidence))
    assert truth["old"][1] < 0.01  # without scale the model is calibrated
    sure, own_error, not_too_much = 0, 0, 0
    for seed in range(60):
        logits, labels = sample(400, 4, 1.8, 200 + seed)
        found = c.calibration(logits, labels, baseline=logits / 1.8)
        sure += _holds(found.changes["over_confidence"], truth["new"][0] - truth["old"][0])
        own_error += _holds(found.as_it_is.ece, truth["new"][1])
        low = found.changes["ece"].low
        assert low is not None
        not_too_much += low <= truth["new"][1]
    assert sure >= 52
    assert own_error >= 50
    assert not_too_much >= 57


def _holds(e: Estimate, value: float) -> bool:
    assert e.low is not None
    assert e.high is not None
    return e.low <= value <= e.high


def test_few_examples_get_no_temperature() -> None:
    logits, labels = sample(30, 3, 1.0, 6)
    assert c.calibration(logits, labels).refitted is None


def test_clusters_are_drawn_whole() -> None:
    logits, labels = sample(150, 3, 1.0, 7)
    twice = np.repeat(np.arange(150), 4)
    wide = c.calibration(logits[twice], labels[twice], clusters=twice).as_it_is.nll
    narrow = c.calibration(logits[twice], labels[twice]).as_it_is.nll
    alone = c.calibration(logits, labels).as_it_is.nll
    width = [e.high - e.low for e in (wide, narrow, alone) if e.high is not None and e.low is not None]
    assert width[0] == pytest.approx(width[2], rel=0.1)
    assert width[1] < 0.6 * width[0]
