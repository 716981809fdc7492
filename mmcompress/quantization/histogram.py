"""Counts of a tensor's values in equal bins, over any amount of data in the same memory.

Bins begin at multiples of their width, and the width is a power of two: when the range outgrows the bins, pairs of them are
merged, exactly. So what is counted depends neither on the order of the data nor on how it was cut into batches.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 8192
"""At most; they reach from the smallest value to the largest one, or to 0, and at least half of them are in use."""

Counts = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]


class Histogram:
    """Counts of float32 values; bin ``i`` holds those in ``[(first + i) * width, (first + i + 1) * width)``.

    Attributes:
        counts: of the bins from ``first`` on.
        first: the number of the first bin, counted from zero.
        width: of a bin: a power of two.
        low: the smallest value seen; inf where there was none.
        high: the largest.
    """

    def __init__(self, bins: int = BINS) -> None:
        self._bins = bins
        self.counts: Counts = np.zeros(0, dtype=np.int64)
        self.first = 0
        self.width = 0.0
        self.low, self.high = np.float32(np.inf), np.float32(-np.inf)

    def add(self, values: NDArray[Any]) -> None:
        """Counts finite float32 values of any shape."""
        if not values.size:
            return
        flat = values.reshape(-1)
        self.low, self.high = min(self.low, flat.min()), max(self.high, flat.max())
        self._widen()
        # Exact: a product with a power of two only changes the exponent.
        places = np.floor(flat * np.float32(1 / self.width)).astype(np.intp)
        places -= self.first
        self.counts += np.bincount(places, minlength=len(self.counts))

    def _widen(self) -> None:
        """Makes bins that hold 0 and everything from ``low`` to ``high``."""
        low, high = min(float(self.low), 0.0), max(float(self.high), 0.0)
        self.width = self.width or _power((high - low) / self._bins)
        while math.floor(high / self.width) + 1 - math.floor(low / self.width) > self._bins:
            padded = np.pad(self.counts, (self.first % 2, 0))
            padded = np.pad(padded, (0, len(padded) % 2))
            self.counts = padded.reshape(-1, 2).sum(axis=1)
            self.first, self.width = self.first // 2, 2 * self.width
        first, end = math.floor(low / self.width), math.floor(high / self.width) + 1
        self.counts = np.pad(self.counts, (self.first - first, end - self.first - len(self.counts)))
        self.first = first

    def edges(self) -> Floats:
        """Where bins begin, and where the last one ends."""
        return (self.first + np.arange(len(self.counts) + 1)) * self.width

    def centres(self) -> Floats:
        """The middles of the bins, none outside of what was seen."""
        edges = self.edges()
        return np.clip((edges[:-1] + edges[1:]) / 2, self.low, self.high)

    def absolute(self) -> tuple[Counts, float]:
        """Counts of absolute values in bins from 0 on, and the width of a bin."""
        end = max(self.first + len(self.counts), -self.first, 1)
        found = np.zeros(end, dtype=np.int64)
        numbers = self.first + np.arange(len(self.counts))
        np.add.at(found, np.where(numbers >= 0, numbers, -numbers - 1), self.counts)
        return found, self.width


def _power(least: float) -> float:
    """The smallest power of two that is no smaller than a positive number; 2^-60 for what is smaller still."""
    return 2.0 ** max(math.ceil(math.log2(least)), -60) if least > 0 else 2.0**-60
