"""The report's tables, one source for Markdown and HTML so that both hold the same facts; the report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import yaml

from mmcompress.report.decided import KEYS, auto_table, rounds_table
from mmcompress.report.format import (
    BASELINE,
    MISSING,
    RUNTIMES,
    MetricFormat,
    Scale,
    baseline_row,
    batches,
    bytes_scale,
    count_scale,
    faster,
    fill_template,
    final_row,
    flat,
    flops_scale,
    headline_metric,
    metric_format,
    ms_scale,
    ms_scale_of,
    plain,
    row_name,
    seconds_text,
    smaller,
    speed_verdict,
    speeds,
)
from mmcompress.report.reproduce import reproduce
from mmcompress.report.schema import ClassScore, Report, Row
from mmcompress.report.sections import all_sections
from mmcompress.report.summary import summary_table
from mmcompress.report.tables import Cell, Table
from mmcompress.report.text import SYNTHETIC, bad_news, chips, gate_words, speed_words
from mmcompress.report.views import escape_markdown, fence, markdown_table
from mmcompress.report.waterfall import row_tags

WORST = 5
MARKS = {"good": "✅", "bad": "❌", "caution": "⚠️", "neutral": "•"}
SHOWN_ALERTS = 5
"""More than these, without the bad ones, stand in a fold."""


def results_table(report: Report) -> Table:
    """A line for each step and runtime with everything that was measured on the whole model."""
    rows, baseline = report.rows, baseline_row(report)
    counts, sizes = count_scale(r.parameters for r in rows), bytes_scale(r.disk_bytes for r in rows)
    operations, memory = flops_scale(r.flops for r in rows), bytes_scale(r.peak_memory_bytes for r in rows)
    metric = headline_metric(report)
    columns = [
        ("", "Step"),
        ("", "Runtime and weights"),
        ("", "Parameters"),
        ("", "Disk"),
        ("", "FLOPs"),
        ("", "Peak memory"),
    ]
    columns += [("Latency, ms: median (p90, p99)", f"batch {b}") for b in batches(report)]
    columns += [(_title(report, metric), part) for part in ("value, 95% interval", "difference to baseline")] if metric else []
    columns += [("", "Took")]
    body = []
    for row in rows:
        line = [
            Cell(row.step, tags=row_tags(report, row)),
            Cell(RUNTIMES[row.runtime], (row.precision,)),
            _ratio_cell(counts, row.parameters, baseline.parameters if baseline else None, row is baseline),
            _ratio_cell(sizes, row.disk_bytes, baseline.disk_bytes if baseline else None, row is baseline),
            _ratio_cell(operations, row.flops, baseline.flops if baseline else None, row is baseline),
            _ratio_cell(memory, row.peak_memory_bytes, baseline.peak_memory_bytes if baseline else None, row is baseline, 1.05),
        ]
        line += [_latency_cell(report, row, b) for b in batches(report)]
        if metric:
            fmt = metric_format(report, metric)
            line += [_quality_cell(fmt, row), _change_cell(fmt, row)]
        line.append(Cell(seconds_text(row.seconds) if row.seconds else MISSING))
        body.append(tuple(line))
    note = "Small print in a cell is against the baseline in PyTorch. Differences are paired: the same examples in both models."
    return Table("results", "All models that were measured", tuple(columns), tuple(body), heads=1, words=(0, 1), note=note)


def _title(report: Report, metric: str) -> str:
    """The metric's name, and its direction where it is not the one that readers take for granted."""
    direction = metric_format(report, metric).direction
    return f"{metric} ({direction})" if direction else metric


def _ratio_cell(scale: Scale, value: int | None, before: int | None, is_baseline: bool = False, bad: float = 1.02) -> Cell:
    # A process's memory varies by itself: a per cent more there is no bad news.
    if value is None or before is None or before == 0 or is_baseline:
        return Cell(scale(value))
    ratio = value / before
    return Cell(scale(value), (smaller(ratio, "less", "more"),), "bad" if ratio > bad else "")


def _latency_cell(report: Report, row: Row, batch: str) -> Cell:
    found, baseline, ms = row.latency_ms.get(batch), baseline_row(report), ms_scale_of(report, batch)
    if found is None:
        return Cell(MISSING)
    small = [f"{name} {ms.bare(value)}" for name, value in (("p90", found.p90), ("p99", found.p99)) if value is not None]
    before = baseline.latency_ms.get(batch) if baseline and row is not baseline else None
    verdict = speed_verdict(before, found)
    if before and found.p50 > 0:
        small.append("no clear difference" if verdict == "no clear difference" else faster(before.p50 / found.p50))
    return Cell(ms.bare(found.p50), tuple(small), "bad" if verdict == "slower" else "")


def _quality_cell(fmt: MetricFormat, row: Row) -> Cell:
    found = row.quality.get(fmt.name)
    return Cell(fmt.value(found.value), (fmt.interval(found), f"n = {found.n:,}")) if found else Cell(MISSING)


