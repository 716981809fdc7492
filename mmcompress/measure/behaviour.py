"""What changed underneath the quality numbers, put together from the scores of a model and of the baseline.

Shapes: N examples, M items that were judged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from mmcompress.data.examples import Examples
from mmcompress.measure import agreement, drift
from mmcompress.measure.calibration import calibration, resampled
from mmcompress.measure.gallery import gallery
from mmcompress.measure.slices import worst_slices
from mmcompress.measure.slicing import groups
from mmcompress.measure.statistics import mean_interval
from mmcompress.model import CompressedModel
from mmcompress.report.schema_behaviour import (
    Agreement,
    Alignment,
    AlignmentChange,
    Behaviour,
    Drift,
    Estimate,
    ExchangedAnswers,
    Flips,
)
from mmcompress.tasks._observed import MOST_EMBEDDINGS, Observed, some
from mmcompress.tasks.base import Scores, Task

FEW = 30


def know_scale(scores: Scores, model: CompressedModel) -> None:
    """Notes the factor that the model of a dual encoder's scores puts on its cosines; that of a broken model is no number."""
    if scores.seen is None or scores.seen.scale is not None:
        return
    parts = model.family.combined(model.module)
    if parts is not None and np.isfinite(parts.scale):
        scores.seen.scale = parts.scale


def behaviour(
    scores: Scores, baseline: Scores | None, task: Task, examples: Examples, columns: Sequence[str] | None = None
) -> Behaviour | None:
    """Everything that can be said; None for tasks that kept nothing but their scores.

    Args:
        baseline: the baseline's scores on the same examples; None for the baseline itself.
        columns: the data's columns to slice by; see `slicing.groups`.
    """
    seen = scores.seen
    if seen is None:
        return None
    old = baseline.seen if baseline is not None else None
    items = _items(scores, seen)
    found = Behaviour(alignment=_alignment(seen, items))
    if old is not None and not np.array_equal(old.index, seen.index):
        old = None
        found.left_out.append("What changed against the baseline: the two models were scored on different examples.")
    _calibrate(found, seen, old, items)
    if old is None or baseline is None:
        return found
    _compare_answers(found, scores, baseline, task, examples)
    found.agreement = _agreement(old, seen, items)
    found.drift = _drift(old, seen)
    if not found.drift:
        found.left_out.append("Drift of embeddings: no encoder's outputs were seen for every example.")
    if found.alignment is None:
        found.left_out.append("Cross-modal alignment: this task compares no embeddings of two kinds.")
    elif (before := _alignment(old, items)) is not None:
        found.alignment_change = AlignmentChange(before=before, margin=_estimate(_margin(seen) - _margin(old), items))
    metric = next(iter(task.metrics))
    kept = np.arange(len(examples)) if scores.kept is None else scores.kept
    found.slices = worst_slices(scores, baseline, metric, metric in task.lower_is_better, groups(examples, kept, columns))
    if found.slices is None:
        found.left_out.append(f"Slices: {metric} is no mean over examples, or there is nothing to slice by.")
    return found


def _calibrate(found: Behaviour, seen: Observed, old: Observed | None, items: np.ndarray) -> None:
    if seen.logits is None or seen.truth is None or seen.logit_rows is None:
        found.left_out.append("Calibration: this task's answers come without a probability of each possible answer.")
        return
    if seen.scale is None:
        found.left_out.append("Calibration: the model has no scale that turns its similarities into probabilities.")
        return
    before = None
    if old is not None and old.logits is not None and old.scale is not None and old.logits.shape == seen.logits.shape:
        before = old.logits.astype(np.float64) * old.scale
    logits, labels = seen.logits.astype(np.float64) * seen.scale, seen.truth[seen.logit_rows]
    found.calibration = calibration(logits, labels, before, _clusters(items[seen.logit_rows]))
    if len(seen.logit_rows) < len(seen.index):
        found.left_out.append(f"Calibration and KL are over {len(labels):,} of {len(seen.index):,} items, drawn by a fixed seed.")


def _compare_answers(found: Behaviour, scores: Scores, baseline: Scores, task: Task, examples: Examples) -> None:
    old, seen = baseline.seen, scores.seen
    if old is None or seen is None:
        return
    codes = agreement.in_common_numbers(old, seen)
    other = None if codes is None else codes[0] != codes[1]
    changed = other if other is not None else old.right != seen.right
    found.flips = Flips(
        n=len(seen.index),
        right_means=seen.right_means,
        right_to_wrong=int((old.right & ~seen.right).sum()),
        wrong_to_right=int((~old.right & seen.right).sum()),
        wrong_to_other=None if other is None else int((~old.right & ~seen.right & other).sum()),
        share=_share(changed.astype(np.float64), _clusters(_items(scores, seen))),
    )
    metric = next(iter(task.metrics))
    sign = -1.0 if metric in task.lower_is_better else 1.0
    gain = None
    new, last = scores.per_example.get(metric), baseline.per_example.get(metric)
    if new is not None and last is not None and len(new) == len(last) == len(seen.index):
        gain = sign * (new - last)
    sure = np.stack([_confidence(old), _confidence(seen)])
    found.gallery = gallery(old, seen, other, sure, gain, examples)
    if codes is not None and seen.ranked == {}:
        found.exchanged = [ExchangedAnswers(**vars(e)) for e in agreement.exchanges(*codes)]


