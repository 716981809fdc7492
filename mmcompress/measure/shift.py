"""Whether confidence tells the task's own examples from those of another data set: AUROC and FPR95 with intervals.

Shapes: N own examples, K of the other data set, M candidate texts, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from mmcompress.data.examples import Examples
from mmcompress.measure.paired_drops import Sample
from mmcompress.processor import Processor
from mmcompress.progress import Reporter
from mmcompress.report.schema_robustness import Estimate, Shift
from mmcompress.runtimes.base import Predict
from mmcompress.tasks._embed import embed_media, unit_mean_texts

RESAMPLES = 1_999
PASSING = 0.95


def confidences(
    predict: Predict, processor: Processor, examples: Examples, texts: list[list[str]], scale: float | None, reporter: Reporter
) -> tuple[np.ndarray, np.ndarray]:
    """Which examples decode, and how sure a model is of each of them, (N,) both.

    Args:
        texts: the M candidates.
        scale: the model's factor on cosine similarities, for the largest softmax probability (Hendrycks and Gimpel 2017, arXiv
            1610.02136); None for the largest similarity, for models and tasks whose candidates do not exclude each other.
    """
    anchors = unit_mean_texts(predict, processor, texts)
    kept, media = embed_media(predict, processor, examples, reporter)
    similarity = media @ anchors.T
    if scale is None:
        return kept, np.asarray(similarity.max(axis=1))
    logits = scale * (similarity - similarity.max(axis=1, keepdims=True))
    return kept, np.asarray(1 / np.exp(logits).sum(axis=1))


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """How often one of the first (N,) is larger than one of the second (K,); ties count half (Mann and Whitney 1947)."""
    ranks = stats.rankdata(np.concatenate([inside, outside]))
    n, k = len(inside), len(outside)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * k))


def fpr95(inside: np.ndarray, outside: np.ndarray) -> float:
    """The share of the second (K,) at or above the highest threshold that at least 95% of the first (N,) are at or above."""
    threshold = np.sort(inside)[len(inside) - int(np.ceil(PASSING * len(inside) - 1e-9))]
    return float(np.mean(outside >= threshold))


def compared(
    inside: tuple[np.ndarray, np.ndarray],
    outside: tuple[np.ndarray, np.ndarray],
    data: str,
    softmax: bool,
    seed: int = 0,
) -> Shift:
    """Both measures for the baseline and the compressed model, and their paired differences.

    Args:
        inside: for each model the confidences of the task's own examples, (N,); the same examples for both.
        outside: those of the other data set, (K,).
    """
    rng = np.random.default_rng(seed)
    n, k = len(inside[0]), len(outside[0])
    draws = [(rng.integers(0, n, n), rng.integers(0, k, k)) for _ in range(RESAMPLES)]

    def both(measure: Callable[[np.ndarray, np.ndarray], float]) -> dict[str, Estimate]:
        one, two = (
            Sample(measure(own, other), np.array([measure(own[i], other[j]) for i, j in draws]))
            for own, other in zip(inside, outside, strict=True)
        )
        found = {"baseline": one, "final": two, "difference": two - one}
        return {name: sample.estimate(min(n, k)) for name, sample in found.items()}

    return Shift.model_validate(
        {
            "data": data,
            "score": "softmax" if softmax else "similarity",
            "n_inside": n,
            "n_outside": k,
            "auroc": both(auroc),
            "fpr95": both(fpr95),
        }
    )
