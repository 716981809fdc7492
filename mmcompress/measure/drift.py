"""How far embeddings have moved from the baseline's, and how the two towers lie to each other.

Shapes: N items, D and E widths, G groups.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

GROUPS = 20
"""Groups of items that are left out in turn for the interval of CKA."""


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine of each row of ``a`` with the same row of ``b``, (N,); both (N, D). 0 where a row is all zeros."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    length = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: np.ndarray = np.where(length > 0, (a * b).sum(axis=1) / np.where(length > 0, length, 1.0), 0.0)
    return found.clip(-1.0, 1.0)


def linear_cka(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Linear centered kernel alignment (Kornblith et al. 2019, arXiv 1905.00414, equation 3 in its feature form).

    ``|B'A|^2 / (|A'A| |B'B|)`` of the centred embeddings, in Frobenius norms: 1 where one is the other turned, mirrored and
    scaled; widths may differ. With fewer items than widths it is high whatever the embeddings are. The interval is a
    jackknife's over 20 groups of items, which needs the cross-products once.

    Args:
        a: (N, D).
        b: (N, E).

    Returns:
        The value and the ends of its 95% interval; NaN for the ends with fewer than 2 items a group, and for all where an
        embedding does not vary.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    groups = min(GROUPS, len(a) // 2)
    parts = [_sums(x, y) for x, y in zip(np.array_split(a, max(groups, 1)), np.array_split(b, max(groups, 1)), strict=True)]
    total = [np.sum([part[i] for part in parts], axis=0) for i in range(6)]
    value = _cka(total)
    if groups < 2 or not np.isfinite(value):
        return value, np.nan, np.nan
    left = np.array([_cka([whole - own for whole, own in zip(total, part, strict=True)]) for part in parts])
    if not np.isfinite(left).all():
        return value, np.nan, np.nan
    # Not centred at the jackknife's own estimate: near 1 its correction of bias would pass 1.
    spread = np.sqrt((groups - 1) / groups * np.square(left - left.mean()).sum())
    reach = float(stats.t.ppf(0.975, groups - 1)) * float(spread)
    return value, max(0.0, value - reach), min(1.0, value + reach)


def _sums(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(len(x)), x.sum(axis=0), y.sum(axis=0), x.T @ x, y.T @ y, y.T @ x]


def _cka(sums: list[np.ndarray]) -> float:
    n, sx, sy, xx, yy, yx = sums
    cross, own_x, own_y = yx - np.outer(sy, sx) / n, xx - np.outer(sx, sx) / n, yy - np.outer(sy, sy) / n
    below = np.linalg.norm(own_x) * np.linalg.norm(own_y)
    return float(np.square(cross).sum() / below) if below > 1e-12 else float("nan")


def modality_gap(a: np.ndarray, b: np.ndarray) -> float:
    """The distance between the mean unit embeddings of two towers (Liang et al. 2022, arXiv 2203.02053, section 2), 0 to 2."""

    def centre(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.float64)
        found: np.ndarray = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).mean(axis=0)
        return found

    return float(np.linalg.norm(centre(a) - centre(b)))
