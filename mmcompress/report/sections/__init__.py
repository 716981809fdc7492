"""Parts of a report that stand by themselves, one file each: found here, shown by every view.

A file in this folder sets ``ORDER`` (small ones come first) and has::

    def section(report: Report, folder: Path | None) -> Section | None     # None: nothing was measured that it could show
    def alerts(report: Report) -> list[Alert]                              # what belongs on the first screen

and may have ``def compare(runs: Sequence[Run]) -> Section | None`` for the page that puts runs side by side. Files whose names
begin with an underscore are helpers. ``report/views.py`` draws tables in all three forms.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from markupsafe import Markup

from mmcompress.report.alerts import Alert
from mmcompress.report.schema import Report


@dataclass(frozen=True)
class Section:
    """One part of a report in its three forms; the views put the heading above it.

    Attributes:
        anchor: its place on the page, unique there; other ids inside it begin with ``<anchor>-``.
        html: what stands below the heading (``h2``); headings in it are ``h3``. All text in it is escaped.
        markdown: the same for Markdown, with headings from ``####``; empty: left out there.
        text: the same for terminals, in lines of at most 110 characters; empty: left out there.
    """

    anchor: str
    title: str
    html: Markup
    markdown: str
    text: str


@dataclass(frozen=True)
class Run:
    """One run of several that are compared; without a folder, files beside the report cannot be shown."""

    name: str
    report: Report
    folder: Path | None


@cache
def modules() -> tuple[ModuleType, ...]:
    """The files of this folder, in their order."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    found = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(sorted(found, key=lambda module: int(module.ORDER)))


def all_sections(report: Report, folder: Path | None) -> list[Section]:
    """What each file has to show of a run.

    Args:
        folder: the run's folder, for pictures and recordings of examples; None where only the report is known.
    """
    made = (module.section(report, folder) for module in modules())
    return [section for section in made if section is not None]


def all_alerts(report: Report) -> list[Alert]:
    """What each file wants on the first screen."""
    return [alert for module in modules() for alert in module.alerts(report)]


def compared(runs: Sequence[Run]) -> list[Section]:
    """What each file has to show of several runs side by side."""
    made = (module.compare(runs) for module in modules() if hasattr(module, "compare"))
    return [section for section in made if section is not None]
