"""Scores of an evaluation to numbers with intervals, alone and against the baseline.

Shapes: N examples, K statistics of an example.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from mmcompress.measure.conclusion import MARGIN, conclusion
from mmcompress.measure.statistics import (
    Value,
    corpus_difference_interval,
    corpus_interval,
    difference_interval,
    grouped,
    mcnemar,
    mean_interval,
    ratio,
    ratio_statistics,
)
from mmcompress.report.schema import Change, ClassScore, Quality
from mmcompress.tasks._observed import from_arrays, to_arrays
from mmcompress.tasks.base import CorpusMetric, Scores


def qualities(scores: Scores) -> dict[str, Quality]:
    """Each metric with its 95% interval and n."""
    found = {}
    for metric, values in scores.per_example.items():
        weights = scores.weights.get(metric)
        low, high = mean_interval(values, weights=weights, clusters=scores.clusters_of(metric))
        found[metric] = Quality(value=_mean(values, weights), low=low, high=high, n=len(values))
    for metric, corpus in scores.corpus.items():
        value = _function(corpus, metric)
        low, high = corpus_interval(corpus.statistics, value, clusters=scores.clusters_of(metric))
        found[metric] = Quality(value=_whole(corpus.statistics, value), low=low, high=high, n=len(corpus.statistics))
    return found


def changes(
    scores: Scores,
    baseline: Scores,
    lower_is_better: Collection[str] = (),
    margins: Mapping[str, float] = MappingProxyType({}),
    margin: float = MARGIN,
) -> dict[str, Change]:
    """Each metric's paired difference to the baseline; metrics whose examples do not match are left out.

    Args:
        lower_is_better: metrics that count mistakes: there a fall is an improvement.
        margins: for each metric the loss that is taken as harmless, in points.
        margin: that of the others.
    """
    ours, theirs = scores.kept, baseline.kept
    if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
        return {}
    found = {}
    for metric, new in scores.per_example.items():
        old = baseline.per_example.get(metric)
        if old is None or old.shape != new.shape:
            continue
        one, two = scores.weights.get(metric), baseline.weights.get(metric)
        weights = None if one is None or two is None else (one, two)
        clusters = scores.clusters_of(metric)
        interval = difference_interval(new, old, weights=weights, clusters=clusters)
        difference = _mean(new, one) - _mean(old, two)
        found[metric] = _change(difference, interval, new, old, metric in lower_is_better, _same(scores, baseline))
        flips = weights is None and not grouped(clusters) and np.isin([new, old], (0.0, 1.0)).all()
        if flips:
            found[metric].p_value = mcnemar(found[metric].won, found[metric].lost)
    for metric, corpus in scores.corpus.items():
        before = baseline.corpus.get(metric)
        if before is None or before.statistics.shape != corpus.statistics.shape:
            continue
        value = _function(corpus, metric)
        a, b = corpus.statistics, before.statistics
        interval = corpus_difference_interval(a, b, value, clusters=scores.clusters_of(metric))
        difference = _whole(a, value) - _whole(b, value)
        # An example is won where the metric over it alone is better.
        found[metric] = _change(difference, interval, value(a), value(b), metric in lower_is_better, _same(scores, baseline))
    for metric, change in found.items():
        _conclude(change, metric in lower_is_better, margins.get(metric, margin))
    return found


def _conclude(change: Change, lower_is_better: bool, margin: float) -> None:
    change.margin = margin
    change.conclusion, change.needed = conclusion(
        change.difference,
        change.low,
        change.high,
        change.n,
        margin,
        lower_is_better=lower_is_better,
        identical=change.verdict == "identical",
    )


def _change(
    difference: float, interval: tuple[float, float], new: np.ndarray, old: np.ndarray, lower: bool, same: bool
) -> Change:
    up, down = int((new > old).sum()), int((new < old).sum())
    won, lost = (down, up) if lower else (up, down)
    low, high = interval
    better, worse = (high < 0, low > 0) if lower else (low > 0, high < 0)
    verdict: Literal["better", "worse", "no clear difference", "identical"] = "no clear difference"
    if lost == won == 0 and difference == 0 and same:
        verdict = "identical"
    elif better or worse:
        verdict = "better" if better else "worse"
    return Change(difference=difference, low=low, high=high, n=len(new), lost=lost, won=won, verdict=verdict)


def _same(scores: Scores, baseline: Scores) -> bool:
    """Whether all answers are the same, where the task has answers."""
    return scores.answers is None or (baseline.answers is not None and np.array_equal(scores.answers, baseline.answers))


def _mean(values: np.ndarray, weights: np.ndarray | None) -> float:
    return float(values.mean()) if weights is None else _whole(ratio_statistics(values, weights), ratio)


def _whole(statistics: np.ndarray, value: Value) -> float:
    return float(value(statistics.sum(axis=0, keepdims=True))[0])


def _function(corpus: CorpusMetric, metric: str) -> Value:
    if corpus.value is None:
        raise ValueError(f"{metric}: these scores were read from a file, which holds the numbers and not the formula")
    return corpus.value


def class_scores(scores: Scores) -> dict[str, ClassScore]:
    """Precision and recall of each class."""
    return {name: ClassScore.model_validate(found) for name, found in scores.classes.items()}


def save_scores(scores: Scores, path: Path) -> None:
    """Writes the example-by-example values as safetensors, so that a resumed run compares the same examples."""
    arrays: dict[str, Any] = {f"metric.{name}": values for name, values in scores.per_example.items()}
    arrays |= {f"weight.{name}": values for name, values in scores.weights.items()}
    arrays |= {f"corpus.{name}": corpus.statistics for name, corpus in scores.corpus.items()}
    arrays |= {name: values for name in ("answers", "kept") if (values := getattr(scores, name)) is not None}
    if scores.clusters is not None:
        arrays["clusters"] = np.unique(scores.clusters, return_inverse=True)[1]  # names of speakers are no numbers
    arrays |= {f"owner.{name}": values for name, values in scores.owners.items()}
    if scores.seen is not None:
        arrays |= to_arrays(scores.seen)
    save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, path)


def load_scores(path: Path) -> Scores:
    """What ``save_scores`` wrote: the classes' scores live in the report's row, and a corpus metric's formula in its task."""
    arrays = load_file(path)

    def named(kind: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(kind): values for name, values in arrays.items() if name.startswith(kind)}

    return Scores(
        per_example=named("metric."),
        weights=named("weight."),
        corpus={name: CorpusMetric(statistics) for name, statistics in named("corpus.").items()},
        answers=arrays.get("answers"),
        kept=arrays.get("kept"),
        clusters=arrays.get("clusters"),
        owners=named("owner."),
        seen=from_arrays(arrays),
    )
