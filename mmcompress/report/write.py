"""Writes a report in all its forms."""

from __future__ import annotations

from pathlib import Path

from mmcompress.files import write_json, write_text
from mmcompress.report.card import render_card
from mmcompress.report.html import render_html
from mmcompress.report.markdown import render_markdown
from mmcompress.report.schema import Report


def write_report(report: Report, folder: Path) -> None:
    """``report.json``, ``report.html``, ``report.md`` and, of a finished run, the model card ``README.md``."""
    write_json(folder / "report.json", report.model_dump(mode="json"))
    write_text(folder / "report.html", render_html(report, folder))
    write_text(folder / "report.md", render_markdown(report, folder))
    if report.totals.finished:
        write_text(folder / "README.md", render_card(report))