def _change_cell(fmt: MetricFormat, row: Row) -> Cell:
    found = row.change.get(fmt.name)
    if found is None:
        return Cell(MISSING)
    tone = {"worse": "bad", "better": "good"}.get(found.verdict, "")
    return Cell(fmt.change(found), (fmt.change_interval(found), f"{found.won} won, {found.lost} lost", found.words), tone)


def metrics_table(report: Report) -> Table | None:
    """The metrics beside the headline one, which the main table holds; None where there is no other."""
    names = dict.fromkeys([*report.metrics, *(m for row in report.rows for m in row.quality)])
    names.pop(headline_metric(report), None)
    formats = [metric_format(report, m) for m in names if any(m in row.quality for row in report.rows)]
    if not formats:
        return None
    columns = [("", "Step"), ("", "Runtime")]
    columns += [(_title(report, f.name), part) for f in formats for part in ("value", "difference")]
    body = []
    for row in report.rows:
        line = [Cell(row.step, tags=row_tags(report, row)), Cell(RUNTIMES[row.runtime])]
        for fmt in formats:
            line += [_quality_cell(fmt, row), _change_cell(fmt, row)]
        body.append(tuple(line))
    note = "; ".join(f"{name}: {text.rstrip('.')}" for name, text in report.metrics.items())
    return Table("metrics", "Metrics beside the headline one", tuple(columns), tuple(body), heads=1, words=(0, 1), note=note)


def towers_table(report: Report) -> Table | None:
    """Each tower of each row; None where none was measured by itself."""
    names = list(dict.fromkeys(name for row in report.rows for name in row.components))
    parts = [(name, row, row.components[name]) for name in names for row in report.rows if name in row.components]
    if not parts:
        return None
    counts, sizes = count_scale(c.parameters for *_, c in parts), bytes_scale(c.disk_bytes for *_, c in parts)
    operations = flops_scale(c.flops for *_, c in parts)
    sizes_of_batch = sorted({b for *_, c in parts for b in c.latency_ms}, key=batches(report).index)
    ms = {b: ms_scale(c.latency_ms[b].p50 for *_, c in parts if b in c.latency_ms) for b in sizes_of_batch}
    columns = [("", "Tower"), ("", "Step"), ("", "Runtime"), ("", "Parameters"), ("", "Disk"), ("", "FLOPs")]
    columns += [("Median latency, ms", f"batch {b}") for b in sizes_of_batch]
    body = []
    for name, row, part in parts:
        base = baseline_row(report)
        first = base.components.get(name) if base else None
        line = [
            Cell(name), Cell(row.step, tags=row_tags(report, row)), Cell(RUNTIMES[row.runtime]),
            _ratio_cell(counts, part.parameters, first.parameters if first else None, part is first),
            _ratio_cell(sizes, part.disk_bytes, first.disk_bytes if first else None, part is first),
            _ratio_cell(operations, part.flops, first.flops if first else None, part is first),
        ]  # fmt: skip
        for batch in sizes_of_batch:
            found = part.latency_ms.get(batch)
            before = first.latency_ms.get(batch) if first and part is not first else None
            small = (faster(before.p50 / found.p50),) if before and found and found.p50 > 0 else ()
            line.append(
                Cell(
                    ms[batch].bare(found.p50 if found else None),
                    small,
                    "bad" if speed_verdict(before, found) == "slower" else "",
                )
            )
        body.append(tuple(line))
    return Table("towers", "Each tower by itself", tuple(columns), tuple(body), heads=2, words=(0, 1, 2))


def parity_table(report: Report) -> Table | None:
    """How far exported files are from torch; None where nothing was exported."""
    body = [
        (Cell(row.step, tags=row_tags(report, row)), Cell(RUNTIMES[row.runtime], (row.precision,)), Cell(name),
         Cell(f"{found.max_abs_difference:.2g}"), Cell(_cosine(found.min_cosine)), Cell(f"{found.n:,}"))
        for row in report.rows for name, found in row.parity.items()
    ]  # fmt: skip
    columns = (
        ("", "Step"),
        ("", "Runtime and weights"),
        ("", "Component"),
        ("", "Largest difference"),
        ("", "Smallest cosine"),
        ("", "Examples"),
    )
    note = "Outputs of the exported file against the same model's in PyTorch on the same real examples; 1 is the best cosine."
    return Table("parity", "Exported files against PyTorch", columns, tuple(body), words=(0, 1, 2), note=note) if body else None


def _cosine(value: float) -> str:
    # Seven nines must not be rounded to a perfect score.
    text = f"{value:.7f}"
    return "> 0.9999999" if value < 1 and text == "1.0000000" else text


