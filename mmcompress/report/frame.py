"""Rows of a report as flat columns, for pandas: every number that a row holds, under its dotted path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("step", "runtime", "precision", "loads_with", "folder", "verdict", "conclusion")
"""Words that are worth a column; other words are for people."""
LEFT_OUT = ("settings", "result", "facts", "classes", "notes")
"""Not the same from row to row (what a pass was told and said), or a column for every class."""
SHORT = ("value", "difference")
"""A metric's own number has the metric's column: ``quality.accuracy``, ``change.accuracy``."""


def flat_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's numbers, truth values and names as one line; lists are left out.

    Args:
        row: the row as plain data, as in ``report.json``.
    """
    line: dict[str, Any] = {}
    for key, value in row.items():
        if key not in LEFT_OUT:
            _add(line, key, key, value)
    return line


def _add(line: dict[str, Any], path: str, key: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for inner, found in value.items():
            _add(line, path if inner in SHORT else f"{path}.{inner}", str(inner), found)
    elif isinstance(value, str):
        if key in NAMES:
            line[path] = value
    elif isinstance(value, int | float) or (value is None and "." not in path):
        line[path] = value
