"""Scores of captions against references: CIDEr-D, corpus BLEU-4 and exact match.

CIDEr-D and exact match are means over the examples; BLEU is a function of counts that are summed over the examples first.

Shapes: N examples, each with one answer and one or more references.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics.bleu import BLEU

ORDERS = 4
"""n-grams of 1 to 4 words count."""
SIGMA = 6.0
"""Width of CIDEr-D's penalty on a difference of lengths, in words."""

CONTRACTIONS = re.compile(r"(n't|'(?:s|re|ve|ll|d|m))\b")
# Numbers with their separators, what a contraction left, words with their hyphens; punctuation falls away.
WORD = re.compile(r"\d+(?:[.,:]\d+)+|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:-\w+)*")

Vector = dict[tuple[str, ...], float]


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation.

    Close to the tokenizer of the COCO evaluation (Stanford's PTBTokenizer, a Java program) and its list of dropped
    punctuation: ``don't`` is ``do n't``, ``dog's`` is ``dog 's``, ``t-shirt`` and ``1,000`` stay whole.
    """
    return WORD.findall(CONTRACTIONS.sub(r" \1", text.lower().replace("\u2019", "'")))


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """1 where an answer has the same words as one of its references, else 0: (N,)."""
    pairs = zip(answers, references, strict=True)
    return np.array([float(words(answer) in [words(text) for text in texts]) for answer, texts in pairs], dtype=np.float64)


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of every answer (Vedantam et al. 2015, arXiv 1411.5726, equations 1 to 5), the formula of the COCO evaluation.

    For each n-gram length the vectors of an answer and of a reference hold each n-gram's count times its inverse document
    frequency, ``log N - log max(1, examples with the n-gram in a reference)``. Their similarity is their cosine with the
    answer's weights clipped at the reference's, times ``exp(-d^2 / (2 sigma^2))`` for a difference d of lengths. The score is
    the mean over references and n = 1..4, times 10. As in the published code (`cider_scorer.py` of coco-caption) a length is
    the number of word pairs, which is one less than the number of words.

    The weights come from the references of the examples that are scored: n-grams that all of them share count nothing,
    and with one example all scores are 0.

    Returns:
        (N,), 0 to 10; good captioners have about 1.3 on COCO, written as 130.
    """
    found = [[_counts(text) for text in texts] for texts in references]
    frequency = Counter(gram for texts in found for gram in {gram for counts in texts for gram in counts})
    rarity = {gram: math.log(len(found)) - math.log(times) for gram, times in frequency.items()}
    unseen = math.log(len(found)) if found else 0.0

    def weigh(counts: Counter[tuple[str, ...]]) -> list[Vector]:
        vectors: list[Vector] = [{} for _ in range(ORDERS)]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * rarity.get(gram, unseen)
        return vectors

    scores = []
    for answer, texts in zip(answers, found, strict=True):
        counts = _counts(answer)
        own = weigh(counts)
        total = 0.0
        for theirs in texts:
            penalty = math.exp(-((_pairs(counts) - _pairs(theirs)) ** 2) / (2 * SIGMA**2))
            total += penalty * sum(_clipped_cosine(a, b) for a, b in zip(own, weigh(theirs), strict=True))
        scores.append(10.0 * total / ORDERS / len(texts))
    return np.array(scores, dtype=np.float64)


def _counts(text: str) -> Counter[tuple[str, ...]]:
    found = words(text)
    return Counter(tuple(found[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(found) - n + 1))


def _pairs(counts: Counter[tuple[str, ...]]) -> int:
    return sum(count for gram, count in counts.items() if len(gram) == 2)


def _clipped_cosine(answer: Vector, reference: Vector) -> float:
    norm = math.sqrt(sum(w * w for w in answer.values()) * sum(w * w for w in reference.values()))
    return sum(min(w, reference.get(gram, 0.0)) * reference.get(gram, 0.0) for gram, w in answer.items()) / norm if norm else 0.0


def bleu_statistics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """What each example adds to corpus BLEU-4: (N, 10).

    Matching n-grams for n = 1..4 (clipped at the reference that has most of them), n-grams of the answer, the answer's length
    in words, and that of the reference nearest in length.
    """
    # Only the counts are used; effective_order silences advice on scores of single sentences.
    counter = BLEU(tokenize="none", smooth_method="none", effective_order=True)
    rows = []
    for answer, texts in zip(answers, references, strict=True):
        found = counter.sentence_score(" ".join(words(answer)), [" ".join(words(text)) for text in texts])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.array(rows, dtype=np.float64).reshape(len(rows), 2 * ORDERS + 2)


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """BLEU-4 (Papineni et al. 2002, section 2.3) without smoothing, from sums of statistics (R, 10): (R,), 0 to 1.

    It is 0 where no four words in a row match, also for a single short sentence.
    """
    matched, total, length, wanted = sums[:, :ORDERS], sums[:, ORDERS : 2 * ORDERS], sums[:, -2], sums[:, -1]
    some: np.ndarray = np.all(matched > 0, axis=1)
    precision = np.where(some[:, None], matched, 1) / np.where(some[:, None], total, 1)
    brevity = np.minimum(0.0, 1 - wanted / np.where(some, length, 1))
    values: np.ndarray = np.where(some, np.exp(np.log(precision).mean(axis=1) + brevity), 0.0)
    return values