def classes_table(report: Report) -> Table | None:
    """The classes that lost most recall; None where classes were not scored on both models."""
    baseline, final = baseline_row(report), final_row(report)
    # Not every runtime's row has its classes scored; any of the final step tells the same story.
    final = next((r for r in (final, *report.rows) if r and final and r.step == final.step and r.classes), None)
    if baseline is None or final is None:
        return None
    pairs = [(name, score, final.classes[name]) for name, score in baseline.classes.items() if name in final.classes]
    known = [(b.recall - a.recall, name, a, b) for name, a, b in pairs if a.recall is not None and b.recall is not None]
    if not known:
        return None
    known.sort(key=lambda found: found[0])
    worst = [found for found in known if found[0] < 0][:WORST]
    # Where none lost, the ones that are worst off all the same.
    shown = worst or sorted(known, key=lambda found: found[3].recall or 0.0)[:WORST]
    body = tuple(_class_line(*found) for found in shown)
    lost, won = sum(d < 0 for d, *_ in known), sum(d > 0 for d, *_ in known)
    note = (
        f"Of {len(known):,} classes {lost:,} lost recall and {won:,} gained. These are picked as the worst: "
        "with few examples a class some of them land here by chance."
    )
    columns = (("", "Class"), ("", "Recall change"), ("", "Recall before"), ("", "Recall after"), ("", "Precision before"),
               ("", "Precision after"), ("", "Examples"))  # fmt: skip
    what = f"The {len(body)} classes that lost most recall" if worst else "No class lost recall; the ones with the least"
    caption = f"{what}: {row_name(final)} against the baseline"
    return Table("classes", caption, columns, body, heads=1, words=(0,), note=note)


def _class_line(difference: float, name: str, before: ClassScore, after: ClassScore) -> tuple[Cell, ...]:
    share = MetricFormat("recall", "percent", 1, True)
    right = [f"{round((score.recall or 0) * score.n)} of {score.n}" for score in (before, after)]
    return (
        Cell(name),
        Cell(f"{share.signed(difference)} points", tone="bad" if difference < 0 else ""),
        Cell(share.value(before.recall), (right[0],)),
        Cell(share.value(after.recall), (right[1],)),
        Cell(share.value(before.precision)),
        Cell(share.value(after.precision)),
        Cell(f"{after.n:,}"),
    )


def cost_table(report: Report) -> Table | None:
    """What each step took and did; None where there is no step yet."""
    steps: dict[str, list[Row]] = {}
    for row in report.rows:
        steps.setdefault(row.step, []).append(row)
    body = []
    for step, rows in steps.items():
        if step == BASELINE and not any(r.seconds or r.facts for r in rows):
            continue
        first = max(rows, key=lambda r: (bool(r.facts or r.settings or r.result), r.seconds))
        seconds = max(r.seconds for r in rows)
        name = Cell(step, tags=("rolled back",) if first.rolled_back else ())
        did = {key: value for key, value in first.result.items() if key not in KEYS}
        words = (plain(first.facts), plain(first.settings), plain(did), first.folder or MISSING)
        body.append((name, Cell(seconds_text(seconds) if seconds else MISSING), *(Cell(text) for text in words)))
    columns = (("", "Step"), ("", "Took"), ("", "Cost"), ("", "Settings"), ("", "What it did"), ("", "Folder"))
    total = (
        f"All steps together: {seconds_text(report.totals.seconds)}. Measuring is not counted." if report.totals.seconds else ""
    )
    return (
        Table("cost", "What each step cost and did", columns, tuple(body), heads=1, words=(0, 2, 3, 4, 5), note=total)
        if body
        else None
    )


def environment_table(report: Report) -> Table | None:
    """The machine and the versions."""
    body = tuple((Cell(key), Cell(value)) for key, value in flat(report.environment))
    return Table("environment", "Where it was measured", (("", "What"), ("", "Value")), body, words=(0, 1)) if body else None


def all_tables(report: Report) -> dict[str, Table]:
    """The tables that have something to show, by key."""
    made = (results_table(report) if report.rows else None, metrics_table(report), towers_table(report), parity_table(report),
            classes_table(report), auto_table(report), rounds_table(report), cost_table(report),
            environment_table(report))  # fmt: skip
    return {table.key: table for table in made if table is not None}


def recipe_yaml(report: Report) -> str:
    """The resolved recipe as a user would write it."""
    return yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=110)


def render_markdown(report: Report, folder: Path | None = None) -> str:
    """The report for pull requests: headline, what speaks against it, one table; the rest of the page's facts in folds."""
    alerts = bad_news(report)
    values = {
        "report": report,
        "chips": chips(report),
        "alerts": alerts,
        "gates": gate_words(report),
        "speeds": [speed_words(report, s) for s in speeds(report) if s.ratio is not None],
        "tables": all_tables(report),
        "sections": [s for s in all_sections(report, folder) if s.markdown],
        "notes": [(row_name(row), row.notes) for row in report.rows if row.notes],
        "recipe": recipe_yaml(report),
        "synthetic": SYNTHETIC,
        "summary": summary_table(report),
        "again": reproduce(report, folder),
        "marks": MARKS,
        "most": max(SHOWN_ALERTS, sum(a.tone == "bad" for a in alerts)),
    }
    filters: dict[str, Callable[..., str]] = {"md": escape_markdown, "table": markdown_table, "fence": fence}
    return re.sub(r"\n{3,}", "\n\n", fill_template("report.md.j2", filters, values)).strip() + "\n"
