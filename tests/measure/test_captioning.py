"""CIDEr-D, BLEU-4 and exact match of captions: worked by hand, and against independent implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from mmcompress.measure.captioning import bleu_of_sums, bleu_statistics, cider, exact_match, words
from mmcompress.measure.quality import qualities
from mmcompress.tasks.base import CorpusMetric, Scores

VOCABULARY = ["a", "red", "green", "square", "dog", "on", "the", "mat", "runs", "with", "ball"]


def made_up(count: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Captions that share words and word groups with their references, and some that are short, long or empty."""
    rng = np.random.default_rng(seed)
    references = [
        [" ".join(rng.choice(VOCABULARY, size=rng.integers(3, 12))) for _ in range(rng.integers(1, 6))] for _ in range(count)
    ]
    answers = []
    for i, texts in enumerate(references):
        copied = texts[0].split()
        if rng.random() < 0.6:
            copied[rng.integers(len(copied))] = str(rng.choice(VOCABULARY))
        if rng.random() < 0.3:
            copied += list(rng.choice(VOCABULARY, size=3))
        answers.append("" if i == 3 else "dog" if i == 4 else " ".join(copied))
    return answers, references


def test_words_are_those_of_the_coco_evaluation() -> None:
    assert words("A Dog's ball: don't \u2014 wait...") == ["a", "dog", "'s", "ball", "do", "n't", "wait"]
    assert words("1,000 t-shirts, 3 men!") == ["1,000", "t-shirts", "3", "men"]
    assert words("They\u2019re (two) cats.") == ["they", "'re", "two", "cats"]
    assert words(" ?! ") == []


def test_exact_match_is_about_words() -> None:
    found = exact_match(["A red square.", "a red  Square", "red square", ""], [["a red square"]] * 4)
    assert found.tolist() == [1, 1, 0, 0]
    assert exact_match(["b"], [["a", "b"]]).tolist() == [1]


def test_cider_by_hand() -> None:
    """Two pictures: "a red" for "a red", and "a" for "a blue".

    "a" is in the references of both: weight log 2 - log 2 = 0. "red", "blue", "a red" and "a blue" are in one: log 2 = L.
    First picture, n = 1: answer and reference are (0, L), cosine 1. n = 2: cosine 1. n = 3, 4: no n-grams, 0. No difference
    of lengths. (1 + 1) / 4 * 10 = 5. Second picture: the answer's vector for n = 1 is (0), n = 2 none: 0.
    """
    assert cider(["a red", "a"], [["a red"], ["a blue"]]).tolist() == [5, 0]


def test_cider_clips_and_punishes_lengths_by_hand() -> None:
    """Answer "red red", reference "red"; the other picture has "b".

    n = 1: the answer's weight is 2L, clipped at the reference's L: L * L / (2L * L) = 1/2. n = 2: the reference has none: 0.
    One word pair against none: d = 1, exp(-1 / 72). Score 10 * 0.5 / 4 * exp(-1 / 72).
    """
    assert cider(["red red", "b"], [["red"], ["b"]])[0] == pytest.approx(1.25 * math.exp(-1 / 72))
    two = cider(["red red", "b"], [["red", "green"], ["b"]])[0]
    assert two == pytest.approx(0.625 * math.exp(-1 / 72)), "the mean over two references, of which the second shares nothing"


def test_cider_is_the_published_code_s() -> None:
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer", reason="pycocoevalcap is not installed")
    answers, references = made_up(60)
    theirs = scorer.CiderScorer(n=4, sigma=6.0)
    for answer, texts in zip(answers, references, strict=True):
        theirs += (answer, texts)
    mean, each = theirs.compute_score()
    ours = cider(answers, references)
    np.testing.assert_allclose(ours, each, rtol=1e-9, atol=1e-12)
    assert ours.mean() == pytest.approx(mean)
    assert mean > 0.5


def test_cider_of_one_example_is_zero_as_its_words_are_everywhere() -> None:
    assert cider(["a red square"], [["a red square"]]).tolist() == [0]


def test_bleu_by_hand() -> None:
    """ "a b c d e" for "a b c d f g": 4 of 5 words, 3 of 4 pairs, 2 of 3, 1 of 2, and exp(1 - 6/5) for being short."""
    counts = bleu_statistics(["a b c d e"], [["a b c d f g"]])
    assert counts.tolist() == [[4, 3, 2, 1, 5, 4, 3, 2, 5, 6]]
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 6 / 5)
    assert bleu_of_sums(counts)[0] == pytest.approx(expected)


def test_bleu_is_sacrebleu_s_corpus_bleu() -> None:
    answers, references = made_up(60, seed=1)
    most = max(map(len, references))
    streams = [[texts[k] if k < len(texts) else None for texts in references] for k in range(most)]
    stock = BLEU(tokenize="none", smooth_method="none").corpus_score(answers, streams).score / 100  # type: ignore[arg-type]
    found = bleu_of_sums(bleu_statistics(answers, references).sum(axis=0, keepdims=True))[0]
    assert found == pytest.approx(stock, rel=1e-9)
    assert 0.2 < found < 0.95
    # in the report, with an interval around it
    quality = qualities(Scores({}, corpus={"bleu4": CorpusMetric(bleu_statistics(answers, references), bleu_of_sums)}))["bleu4"]
    assert quality.value == pytest.approx(stock)
    assert 0 < quality.low < quality.value < quality.high <= 1


def test_bleu_without_four_right_words_in_a_row_is_zero() -> None:
    counts = bleu_statistics(["", "a b c", "a b c d"], [["a"], ["a b c"], ["a b c d", "x"]])
    assert bleu_of_sums(counts).tolist() == [0, 0, 1]
    assert bleu_of_sums(np.zeros((2, 10))).tolist() == [0, 0]
