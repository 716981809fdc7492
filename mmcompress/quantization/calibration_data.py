"""Whether calibration data tells anything: ranges from nothing, from one picture or from noise make a model wrong, silently.

The data is looked at as it streams by; what is kept are sums and hashes of a few examples.

Shapes: B examples of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcompress.quantization.watching import MASK, Feeds

LEAST_DISTINCT = 8
"""Different pictures or recordings that ranges may be taken from; 32 to 300 are usual."""
NOISE = 0.1
"""White noise has no correlation of neighbours; pictures and spectrograms have 0.5 and more."""
MEDIA = ("pixel_values", "input_features", "input_values")
"""Inputs that are pictures or recordings; what other components of the model make of them is not judged."""
KEPT = 64
SHORTEST = 2
"""Tokens of a text that holds nothing: its beginning and its end."""


@dataclass
class _Input:
    """What was seen of one input.

    Attributes:
        distinct: hashes of examples, up to ``KEPT``.
        sums: for each place along the second axis n, sums of values and of their right neighbours, of products and of squares.
        longest: tokens of the longest text.
    """

    distinct: set[bytes] = field(default_factory=set)
    sums: NDArray[np.float64] | None = None
    longest: int = 0


@dataclass
class CalibrationJudge:
    """Looks at the inputs of one component.

    Attributes:
        component: its name.
        rows: examples seen.
    """

    component: str
    rows: int = 0
    _inputs: dict[str, _Input] = field(default_factory=dict)

    def watch(self, feeds: Iterable[Feeds]) -> Iterator[Feeds]:
        """Hands batches on."""
        for batch in feeds:
            self.rows += max((len(values) for values in batch.values() if np.ndim(values)), default=0)
            for name, values in batch.items():
                if name in MEDIA and np.issubdtype(values.dtype, np.floating) and values.ndim >= 3:
                    self._media(self._inputs.setdefault(name, _Input()), values)
                elif name == "input_ids" and values.ndim == 2:
                    self._texts(self._inputs.setdefault(name, _Input()), values, batch.get(MASK))
            yield batch

    def _media(self, seen: _Input, values: NDArray[Any]) -> None:
        _remember(seen, values)
        for example in values:  # in float64 and six times: one at a time
            rows = example.reshape(len(example), -1, example.shape[-1]).astype(np.float64)
            left, right = rows[..., :-1], rows[..., 1:]
            terms = (left * 0 + 1, left, right, left * right, left**2, right**2)
            sums = np.stack([term.sum(axis=(1, 2)) for term in terms])  # (6, second axis)
            seen.sums = sums if seen.sums is None or seen.sums.shape != sums.shape else seen.sums + sums

    def _texts(self, seen: _Input, ids: NDArray[Any], mask: NDArray[Any] | None) -> None:
        lengths = np.full(len(ids), ids.shape[1]) if mask is None or mask.shape != ids.shape else mask.sum(axis=1)
        seen.longest = max(seen.longest, int(lengths.max(initial=0)))
        _remember(seen, ids)

    def problem(self) -> str | None:
        """Why ranges cannot be taken from what was seen, or None."""
        if not self.rows:
            return f"the calibration data has nothing for {self.component}: it never ran"
        for name, seen in self._inputs.items():
            what = f"the calibration data of {self.component} tells nothing: "
            if seen.sums is None:
                if len(seen.distinct) == 1 and seen.longest <= SHORTEST:
                    return f"{what}all {self.rows} texts are empty"
                continue
            correlation = _correlation(seen.sums)
            if correlation is None:
                return f"{what}{name} is one constant in all {self.rows} examples"
            if abs(correlation) < NOISE:
                return f"{what}{name} is white noise (neighbouring values have a correlation of {correlation:.3f})"
            if len(seen.distinct) < LEAST_DISTINCT:
                found = f"{len(seen.distinct)} different examples among {self.rows}"
                return f"{what}{name} has {found}; at least {LEAST_DISTINCT} are needed"
        return None


def _remember(seen: _Input, values: NDArray[Any]) -> None:
    for row in values:
        if len(seen.distinct) >= KEPT:
            return
        seen.distinct.add(hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=16).digest())


def _correlation(sums: NDArray[np.float64]) -> float | None:
    """Of neighbours along the last axis, all examples together; None where nothing varies."""
    n, left, right, product, left2, right2 = sums
    n = np.maximum(n, 1)
    covariance = (product / n - left * right / n**2).sum()
    variances = (left2 / n - (left / n) ** 2).sum(), (right2 / n - (right / n) ** 2).sum()
    least = 1e-12 * max(float((left2 / n).sum()), 1e-30)
    if min(variances) <= least:
        return None
    return float(covariance / np.sqrt(variances[0] * variances[1]))
