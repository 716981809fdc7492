"""Scores under conditions to what the report says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmcompress.measure.corruptions.cells import Cell, strength
from mmcompress.measure.paired_drops import Drops, Sample, judged, mean
from mmcompress.report.schema_robustness import Condition, Estimate, Robustness
from mmcompress.robustness_settings import MODALITIES, PICTURES, SOUNDS, TEXTS

DESCRIPTIONS = {
    **PICTURES,
    **SOUNDS,
    **TEXTS,
    **MODALITIES,
    "fgsm": "one step along the sign of the gradient, in torch (Goodfellow et al. 2015)",
    "pgd": "several projected steps along the sign of the gradient, in torch (Madry et al. 2018)",
}


def of_cells(drops: Drops, cells: Sequence[Cell], is_share: bool) -> list[Condition]:
    """Corruptions of media, changes of texts, and changes of modality; p-values are adjusted within each of the three.

    Args:
        is_share: one minus the metric, or the metric that counts mistakes, is an error rate, of which ratios can be taken.
    """
    found: list[Condition] = []
    for kind in ("media", "text", "modality"):
        own = []
        for name, group in by_name(cells).items():
            if group[0].group != kind:
                continue
            extra = drops.mean_extra(group)
            errors, falls = (drops.error_ratio(group), drops.drop_ratio(group)) if is_share and kind == "media" else (None, None)
            own.append(
                Condition(
                    name=name,
                    group=kind,
                    description=DESCRIPTIONS[name],
                    degrees=[drops.degree(cell, cell.severity, strength(cell)) for cell in group],
                    extra=extra.estimate(drops.n),
                    p=extra.p(),
                    p_adjusted=1.0,
                    verdict="no clear difference",
                    error_ratio=None if errors is None else errors.value,
                    drop_ratio=None if falls is None else falls.value,
                )
            )
        found += judged(own)
    return found


def of_attacks(drops: Drops, cells: Mapping[str, Sequence[tuple[str, float]]]) -> list[Condition]:
    """Attacks by method, over their distances."""
    found = []
    for name, group in cells.items():
        extra = drops.mean_extra(group)
        found.append(
            Condition(
                name=name,
                group="attack",
                description=DESCRIPTIONS[name],
                degrees=[drops.degree(cell, cell[1], f"{cell[1]:g}/255") for cell in group],
                extra=extra.estimate(drops.n),
                p=extra.p(),
                p_adjusted=1.0,
                verdict="no clear difference",
            )
        )
    return judged(found)


def over_all(found: Robustness, drops: Drops, cells: Sequence[Cell]) -> None:
    """Sets the means over corruptions of media of both corruption errors (Hendrycks and Dietterich 2019, section 4.2)."""
    groups = list(by_name([cell for cell in cells if cell.group == "media"]).values())
    errors = [r for group in groups if (r := drops.error_ratio(group)) is not None]
    if groups and len(errors) == len(groups):
        found.mean_error_ratio = _finite(mean(errors), drops.n)
    falls = [r for group in groups if (r := drops.drop_ratio(group)) is not None]
    found.drop_ratio_over = len(falls)
    if falls:
        found.mean_drop_ratio = _finite(mean(falls), drops.n)


def _finite(sample: Sample, n: int) -> Estimate | None:
    """None where the baseline makes no error in so many resamples that there is no interval."""
    return sample.estimate(n) if np.mean(np.isfinite(sample.drawn)) > 0.99 else None


def by_name(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The severities of each corruption."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.name, []).append(cell)
    return found
