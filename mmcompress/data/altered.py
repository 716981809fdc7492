"""Examples seen through a change: other media, other texts, or those of another row; nothing is copied or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmcompress.data.examples import Examples

Change = Callable[[Any], Any]
"""A decoded picture or `Audio` to another one, or one text to another one."""


class Altered(Examples):
    """A view of examples: same rows, labels and answers, but what the model is given is changed.

    Attributes:
        base: the examples as they are.
        changes: by role what is done to a value; to each text of a list by itself.
        sources: by role, for each row of the base the row that the value is taken from, shape (N,).
    """

    def __init__(
        self,
        base: Examples,
        changes: Mapping[str, Change] | None = None,
        sources: Mapping[str, Sequence[int]] | None = None,
        classes: Sequence[str] | None = None,
        chosen: Sequence[int] | None = None,
    ) -> None:
        """Makes the view.

        Args:
            classes: other names for the labels; the labels themselves stay.
            chosen: the rows of the base that are seen; all where left out.
        """
        names = classes if classes is not None else base.classes
        super().__init__(base.rows, base.name, base.columns, names, base.skip_damaged, base.synthetic, base.folder)
        self.base = base
        self.changes = dict(changes or {})
        self.sources = dict(sources or {})
        self.chosen = list(chosen if chosen is not None else range(len(base)))

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, indices: Sequence[int]) -> Altered:
        return Altered(self.base, self.changes, self.sources, self.classes, [self.chosen[i] for i in indices])

    def labels(self) -> list[int]:
        labels = self.base.labels()
        return [labels[i] for i in self.chosen]

    def values(self, role: str) -> Sequence[Any]:
        """A role's column as it is in the data, without the change."""
        values = self.base.values(role)
        return [values[i] for i in self.chosen]

    def _row(self, index: int, columns: Mapping[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index}
        for role, column in columns.items():
            at = self.chosen[index]
            values = self.base._row(int(self.sources[role][at]) if role in self.sources else at, {role: column})
            if role in values:
                found[role] = self._changed(role, values[role])
        return found

    def _changed(self, role: str, value: Any) -> Any:
        change = self.changes.get(role)
        if change is None:
            return value
        return [change(one) for one in value] if isinstance(value, list) else change(value)
