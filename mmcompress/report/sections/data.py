"""Where model and data come from, under what licences, and what the splits of the data have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from mmcompress.report.alerts import Alert
from mmcompress.report.format import MISSING, seconds_text
from mmcompress.report.schema import Report
from mmcompress.report.schema_data import UNKNOWN, Leaks, Origin, Overlap
from mmcompress.report.sections import Section
from mmcompress.report.tables import Cell, Table
from mmcompress.report.views import escape_markdown, html_table, markdown_table, text_table
from mmcompress.report.words import leak_words

ORDER = 90
ANCHOR = "data"
SAID_BY = {
    "recipe": "as the recipe says",
    "card": "as its card says",
    "data set": "as the data set says",
    "mmcompress": "made here",
    UNKNOWN: "",
}


def section(report: Report, folder: Path | None) -> Section | None:
    """Licences and overlaps; None in reports of versions that looked for neither."""
    tables = [table for table in (origins_table(report.origins), _overlaps(report.leaks)) if table is not None]
    if not tables:
        return None
    said = _words(report.leaks)
    html = Markup("").join(Markup("<h3>{}</h3>").format(t.caption) + html_table(t, (1,)) for t in tables)
    html += Markup("<p>{}</p>").format(said) if said else Markup("")
    markdown = [f"#### {t.caption}\n\n{markdown_table(t)}" for t in tables] + ([escape_markdown(said)] if said else [])
    text = [f"{t.caption}\n{text_table(t, range(4))}" for t in tables] + ([said] if said else [])
    return Section(ANCHOR, "Data and licences", html, "\n\n".join(markdown), "\n\n".join(text))


def alerts(report: Report) -> list[Alert]:
    """Pictures that training has seen with other questions; leaks stand before everything else (``report/words.py``)."""
    if report.leaks is None:
        return []
    what = report.leaks.what
    return [
        Alert(
            "caution",
            f"{pair.same_media:,} of {pair.n:,} evaluation questions are about {what}s that data.{pair.first} has other "
            "questions to: a model may know them.",
        )
        for pair in report.leaks.pairs
        if pair.second == "eval" and pair.same_media
    ]


def origins_table(origins: Sequence[Origin]) -> Table | None:
    """A line for each model and each split; None where nothing was recorded."""
    if not origins:
        return None
    columns = (("", "What"), ("", "Name"), ("", "Examples"), ("", "Licence"), ("", "From"))
    body = tuple(
        (
            Cell(origin.role if origin.examples is None else f"data.{origin.role}"),
            Cell(origin.name or MISSING),
            Cell(MISSING if origin.examples is None else f"{origin.examples:,}"),
            Cell(origin.license, tuple(filter(None, (SAID_BY[origin.license_from], origin.license_link or "")))),
            Cell(origin.source),
        )
        for origin in origins
    )
    note = "Unknown: neither the recipe nor a card or the data itself says it."
    return Table("origins", "Models and data", columns, body, heads=1, words=(0, 1, 3, 4), note=note)


def _overlaps(leaks: Leaks | None) -> Table | None:
    if leaks is None or not leaks.pairs:
        return None
    columns = (("", "Of"), ("", "also in"), ("", "Examples"), ("", "of them as other bytes"), ("", "Rows"))
    body = tuple(
        (Cell(f"data.{pair.second}"), Cell(f"data.{pair.first}"), _count(pair), Cell(f"{pair.reencoded:,}"), Cell(_rows(pair)))
        for pair in leaks.pairs
    )
    return Table("overlaps", "What the splits have in common", columns, body, heads=2, words=(0, 1, 4))


def _count(pair: Overlap) -> Cell:
    small = ("drawn from it",) if pair.drawn else ()
    return Cell(f"{pair.examples:,} of {pair.n:,}", small, "bad" if pair.is_leak else "")


def _rows(pair: Overlap) -> str:
    if not pair.second_rows:
        return MISSING
    more = ", ..." if pair.examples > len(pair.second_rows) else ""
    return f"{', '.join(map(str, pair.second_rows))}{more} are {', '.join(map(str, pair.first_rows))}{more} there"


def _words(leaks: Leaks | None) -> str:
    if leaks is None or (leaks.looked and not leaks.pairs):
        return ""  # there is one split only
    if not leaks.looked:
        return "Duplicates were not looked for: data that mmcompress makes has other scenes and sentences in each split."
    compared = {"picture": "pixel for pixel", "recording": "sample for sample", "text": "normalised"}[leaks.what]
    said = f"{leaks.what.capitalize()}s of all splits were compared {compared} before anything was trained"
    said += f", {leaks.decoded:,} of them decoded for it, in {seconds_text(leaks.seconds)}."
    if not leak_words(leaks):
        said += " No evaluation example is in training or calibration data."
    if leaks.repeated:
        said += f" {leaks.repeated:,} evaluation examples stand more than once; intervals count equal {leaks.what}s together."
    return said
