"""What the bundled synthetic data sets share: rows that are made when they are asked for, in splits that never meet."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar, overload

Split = Literal["train", "validation", "test"]
SPLIT_ENDS: dict[str, int] = {"train": 80, "validation": 90, "test": 100}
"""Where each split's share of all that can be drawn ends, in percent."""

Row = TypeVar("Row", bound=Mapping[str, Any])


def split_of(identity: str) -> str:
    """The split that owns what has this identity (a scene, a sentence): a stable hash of it, 80/10/10."""
    bucket = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") % 100
    return next(name for name, end in SPLIT_ENDS.items() if bucket < end)


class Synthetic(Sequence[Row], Generic[Row]):
    """A split of a synthetic data set. Row `i` depends on `(seed, split, i)` alone, whatever `count` and the order are.

    Args:
        split: `train`, `validation` or `test`.
        count: Number of rows, at least 1.
        seed: Another seed gives other rows.

    Raises:
        ValueError: For an unknown split or a count below 1.
    """

    def __init__(self, split: Split, count: int, seed: int = 0) -> None:
        name = type(self).__name__.lower()
        if split not in SPLIT_ENDS:
            raise ValueError(f"{name}: unknown split {split!r}; use one of {', '.join(SPLIT_ENDS)}")
        if count < 1:
            raise ValueError(f"{name}: count must be at least 1, found {count}")
        self.split = split
        self.seed = seed
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        return self._row(self._place(index))

    @abstractmethod
    def _row(self, place: int) -> Row:
        """The row at a place, 0 or above."""

    def _place(self, index: int) -> int:
        """An index, which may count from the end, as a place."""
        if not -self._count <= index < self._count:
            raise IndexError(f"{type(self).__name__.lower()}: row {index} of {self._count}")
        return index % self._count
