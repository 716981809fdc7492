"""How long work says how far it is: bars in a terminal, silence elsewhere, one interface for both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


class Reporter:
    """Says nothing. The base of what does."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Passes the items through and shows how many of ``total`` are done."""
        yield from items

    def note(self, text: str) -> None:
        """A short word beside the running bar, such as the current loss."""


class TerminalReporter(Reporter):
    """Bars with an estimate of the time left, and plain lines where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Progress | None = None
        self._task: TaskID | None = None

    @contextmanager
    def live(self) -> Iterator[None]:
        """Shows bars while the block runs."""
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars:
            self._bars = bars
            try:
                yield
            finally:
                self._bars = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        if self._bars is None:
            yield from items
            return
        size = total if total is not None else len(items) if isinstance(items, Sized) else None
        outer, task = self._task, self._bars.add_task(what, total=size, note="")
        self._task = task
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)
            self._task = outer

    def note(self, text: str) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, note=text)


SILENT = Reporter()
