"""Two runs example by example: only where the same examples were scored, else the reason why they cannot be paired."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from mmcompress.measure.quality import changes, load_scores
from mmcompress.report.schema import Change, Report, Row

if TYPE_CHECKING:
    from mmcompress.tasks.base import Scores

SAME_BASELINE = 0.02
"""The same baseline on the same examples may differ in this share of them: another processor rounds otherwise."""


@dataclass(frozen=True)
class Scored:
    """A run with the scores of every example that its folder holds."""

    report: Report
    baseline: Row | None
    final: Row | None
    folder: Path | None


@dataclass(frozen=True)
class Pairing:
    """What two runs show against each other.

    Attributes:
        reason: why they were not paired; empty where they were.
        changes: the second run's final model minus the first one's, by metric.
        left_out: metrics of a whole corpus, whose formula the scores do not hold.
    """

    reason: str
    changes: dict[str, Change] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def pair(first: Scored, other: Scored) -> Pairing:
    """The paired differences of two runs' final models on the same examples."""
    reason = _unlike(first, other)
    if reason:
        return Pairing(reason)
    one, two = _scores(first, first.final), _scores(other, other.final)
    if one is None or two is None:
        return Pairing("the scores of every example are not in both runs' folders")
    lost = tuple(sorted({*one.corpus, *two.corpus}))
    known = sorted(set(one.per_example) & set(two.per_example))
    if any(one.per_example[m].shape != two.per_example[m].shape for m in known):
        return Pairing("they scored different numbers of examples")
    if not _same_baselines(first, other):
        return Pairing("the same baseline was scored otherwise in the two runs, so that these are not the same examples")
    lower = {*first.report.lower_is_better, *other.report.lower_is_better}
    found = changes(replace(two, corpus={}), replace(one, corpus={}), lower)
    if not found and known:
        return Pairing("they kept different examples")
    return Pairing("", found, lost)


def _unlike(first: Scored, other: Scored) -> str:
    """What the recipes and the inputs say against pairing; empty where nothing does."""
    if first.final is None or other.final is None:
        return "one of them has no compressed model yet"
    if first.report.recipe.get("task") != other.report.recipe.get("task"):
        return "their tasks differ"
    evals = [(s.report.recipe.get("data") or {}).get("eval") for s in (first, other)]
    if evals[0] != evals[1]:
        return "their evaluation data differ"
    if first.folder is None or other.folder is None:
        return "the runs' folders are not known"
    inputs = [_eval_inputs(s.folder) for s in (first, other)]
    if inputs[0] != inputs[1]:
        return "their evaluation files are not the same (size or time of change)"
    return ""


def _eval_inputs(folder: Path | None) -> Any:
    """The fingerprints of the files behind data.eval, as ``run.json`` has them."""
    path = folder / "run.json" if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("inputs") or {}
    except (json.JSONDecodeError, AttributeError):
        return None
    return {name: value for name, value in found.items() if name.startswith("data.eval ")}


def _scores(run: Scored, row: Row | None) -> Scores | None:
    """The scores of a row's examples; None where its folder does not hold them."""
    if run.folder is None or row is None or not row.folder:
        return None
    path = run.folder / "measurements" / Path(row.folder).name / f"scores-{row.runtime}.safetensors"
    try:
        return load_scores(path) if path.is_file() else None
    except (OSError, SafetensorError):
        return None


def _same_baselines(first: Scored, other: Scored) -> bool:
    """Whether one model was scored alike in both runs; with two different models there is nothing to tell it from."""
    if first.report.recipe.get("model") != other.report.recipe.get("model"):
        return True
    if first.baseline is None or other.baseline is None or first.baseline.runtime != other.baseline.runtime:
        return True
    one, two = _scores(first, first.baseline), _scores(other, other.baseline)
    if one is None or two is None:
        return True
    shared = set(one.per_example) & set(two.per_example)
    return all(
        one.per_example[m].shape == two.per_example[m].shape
        and float(np.mean(np.abs(one.per_example[m] - two.per_example[m]) > 1e-3)) <= SAME_BASELINE
        for m in shared
    )
