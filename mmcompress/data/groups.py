"""Which examples stand or fall together: one picture's, one speaker's, or those that the data says.

Examples of one group are not independent, and an interval that takes them so is too narrow.

Shapes: N examples.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmcompress.data.examples import GROUPING, Examples
from mmcompress.data.leaks import same_media

FEWEST_GROUPS = 10
"""With fewer groups than this a bootstrap of them is too narrow more often than it says."""

_known: weakref.WeakKeyDictionary[Examples, dict[str, Sequence[Any]]] = weakref.WeakKeyDictionary()


def group_numbers(values: Sequence[Any]) -> np.ndarray | None:
    """Names of groups as numbers, (N,); None where an example's is not named, or where they are too few to resample."""
    if any(value is None for value in values):
        return None
    names, numbers = np.unique([str(value) for value in values], return_inverse=True)
    return None if len(names) < FEWEST_GROUPS else numbers.reshape(-1).astype(np.int64)


def groups_of(examples: Examples, indices: np.ndarray) -> tuple[np.ndarray, str] | None:
    """The group of each of these examples, (N,), and what makes them one; None where all stand alone.

    The column of the role ``cluster`` decides, else that of ``speaker``, else which pictures or recordings are the same bytes.
    """
    if not len(indices):
        return None
    for role in GROUPING:
        if role in examples.columns:
            values = _values(examples, role)
            found = group_numbers([values[i] for i in indices])
            if found is not None:
                return (found, examples.columns[role]) if _some_meet(found) else None
    media = _values(examples, examples.kind)
    found = np.unique([str(media[i]) for i in indices], return_inverse=True)[1].reshape(-1).astype(np.int64)
    return (found, examples.kind) if _some_meet(found) else None


def _values(examples: Examples, role: str) -> Sequence[Any]:
    """A column, read once: every step and runtime asks for the same one, and made-up data renders whole rows for it."""
    known = _known.setdefault(examples, {})
    if role not in known:
        known[role] = list(examples.values(role)) if role in GROUPING else same_media(examples)
    return known[role]


def _some_meet(numbers: np.ndarray) -> bool:
    return FEWEST_GROUPS <= len(np.unique(numbers)) < len(numbers)
