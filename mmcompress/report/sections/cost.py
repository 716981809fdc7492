"""What a run cost: time, energy, examples and steps of each step, and what the teacher's store and early stopping saved."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup, escape

from mmcompress.report.alerts import Alert
from mmcompress.report.format import BASELINE, MISSING, seconds_text
from mmcompress.report.schema import Report, Row
from mmcompress.report.sections import Section
from mmcompress.report.tables import Cell, Table
from mmcompress.report.views import escape_markdown, html_table, markdown_table, text_table

ORDER = 80


def alerts(report: Report) -> list[Alert]:
    """Nothing that must stand on the first screen."""
    return []


def section(report: Report, folder: Path | None) -> Section | None:
    """The table and the sentences; None before the first step is done."""
    steps = list({row.step: row for row in reversed(report.rows) if row.step != BASELINE}.values())[::-1]
    if not steps:
        return None
    tables = [table for table in (_steps(steps), _savings(steps)) if table is not None]
    words = [f"All steps together took {seconds_text(report.totals.seconds)}; measuring is not counted."]
    if any("joules" not in row.facts for row in steps):
        reasons = {str(row.facts["energy"]) for row in steps if "energy" in row.facts}
        words.append(f"Energy: not known; {'; '.join(sorted(reasons))}." if reasons else "Energy: not known for every step.")
    html = Markup("").join([*(html_table(t) for t in tables), *(Markup("<p>{}</p>").format(escape(w)) for w in words)])
    markdown = "\n\n".join([*(markdown_table(t) for t in tables), *(escape_markdown(w) for w in words)])
    return Section("cost", "What it cost", html, markdown, "\n\n".join([*(text_table(t) for t in tables), *words]))


def _steps(steps: list[Row]) -> Table:
    columns = (("", "step"), ("", "time"), ("", "energy, J"), ("", "training steps"), ("", "examples seen"), ("", "examples/s"))
    lines = [
        (
            Cell(row.step, tags=("rolled back",) if row.rolled_back else ()),
            Cell(seconds_text(row.seconds)),
            Cell(_count(row, "joules")),
            Cell(_count(row, "steps")),
            Cell(_count(row, "examples_seen")),
            Cell(_count(row, "examples_per_second")),
        )
        for row in steps
    ]
    return Table("cost-steps", "Each step", columns, tuple(lines))


def _count(row: Row, name: str) -> str:
    value = row.facts.get(name)
    return f"{value:,.0f}" if isinstance(value, int | float) else MISSING


def savings(row: Row) -> list[tuple[str, str, float, float]]:
    """For each data-efficiency option that a step used: its name, what it did, seconds without it (estimated) and with it."""
    facts, found = row.facts, []
    seconds = float(facts.get("seconds", row.seconds))
    if facts.get("teacher_cache_hits"):
        saved = float(facts.get("teacher_seconds_saved", 0.0))
        what = f"{facts['teacher_cache_hits']:,} answers were known, {facts['teacher_examples']:,} asked for"
        found.append(("the teacher's stored answers", what, seconds + saved, seconds))
    done, planned = facts.get("steps"), facts.get("planned_steps")
    if done and planned and done < planned:
        found.append(("early stopping", f"{done:,} of {planned:,} steps", seconds * planned / done, seconds))
    return found


def _savings(steps: list[Row]) -> Table | None:
    lines = [
        (Cell(row.step), Cell(name), Cell(what), Cell(seconds_text(before)), Cell(seconds_text(after)))
        for row in steps
        for name, what, before, after in savings(row)
    ]
    if not lines:
        return None
    columns = (("", "step"), ("", "option"), ("", "what it did"), ("training", "without it, about"), ("training", "with it"))
    note = "Without it: the time that was measured, with what the teacher took for an answer or a step took on average added."
    return Table("cost-savings", "What data-efficiency options saved", columns, tuple(lines), words=(1, 2), note=note)