def _confidence(seen: Observed) -> np.ndarray:
    found = np.full(len(seen.index), np.nan)
    logs = agreement.log_probabilities(seen)
    if logs is not None and seen.logit_rows is not None:
        found[seen.logit_rows] = np.minimum(np.exp(logs.max(axis=1)), 1.0)
    return found


def _agreement(old: Observed, seen: Observed, items: np.ndarray) -> Agreement:
    found = Agreement()
    codes = agreement.in_common_numbers(old, seen)
    if codes is not None:
        found.top1 = _share((codes[0] == codes[1]).astype(np.float64), _clusters(items))
    before, after = agreement.log_probabilities(old), agreement.log_probabilities(seen)
    if before is not None and after is not None and before.shape == after.shape and seen.logit_rows is not None:
        rows = items[seen.logit_rows]
        found.kl = _mean(agreement.kl(before, after), _clusters(rows))
        if before.shape[1] > 5:
            found.top5 = _mean(agreement.top_k_overlap(before, after, 5), _clusters(rows))
    before, after = agreement.log_probabilities_of_texts(old), agreement.log_probabilities_of_texts(seen)
    if before is not None and after is not None and before.shape == after.shape:
        rows = items[some(len(items), MOST_EMBEDDINGS)]
        if len(rows) == len(before):
            found.kl = _mean(agreement.kl(before, after), _clusters(rows))
    for name, ranked in seen.ranked.items():
        if name in old.ranked and old.ranked[name].shape == ranked.shape:
            found.ranked[name] = _mean(agreement.shared(old.ranked[name], ranked))
    return found


def _drift(old: Observed, seen: Observed) -> dict[str, Drift]:
    found = {}
    for tower, after in seen.embeddings.items():
        before = old.embeddings.get(tower)
        if before is None or len(before) != len(after):
            continue
        value, low, high = drift.linear_cka(before, after)
        ends = (low, high) if np.isfinite(low) else (None, None)
        found[tower] = Drift(
            cosine=_mean(drift.cosines(before, after)) if before.shape == after.shape else None,
            cka=Estimate(value=value, low=ends[0], high=ends[1], n=len(after)) if np.isfinite(value) else None,
            width=after.shape[1],
        )
    return found


def _alignment(seen: Observed, items: np.ndarray) -> Alignment | None:
    if seen.matched is None or seen.unmatched is None:
        return None
    known = np.isfinite(seen.matched) & np.isfinite(seen.unmatched)
    if not known.any():
        return None
    media = next((rows for tower, rows in seen.embeddings.items() if tower != "text"), None)
    text = seen.embeddings.get("text")
    return Alignment(
        matched=_estimate(seen.matched, items),
        unmatched=_estimate(seen.unmatched, items),
        margin=_estimate(_margin(seen), items),
        gap=drift.modality_gap(media, text) if media is not None and text is not None else None,
    )


def _margin(seen: Observed) -> np.ndarray:
    if seen.matched is None or seen.unmatched is None:
        return np.full(len(seen.index), np.nan)
    found: np.ndarray = seen.matched - seen.unmatched
    return found


def _estimate(values: np.ndarray, items: np.ndarray) -> Estimate:
    known = np.isfinite(values)
    return _mean(values[known], _clusters(items[known]))


def _share(values: np.ndarray, clusters: np.ndarray | None = None) -> Estimate:
    """The share of values (M,) that are 1; the others are 0."""
    low, high = mean_interval(values, clusters=clusters)
    return Estimate(value=float(values.mean()), low=low, high=high, n=len(values))


def _mean(values: np.ndarray, clusters: np.ndarray | None = None) -> Estimate:
    """A mean with its t interval, robust to clusters: as good as a bootstrap for the hundreds of values here, and free.

    Fewer than 30 values or clusters are resampled instead.
    """
    mean, n = float(values.mean()), len(values)
    number = np.arange(n) if clusters is None else np.unique(clusters, return_inverse=True)[1].reshape(-1)
    sums = np.bincount(number, weights=values - mean)
    if len(sums) < FEW and n > 1 and np.ptp(values) > 0:
        drawn, size = resampled(values[:, None], clusters)
        low, high = np.quantile(drawn[:, 0] / size, [0.025, 0.975])
        return Estimate(value=mean, low=float(low), high=float(high), n=n)
    if len(sums) < 2:
        return Estimate(value=mean, n=n)
    groups = len(sums)
    spread = float(np.sqrt(np.square(sums).sum() * groups / (groups - 1))) / n
    reach = float(stats.t.ppf(0.975, groups - 1)) * spread
    return Estimate(value=mean, low=mean - reach, high=mean + reach, n=n)


def _items(scores: Scores, seen: Observed) -> np.ndarray:
    """What each item stands or falls with, (M,): its example, or what the example itself belongs to."""
    if scores.clusters is None or scores.kept is None or len(scores.clusters) != len(scores.kept):
        return seen.index
    place = np.searchsorted(scores.kept, seen.index)
    if place.max(initial=0) >= len(scores.kept) or not np.array_equal(scores.kept[place], seen.index):
        return seen.index
    found: np.ndarray = scores.clusters[place]
    return found


def _clusters(items: np.ndarray) -> np.ndarray | None:
    return None if len(np.unique(items)) in (1, len(items)) else items
