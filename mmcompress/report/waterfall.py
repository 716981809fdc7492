"""What each step changed: one small waterfall each of parameters, disk, latency and quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mmcompress.report.bars import interval_bar, value_bar
from mmcompress.report.format import (
    BASELINE,
    MISSING,
    RUNTIMES,
    SAME_SHARE,
    Scale,
    baseline_row,
    batches,
    bytes_scale,
    count_scale,
    faster,
    final_row,
    metric_format,
    ms_scale_of,
    smaller,
    speed_verdict,
)
from mmcompress.report.schema import Change, Report, Row
from mmcompress.report.tables import Cell

SERIES = {"torch": 0, "onnxruntime": 1, "openvino": 2}
"""The colour of each runtime, in all pictures."""


@dataclass(frozen=True)
class Fall:
    """One step of a waterfall: what there is after it, and what it did."""

    step: Cell
    runtime: str
    bar: Markup
    value: str
    did: str
    tone: str


@dataclass(frozen=True)
class Waterfall:
    """All steps by one measure."""

    key: str
    title: str
    note: str
    falls: tuple[Fall, ...]


def row_tags(report: Report, row: Row) -> tuple[str, ...]:
    """What must be said about a row beside its name."""
    tags = []
    if row is final_row(report) and row.step != BASELINE:
        tags.append("final" if report.totals.finished else "last so far")
    if row.rolled_back:
        tags.append("rolled back")
    return tuple(tags)


def waterfalls(report: Report, metric: str) -> list[Waterfall]:
    """The waterfalls that have something to show; none before there is a step."""
    rows = _one_each(report)
    if len(rows) < 2:
        return []
    counts, sizes = count_scale(r.parameters for r in report.rows), bytes_scale(r.disk_bytes for r in report.rows)
    made = [
        _sizes(report, rows, "parameters", "Parameters", counts, lambda row: row.parameters),
        _sizes(report, rows, "disk", "Size on disk", sizes, lambda row: row.disk_bytes),
    ]
    batch = next((b for b in batches(report) if sum(b in row.latency_ms for row in report.rows) > 1), "")
    if batch:
        made.append(_latencies(report, batch))
    if sum(metric in row.quality for row in rows) > 1:
        made.append(_quality(report, rows, metric))
    return made


def _one_each(report: Report) -> list[Row]:
    """A row for each step: the final model's as it ships, the others' in torch, or else in what they were measured in."""
    shown: dict[str, Row] = {}
    for row in report.rows:
        if row.step not in shown or (row.runtime == "torch" and shown[row.step].runtime != "torch"):
            shown[row.step] = row
    final = final_row(report)
    if final is not None:
        shown[final.step] = final
    return list(shown.values())


def _fall(report: Report, row: Row, bar: Markup, value: str, did: str, tone: str = "") -> Fall:
    weights = "" if row.precision == "float32" else f", {row.precision}"
    return Fall(Cell(row.step, tags=row_tags(report, row)), f"{RUNTIMES[row.runtime]}{weights}", bar, value, did, tone)


def _sizes(report: Report, rows: Sequence[Row], key: str, title: str, scale: Scale, ask: Callable[[Row], int]) -> Waterfall:
    full, falls = max(ask(row) for row in rows), list[Fall]()
    before: int | None = None
    for row in rows:
        value = ask(row)
        ratio = value / before if before else None
        tone = "" if ratio is None or abs(ratio - 1) < SAME_SHARE else "good" if ratio < 1 else "bad"
        bar = value_bar(value, full, before, SERIES[row.runtime])
        falls.append(_fall(report, row, bar, scale(value), "" if ratio is None else smaller(ratio, "less", "more"), tone))
        if not row.rolled_back:
            before = value  # a step that was undone is nothing to build on
    return Waterfall(key, title, "Dashed: what the step took away. Red: what it added.", tuple(falls))


def _latencies(report: Report, batch: str) -> Waterfall:
    """The way from the baseline in torch to the final model.

    Where every step was timed in the final model's runtime, the way leads through the baseline there, so that the runtime's own
    share is a step of its own; else the steps are those in torch, and the last one holds the runtime's share too.
    """
    final, baseline = final_row(report), baseline_row(report)
    wanted = final.runtime if final else "torch"
    by_step: dict[str, dict[str, Row]] = {}
    for row in report.rows:
        if batch in row.latency_ms:
            by_step.setdefault(row.step, {})[row.runtime] = row
    rows = [baseline] if baseline is not None and batch in baseline.latency_ms else []
    apart = all(wanted in found for found in by_step.values())
    for step, found in by_step.items():
        first = wanted if apart or (final and step == final.step) else "torch"
        row = found.get(first) or found.get(wanted) or next(iter(found.values()))
        if row not in rows:
            rows.append(row)
    ms, full = ms_scale_of(report, batch), max(row.latency_ms[batch].p50 for row in rows)
    busy = any(row.disturbed for row in rows)
    falls: list[Fall] = []
    before: Row | None = None
    for row in rows:
        now = row.latency_ms[batch]
        was = before.latency_ms[batch] if before is not None else None
        did, tone = "", ""
        if was is not None and now.p50 > 0:
            verdict = speed_verdict(was, now)
            did = verdict if verdict == "no clear difference" else faster(was.p50 / now.p50)
            tone = "" if busy else {"faster": "good", "slower": "bad"}.get(verdict, "")
            if before is not None and row.same_files_as == before.step and row.runtime == before.runtime:
                did, tone = "the same files", ""
        bar = value_bar(now.p50, full, was.p50 if was else None, SERIES[row.runtime])
        falls.append(_fall(report, row, bar, ms(now.p50), did, tone))
        before = before if row.rolled_back else row
    mixed = len({row.runtime for row in rows}) > 1
    note = "Medians."
    if mixed and apart:
        note += f" The first row in {RUNTIMES[wanted]} is the runtime's own share: nothing is compressed there."
    elif mixed:
        note += " The step at which the runtime changes holds the runtime's share too."
    if busy:
        note += " Other programs kept the machine busy: these times are not to be trusted."
    return Waterfall("latency", f"Latency at batch {batch}", note, tuple(falls))


def _quality(report: Report, rows: Sequence[Row], metric: str) -> Waterfall:
    fmt, final, baseline = metric_format(report, metric), final_row(report), baseline_row(report)
    changes = [row.change[metric] for row in rows if metric in row.change]
    span = change_span(changes, final.change.get(metric) if final else None)
    falls: list[Fall] = []
    before: Row | None = None
    for row in rows:
        change, quality = row.change.get(metric), row.quality.get(metric)
        last = before.change.get(metric) if before else None
        start = last.difference if last else 0.0 if before is not None and before is baseline else None
        bar, did = Markup(""), ""
        if change:
            bar = interval_bar(change.low, change.difference, change.high, span, start, fmt.higher_is_better)
            did = f"{fmt.signed(change.difference - start)} {fmt.unit}".rstrip() if start is not None else ""
        falls.append(_fall(report, row, bar, fmt.value(quality.value) if quality else MISSING, did))
        before = before if row.rolled_back else row
    direction = f" ({fmt.direction})" if fmt.direction else ""
    note = (
        "The dot is the paired difference to the baseline (upright line) with its 95% interval; an arrow is off the scale. What "
        "one step did is a difference of two such differences and has no interval of its own."
    )
    return Waterfall("quality", f"{metric}{direction}", note, tuple(falls))


def change_span(changes: Sequence[Change], main: Change | None) -> tuple[float, float]:
    """The axis for differences: zero, the final model's interval, and what lies not far outside.

    A model right after a cut may be so far off that it would squeeze all other rows to a point; it is put at the edge.
    """
    low, high = min(main.low if main else 0.0, 0.0), max(main.high if main else 0.0, 0.0)
    reach = 2.5 * (high - low)
    near = [c for c in changes if not main or low - reach <= c.difference <= high + reach]
    return min([low, *(c.low for c in near)]), max([high, *(c.high for c in near)])
