"""Looks on while a model answers, and keeps what its encoders gave, so that their drift is known without running them again.

Shapes: B examples of a batch, N of them in all, S positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmcompress.runtimes.base import Predict
from mmcompress.tasks._observed import MOST_EMBEDDINGS, some


class Watched:
    """A ``Predict`` that keeps the mean over positions of what each component without a cache gives for a batch of examples.

    Components whose rows are no examples (the tiles of a picture, beams) are left out, and so is whatever was not seen for
    every example.

    Args:
        predict: what runs the components.
        total: how many examples will be seen at most; at most 2,048 of them are kept.
    """

    def __init__(self, predict: Predict, total: int) -> None:
        self.predict = predict
        self._wanted = frozenset(some(total, MOST_EMBEDDINGS).tolist())
        self._now: list[int] = []
        self._found: dict[str, dict[int, np.ndarray]] = {}
        self._seen: list[int] = []

    @property
    def runtime(self) -> str:
        """That of what is watched."""
        return self.predict.runtime

    @property
    def components(self) -> tuple[str, ...]:
        """Those of what is watched."""
        return self.predict.components

    def batch(self, rows: list[int]) -> None:
        """Says which examples, by index, the next calls are about."""
        self._now = rows
        self._seen += [i for i in rows if i in self._wanted]

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self.predict(component, inputs)
        first = next(iter(found.values()))
        if self._now and len(first) == len(self._now) and first.ndim >= 2 and not self.predict.cache(component):
            kept = self._found.setdefault(component, {})
            for i, row in zip(self._now, first, strict=True):
                if i in self._wanted and i not in kept:
                    kept[i] = row.reshape(-1, row.shape[-1]).mean(axis=0, dtype=np.float64)
        return found

    def cache(self, component: str) -> Mapping[str, tuple[int, int]]:
        """As what is watched."""
        return self.predict.cache(component)

    def embeddings(self) -> dict[str, np.ndarray]:
        """For each component that was seen for all kept examples its pooled outputs, in the order of the examples, (N, D)."""
        found = {}
        for component, rows in self._found.items():
            if len(rows) == len(set(self._seen)) and len({row.shape for row in rows.values()}) == 1:
                found[component] = np.stack([rows[i] for i in sorted(rows)]).astype(np.float32)
        return found
