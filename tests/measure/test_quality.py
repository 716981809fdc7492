"""Scores to numbers: weights, corpus metrics, both directions, and what is written to disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmcompress.measure.quality import changes, load_scores, qualities, save_scores
from mmcompress.tasks.base import CorpusMetric, Scores

WORDS = np.array([4.0, 1.0, 5.0])


def precision_times_recall(sums: np.ndarray) -> np.ndarray:
    """Columns: hits, predicted, wanted."""
    found: np.ndarray = sums[:, 0] / sums[:, 1] * (sums[:, 0] / sums[:, 2])
    return found


def transcripts(errors: list[float], **more: object) -> Scores:
    return Scores({"wer": np.array(errors) / WORDS}, weights={"wer": WORDS}, **more)  # type: ignore[arg-type]


def test_error_rate_is_errors_over_words() -> None:
    # 2 + 1 + 1 errors in 10 words; the mean of the three rates would be (0.5 + 1 + 0.2) / 3.
    found = qualities(transcripts([2, 1, 1]))["wer"]
    assert found.value == pytest.approx(0.4)
    assert found.n == 3
    assert found.low <= 0.4 <= found.high


def test_fewer_errors_are_better_only_where_lower_is_better() -> None:
    old, new = transcripts([2, 1, 1]), transcripts([0, 0, 2])
    mistakes = changes(new, old, {"wer"})["wer"]
    assert mistakes.difference == pytest.approx(-0.2)
    assert (mistakes.won, mistakes.lost) == (2, 1)
    points = changes(new, old)["wer"]
    assert (points.difference, points.low, points.high) == (mistakes.difference, mistakes.low, mistakes.high)
    assert (points.won, points.lost) == (1, 2)


def test_verdicts_in_both_directions() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(3, 9, 400).astype(float)
    few, many = rng.binomial(2, 0.1, 400) / words, rng.binomial(3, 0.5, 400) / words
    good, bad = (Scores({"wer": errors}, weights={"wer": words}) for errors in (few, many))
    assert changes(bad, good, {"wer"})["wer"].verdict == "worse"
    assert changes(good, bad, {"wer"})["wer"].verdict == "better"
    assert changes(bad, good)["wer"].verdict == "better"
    assert changes(good, good, {"wer"})["wer"].verdict == "identical"


def test_equal_scores_with_other_answers_are_not_identical() -> None:
    old, new = transcripts([1, 0, 0], answers=np.array([1, 2, 3])), transcripts([1, 0, 0], answers=np.array([9, 2, 3]))
    assert changes(new, old, {"wer"})["wer"].verdict == "no clear difference"


def corpus(rows: list[list[float]]) -> Scores:
    return Scores({}, corpus={"pr": CorpusMetric(np.array(rows), precision_times_recall)})


def test_corpus_metric_by_hand() -> None:
    # Sums: 5 hits of 8 predicted and 10 wanted: 5/8 * 5/10 = 0.3125; the mean over the examples would be another number.
    scores = corpus([[2, 4, 4], [3, 3, 3], [0, 1, 3]])
    assert qualities(scores)["pr"].value == pytest.approx(0.3125)
    # Against 6 of 9 and 10: 0.4. The first example alone goes from 1/4 to 9/20, the others stay.
    change = changes(corpus([[3, 5, 4], [3, 3, 3], [0, 1, 3]]), scores)["pr"]
    assert change.difference == pytest.approx(0.4 - 0.3125)
    assert (change.won, change.lost, change.n) == (1, 0, 3)
    assert changes(scores, scores)["pr"].verdict == "identical"


def test_clusters_reach_the_intervals() -> None:
    rng = np.random.default_rng(1)
    speakers = np.repeat(np.arange(25), 8)
    errors = np.repeat(rng.random(25) < 0.4, 8).astype(float) * 3
    words = rng.integers(4, 12, 200).astype(float)
    alone, together = (Scores({"wer": errors / words}, c, weights={"wer": words}) for c in (None, speakers))
    wide, narrow = qualities(together)["wer"], qualities(alone)["wer"]
    assert wide.high - wide.low > 1.7 * (narrow.high - narrow.low)
    better = Scores({"wer": np.zeros(200)}, weights={"wer": words})
    a, b = changes(together, better)["wer"], changes(alone, better)["wer"]
    assert a.high - a.low > 1.7 * (b.high - b.low)


def test_examples_that_do_not_match_are_not_compared() -> None:
    three = transcripts([0, 1, 0], kept=np.array([0, 1, 2]))
    assert changes(three, transcripts([0, 1, 0], kept=np.array([0, 1, 3]))) == {}
    assert changes(three, Scores({"wer": np.zeros(2)})) == {}
    assert changes(corpus([[1, 1, 1]]), corpus([[1, 1, 1], [1, 1, 1]])) == {}


def test_a_run_that_goes_on_compares_with_what_it_wrote(tmp_path: Path) -> None:
    old = Scores(
        {"wer": np.array([0.5, 1.0, 0.2])},
        clusters=np.array(["anna", "ben", "anna"]),
        answers=np.array([7, 8, 9]),
        kept=np.array([0, 2, 3]),
        weights={"wer": WORDS},
        corpus=corpus([[2, 4, 4], [3, 3, 3], [0, 1, 3]]).corpus,
    )
    new = Scores(
        {"wer": np.array([0.25, 1.0, 0.2])},
        clusters=old.clusters,
        answers=np.array([5, 8, 9]),
        kept=old.kept,
        weights=old.weights,
        corpus=corpus([[3, 5, 4], [3, 3, 3], [0, 1, 3]]).corpus,
    )
    save_scores(old, tmp_path / "scores.safetensors")
    read = load_scores(tmp_path / "scores.safetensors")
    assert changes(new, read, {"wer"}) == changes(new, old, {"wer"})
    assert set(changes(new, read)) == {"wer", "pr"}
    assert read.clusters is not None
    assert read.clusters.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="pr: these scores were read from a file"):
        qualities(read)
