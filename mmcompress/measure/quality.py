"""Scores of an evaluation to numbers with intervals, alone and against the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from mmcompress.measure.statistics import difference_interval, mean_interval
from mmcompress.report.schema import Change, ClassScore, Quality
from mmcompress.tasks.base import Scores


def qualities(scores: Scores) -> dict[str, Quality]:
    """Each metric with its 95% interval and n."""
    found = {}
    for metric, values in scores.per_example.items():
        low, high = mean_interval(values)
        found[metric] = Quality(value=float(values.mean()), low=low, high=high, n=len(values))
    return found


def changes(scores: Scores, baseline: Scores) -> dict[str, Change]:
    """Each metric's paired difference to the baseline; metrics whose examples do not match are left out."""
    found = {}
    for metric, new in scores.per_example.items():
        old = baseline.per_example.get(metric)
        if old is None or old.shape != new.shape:
            continue
        low, high = difference_interval(new, old)
        lost, won = int((new < old).sum()), int((new > old).sum())
        ours, theirs = scores.answers, baseline.answers
        same_answers = ours is None or (theirs is not None and np.array_equal(ours, theirs))
        verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        if lost == won == 0 and same_answers:
            verdict = "identical"
        found[metric] = Change(
            difference=float(new.mean() - old.mean()), low=low, high=high, n=len(new), lost=lost, won=won, verdict=verdict
        )
    return found


def class_scores(scores: Scores) -> dict[str, ClassScore]:
    """Precision and recall of each class."""
    return {name: ClassScore.model_validate(found) for name, found in scores.classes.items()}


def save_scores(scores: Scores, path: Path) -> None:
    """Writes the example-by-example values as safetensors, so that a resumed run compares the same examples."""
    arrays: dict[str, Any] = {f"metric.{name}": values for name, values in scores.per_example.items()}
    if scores.answers is not None:
        arrays["answers"] = np.ascontiguousarray(scores.answers)
    if scores.kept is not None:
        arrays["kept"] = np.ascontiguousarray(scores.kept)
    save_file(arrays, path)


def load_scores(path: Path) -> Scores:
    """What ``save_scores`` wrote; the classes' scores live in the report's row."""
    arrays = load_file(path)
    metrics = {name.removeprefix("metric."): values for name, values in arrays.items() if name.startswith("metric.")}
    return Scores(per_example=metrics, answers=arrays.get("answers"), kept=arrays.get("kept"))
