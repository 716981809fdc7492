"""The slices that examples are looked at in: classes, columns of the data, and what can be measured of media and texts.

Shapes: N examples that were scored.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from mmcompress.data.examples import Examples
from mmcompress.data.traits import traits
from mmcompress.errors import DataError, one_of

MOST_VALUES = 20
"""A column with more different values than this is no set of slices, unless the recipe names it."""
MOST_NAMED = 200
"""The most values of a column that the recipe names; more are no slices either."""
QUARTERS_FROM = 200
"""With fewer examples than this they are cut into thirds."""
BY_MEASURE = {
    "brightness": ("dark pictures", "bright pictures", "brightness", ".2f"),
    "pixels": ("small pictures", "large pictures", "pixels", ",.0f"),
    "seconds": ("short recordings", "long recordings", "seconds", ".1f"),
    "loudness": ("quiet recordings", "loud recordings", "dB of full scale", ".0f"),
    "text length": ("short texts", "long texts", "characters", ".0f"),
}
"""For each measure what its lowest and highest values are called, its unit, and how its bounds are written."""


@dataclass(frozen=True, eq=False)
class Group:
    """Some of the examples.

    Attributes:
        by: what they were grouped by: ``class``, ``brightness``, or a column.
        name: "dark pictures (brightness up to 0.21, a quarter)".
        members: shape (N,), True for those in it.
    """

    by: str
    name: str
    members: np.ndarray


_made: weakref.WeakKeyDictionary[Examples, tuple[Any, list[Group]]] = weakref.WeakKeyDictionary()
"""Every model of a run is looked at in the same slices."""


def check_columns(examples: Examples, names: Sequence[str]) -> None:
    """Checks that the data has the columns that the recipe wants slices of, with few enough values.

    Raises:
        DataError: it has not.
    """
    for name in names:
        if name not in examples.column_names():
            raise DataError(f"report.slices: {examples.name}: " + one_of("column", name, examples.column_names()))
        values = _values(examples, name)
        many = len(set(values)) if values is not None else 0
        if not 2 <= many <= MOST_NAMED:
            found = "media or lists" if values is None else f"{many:,} different values"
            raise DataError(
                f"report.slices: {examples.name}: column {name!r} holds {found}; "
                f"allowed: texts or whole numbers, 2 to {MOST_NAMED} different ones"
            )


def groups(examples: Examples, kept: np.ndarray, columns: Sequence[str] | None = None) -> list[Group]:
    """All slices of the examples that were scored.

    Args:
        kept: shape (N,), their indices.
        columns: the columns to slice by; where None, all of texts or whole numbers with at most 20 different values that play
            no role, and the speaker.
    """
    wanted = (kept.tobytes(), None if columns is None else tuple(columns))
    if examples in _made and _made[examples][0] == wanted:
        return _made[examples][1]
    found = _classes(examples, kept)
    for name in _fitting_columns(examples) if columns is None else columns:
        column = _values(examples, name)
        if column is not None:
            found += by_value(name, column, kept)
        elif name == examples.columns.get("speaker"):  # rows that are made when asked for
            speakers = [examples.without_media(int(i))["speaker"] for i in kept]
            found += by_value(name, speakers, np.arange(len(speakers)))
    measured = traits(examples, kept)
    lengths = _text_lengths(examples, kept)
    if lengths is not None:
        measured["text length"] = lengths
    for name, values in measured.items():
        found += by_measure(name, values)
    _made[examples] = (wanted, found)
    return found


def by_value(name: str, values: Sequence[Any], kept: np.ndarray) -> list[Group]:
    """A slice for each value of a column; missing values are one too."""
    own = ["missing" if values[i] is None else str(values[i]) for i in kept]
    distinct = sorted(set(own))
    if len(distinct) < 2:
        return []
    array = np.array(own)
    return [Group(name, f"{name} {value}", array == value) for value in distinct]


def by_measure(name: str, values: np.ndarray) -> list[Group]:
    """Quarters of the examples by a measure, thirds of fewer than 200; equal values stay together. None where all are the same.

    Args:
        values: shape (N,); NaN where it could not be measured.
    """
    known = values[np.isfinite(values)]
    parts = 4 if len(known) >= QUARTERS_FROM else 3
    if len(known) < parts:
        return []
    inner = np.quantile(known, np.arange(1, parts) / parts, method="lower")
    edges = np.unique(inner[inner < known.max()])
    if not len(edges):
        return []
    low, high, unit, form = BY_MEASURE[name]
    number = np.searchsorted(edges, values, side="left")
    found = []
    for i in range(len(edges) + 1):
        lower, upper = None if i == 0 else edges[i - 1], None if i == len(edges) else edges[i]
        if lower is None:
            words = f"{low} ({unit} up to {upper:{form}})"
        elif upper is None:
            words = f"{high} ({unit} above {lower:{form}})"
        else:
            words = f"{unit} {lower:{form}} to {upper:{form}}"
        found.append(Group(name, words, np.isfinite(values) & (number == i)))
    return found


def _classes(examples: Examples, kept: np.ndarray) -> list[Group]:
    if "label" not in examples.columns or not examples.classes or len(examples.classes) < 2:
        return []
    labels = np.asarray(examples.labels())[kept]
    return [Group("class", f"class {name}", labels == i) for i, name in enumerate(examples.classes) if (labels == i).any()]


def _fitting_columns(examples: Examples) -> list[str]:
    speaker = examples.columns.get("speaker")
    taken = set(examples.columns.values())
    rest = [name for name in examples.column_names() if name not in taken]
    fitting = [n for n in rest if (values := _values(examples, n)) is not None and 2 <= len(set(values)) <= MOST_VALUES]
    return fitting if speaker is None else [speaker, *fitting]


def _values(examples: Examples, column: str) -> list[Any] | None:
    """A column's values; None where they are neither texts nor whole numbers, or where rows are made when asked for."""
    if isinstance(examples.rows, datasets.Dataset):
        feature = examples.rows.features[column]
        plain = isinstance(feature, datasets.ClassLabel) or (
            isinstance(feature, datasets.Value) and feature.dtype.startswith(("string", "large_string", "int", "uint", "bool"))
        )
        if not plain:
            return None
        values = list(examples.rows[column])
        return [None if v is None else feature.int2str(v) for v in values] if isinstance(feature, datasets.ClassLabel) else values
    if not isinstance(examples.rows, list):
        return None
    values = [row.get(column) for row in examples.rows]
    return values if all(v is None or isinstance(v, str | int) for v in values) else None


def _text_lengths(examples: Examples, kept: np.ndarray) -> np.ndarray | None:
    """How long what goes with each example is, in characters: its question, or else its text (the mean of several)."""
    role = next((role for role in ("question", "text") if role in examples.columns), None)
    if role is None:
        return None
    rows = [examples.without_media(int(i))[role] for i in kept]
    return np.array([len(t) if isinstance(t, str) else float(np.mean([len(one) for one in t])) for t in rows])
