"""What a table of a report is, whichever view shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One cell: the number, lines that explain it, a tone (``good``, ``bad`` or none) and tags such as "final"."""

    text: str
    small: tuple[str, ...] = ()
    tone: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table whose first ``heads`` columns name the row.

    Attributes:
        columns: (group, title) of each column; neighbours of one group share a heading.
        words: the columns, by number, that hold words and are set flush left.
    """

    key: str
    caption: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]
    heads: int = 1
    words: tuple[int, ...] = ()
    note: str = ""
