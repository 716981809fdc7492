"""The one table that sums a run up: baseline, final model, and what came of it."""

from __future__ import annotations

from mmcompress.report.format import (
    MISSING,
    RUNTIMES,
    Scale,
    baseline_row,
    batches,
    bytes_scale,
    count_scale,
    faster,
    final_row,
    flops_scale,
    headline_metric,
    metric_format,
    ms_scale_of,
    smaller,
    speed_verdict,
    speeds,
)
from mmcompress.report.schema import Report, Row
from mmcompress.report.tables import Cell, Table
from mmcompress.report.words import change_tone


def summary_table(report: Report) -> Table | None:
    """A line for each measure; None before there is a compressed model."""
    baseline, final = baseline_row(report), final_row(report)
    if baseline is None or final is None:
        return None
    lines, known = _sizes(report, baseline, final), {speed.batch: speed for speed in speeds(report)}
    for batch in batches(report):
        before, after = baseline.latency_ms.get(batch), final.latency_ms.get(batch)
        if before is None or after is None or after.p50 <= 0:
            continue
        ms, speed = ms_scale_of(report, batch), known.get(batch)
        verdict = speed.verdict if speed else speed_verdict(before, after)
        ratio = speed.ratio if speed and speed.ratio else before.p50 / after.p50
        did = faster(ratio) if verdict != "no clear difference" else verdict
        if baseline.disturbed or final.disturbed:
            did, verdict = "not known: the machine was busy", ""
        tone = {"faster": "good", "slower": "bad"}.get(verdict, "")
        lines.append((Cell(f"Median latency, batch {batch}"), Cell(ms(before.p50)), Cell(ms(after.p50)), Cell(did, tone=tone)))
    headline = headline_metric(report)
    for metric in sorted(final.quality, key=lambda name: name != headline):
        lines.append(_quality(report, baseline, final, metric))
    columns = (("", ""), ("", f"Baseline, {_what(baseline)}"), ("", f"{final.step}, {_what(final)}"), ("", "Change"))
    caption = "Baseline and final model" if report.totals.finished else "Baseline and the last step so far"
    return Table("summary", caption, columns, tuple(lines), heads=1, words=(0, 3))


def _what(row: Row) -> str:
    return RUNTIMES[row.runtime] + ("" if row.precision == "float32" else f" {row.precision}")


def _sizes(report: Report, baseline: Row, final: Row) -> list[tuple[Cell, ...]]:
    asked: list[tuple[str, str, Scale]] = [
        ("Parameters", "parameters", count_scale(r.parameters for r in report.rows)),
        ("Size on disk", "disk_bytes", bytes_scale(r.disk_bytes for r in report.rows)),
        ("Operations for one example", "flops", flops_scale(r.flops for r in report.rows)),
        ("Peak memory", "peak_memory_bytes", bytes_scale(r.peak_memory_bytes for r in report.rows)),
    ]
    lines: list[tuple[Cell, ...]] = []
    for title, name, scale in asked:
        before, after = getattr(baseline, name), getattr(final, name)
        if before and after is not None:
            lines.append((Cell(title), Cell(scale(before)), Cell(scale(after)), Cell(smaller(after / before, "less", "more"))))
    return lines


def _quality(report: Report, baseline: Row, final: Row, metric: str) -> tuple[Cell, ...]:
    fmt, before, after = metric_format(report, metric), baseline.quality.get(metric), final.quality[metric]
    change = final.change.get(metric)
    title = f"{metric} ({fmt.direction})" if fmt.direction else metric
    cell = Cell(MISSING)
    if change is not None:
        small = (f"95% interval {fmt.change_interval(change)}", f"{change.won:,} won, {change.lost:,} lost", change.words)
        cell = Cell(fmt.change(change), small, change_tone(change))
    return (
        Cell(title, (f"n = {after.n:,}",)),
        Cell(fmt.value(before.value) if before else MISSING),
        Cell(fmt.value(after.value)),
        cell,
    )
