"""Any number of runs side by side: final models against their own baselines, and what forbids comparing them."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcompress.errors import UserError
from mmcompress.report.format import (
    BASELINE,
    MISSING,
    RUNTIMES,
    SAME_SHARE,
    MetricFormat,
    baseline_row,
    batches,
    bytes_scale,
    count_scale,
    faster,
    fill_template,
    final_row,
    flat,
    metric_format,
    ms_scale,
    plain,
    row_name,
    seconds_text,
    smaller,
    speed_verdict,
)
from mmcompress.report.html import SHAPES, axis_name
from mmcompress.report.plots import Axes, Point, marker, pareto_front, scatter
from mmcompress.report.schema import Report, Row
from mmcompress.report.sections import Run, compared
from mmcompress.report.tables import Cell, Table
from mmcompress.report.text import WIDTH
from mmcompress.report.views import html_filters, text_grid

PARTS = (("models", "Final models"), ("front", "What is worth choosing from"), ("words", "In their own words"))
_CLOCK = ("date", "time", "started", "finished", "hostname", "host", "folder", "path", "pid", "uptime", "load")
"""Words in environment keys that differ from run to run and say nothing about speed."""
DRIFT = 0.1
"""Baselines of one model whose medians differ by more than this share were not timed under equal conditions."""


@dataclass(frozen=True)
class Entry:
    """One run of a comparison."""

    name: str
    report: Report
    baseline: Row | None
    final: Row | None
    folder: Path | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        metric: the headline metric that all runs share, or an empty string.
        batches: the batch sizes that all runs timed, small ones first.
        warnings: why the runs, or some of their numbers, cannot be compared.
    """

    entries: tuple[Entry, ...]
    metric: str
    batches: tuple[str, ...]
    warnings: tuple[str, ...]


def compare_reports(reports: list[tuple[str, Report]], folders: Sequence[Path | None] = ()) -> Comparison:
    """Puts named reports side by side.

    Args:
        folders: the runs' folders in the same order, for what lies beside the reports; may be left out.

    Raises:
        UserError: there is no report.
    """
    if not reports:
        raise UserError("compare: name at least one run")
    entries, seen = [], dict[str, int]()
    places = [*folders, *[None] * (len(reports) - len(folders))]
    for (name, report), folder in zip(reports, places, strict=True):
        seen[name] = seen.get(name, 0) + 1
        unique = name if seen[name] == 1 else f"{name} ({seen[name]})"
        entries.append(Entry(unique, report, baseline_row(report), final_row(report), folder))
    measured = [{m for row in report.rows for m in row.quality} for _, report in reports]
    first = [reports[0][1].totals.metric, *reports[0][1].metrics, *sorted(measured[0])]
    metric = next((m for m in first if m and all(m in found for found in measured)), "")
    shared = tuple(b for b in batches(reports[0][1]) if all(b in batches(report) for _, report in reports))
    return Comparison(tuple(entries), metric, shared, tuple(_warnings(entries, metric, shared)))


def _warnings(entries: Sequence[Entry], metric: str, shared: Sequence[str]) -> list[str]:
    found = [f"{e.name} is not finished: its last step so far is shown." for e in entries if not e.report.totals.finished]
    found += [f"{e.name} is synthetic: its numbers say nothing about real data." for e in entries if e.report.totals.synthetic]
    if len(entries) < 2:
        return found
    asked: dict[str, Callable[[Report], Any]] = {
        "The model": lambda r: r.recipe.get("model"),
        "The task": lambda r: r.recipe.get("task"),
        "The evaluation data": lambda r: (r.recipe.get("data") or {}).get("eval"),
        "The headline metric": lambda r: r.totals.metric,
        "Which way metrics are better": lambda r: r.lower_is_better or None,
        "The number of evaluation examples": lambda r: max((q.n for row in r.rows for q in row.quality.values()), default=None),
        "The batch sizes": batches,
        "The threads": lambda r: (r.recipe.get("report") or {}).get("threads"),
    }
    for what, ask in asked.items():
        found += _differs(what, entries, {e.name: ask(e.report) for e in entries})
    environments = {e.name: dict(flat(e.report.environment)) for e in entries}
    for key in dict.fromkeys(key for values in environments.values() for key in values):
        if not any(word in key.lower().replace(".", "_").split("_") for word in _CLOCK):
            found += _differs(f"The environment's {key}", entries, {name: v.get(key) for name, v in environments.items()})
    if not metric:
        found.append("No metric was measured in all runs: quality cannot be compared.")
    return found + _drift(entries, metric, shared)


def _differs(what: str, entries: Sequence[Entry], values: Mapping[str, Any]) -> list[str]:
    groups: dict[str, tuple[Any, list[str]]] = {}
    for entry in entries:
        value = values[entry.name]
        groups.setdefault(json.dumps(value, sort_keys=True, default=str), (value, []))[1].append(entry.name)
    if len(groups) < 2:
        return []
    sides = [
        f"{_short(plain(value) if value is not None else 'not recorded')} ({', '.join(names)})"
        for value, names in groups.values()
    ]
    return [f"{what} differs: {'; '.join(sides)}."]


def _short(text: str) -> str:
    return text if len(text) <= 90 else text[:89] + "…"


def _drift(entries: Sequence[Entry], metric: str, shared: Sequence[str]) -> list[str]:
    """Baselines of the same model that were not measured to be the same: machine or data were not the same then."""
    groups: dict[str, list[tuple[Entry, Row]]] = {}
    for entry in entries:
        if entry.baseline is not None:
            groups.setdefault(json.dumps(entry.report.recipe.get("model"), default=str), []).append((entry, entry.baseline))
    found = []
    for members in groups.values():
        for batch in shared:
            timed = [(e.name, row.latency_ms[batch].p50) for e, row in members if batch in row.latency_ms]
            slowest, fastest = max((t for _, t in timed), default=0.0), min((t for _, t in timed), default=0.0)
            if fastest > 0 and slowest / fastest > 1 + DRIFT:
                ms = ms_scale(t for _, t in timed)
                each = ", ".join(f"{ms(t)} in {name}" for name, t in timed)
                found.append(
                    f"The same baseline at batch {batch} took {each}: they were not timed under equal conditions; "
                    "compare the ratios, not the milliseconds."
                )
        scored = [(e, row.quality[metric].value) for e, row in members if metric in row.quality]
        if scored and max(v for _, v in scored) - min(v for _, v in scored) > 1e-9:
            each = ", ".join(f"{metric_format(e.report, metric).value(v)} in {e.name}" for e, v in scored)
            found.append(f"The same baseline has a {metric} of {each}: they were not evaluated alike.")
    return found


def comparison_table(comparison: Comparison) -> Table:
    """A line a run: the final model, and in small print what it is against its own baseline."""
    rows = [row for e in comparison.entries for row in (e.baseline, e.final) if row]
    counts, sizes = count_scale(r.parameters for r in rows), bytes_scale(r.disk_bytes for r in rows)
    formats = {e.name: metric_format(e.report, comparison.metric) for e in comparison.entries}
    columns = [("", "Run"), ("", "Final model"), ("", "Parameters"), ("", "Disk")]
    columns += [("Median latency, ms", f"batch {b}") for b in comparison.batches]
    if comparison.metric:
        direction = formats[comparison.entries[0].name].direction
        title = f"{comparison.metric} ({direction})" if direction else comparison.metric
        columns += [(title, "value"), (title, "difference to baseline")]
    columns += [("", "Gates"), ("", "Steps took")]
    body = []
    for entry in comparison.entries:
        line = [Cell(entry.name, tags=_tags(entry)), _final_cell(entry)]
        for scale, name in ((counts, "parameters"), (sizes, "disk_bytes")):
            after, before = getattr(entry.final, name, None), getattr(entry.baseline, name, None)
            small = (f"from {scale(before)}", smaller(after / before, "less", "more")) if after is not None and before else ()
            line.append(Cell(scale(after), small, "bad" if after and before and after > before * (1 + SAME_SHARE) else ""))
        line += [_latency(comparison, entry, b) for b in comparison.batches]
        if comparison.metric:
            line += _quality(formats[entry.name], entry)
        line += [
            _gates(entry),
            Cell(seconds_text(entry.report.totals.seconds) if entry.report.totals.seconds else MISSING),
        ]
        body.append(tuple(line))
    note = "Intervals are 95%. Differences between runs are not paired: the examples of one are not matched to another's."
    return Table(
        "comparison",
        "Final models, each against its own baseline in PyTorch",
        tuple(columns),
        tuple(body),
        heads=1,
        words=(0, 1),
        note=note,
    )


def _tags(entry: Entry) -> tuple[str, ...]:
    totals = entry.report.totals
    return tuple(t for t, on in (("not finished", not totals.finished), ("synthetic", totals.synthetic)) if on)


def _final_cell(entry: Entry) -> Cell:
    return Cell(entry.final.step, (RUNTIMES[entry.final.runtime], entry.final.precision)) if entry.final else Cell("none yet")


def _latency(comparison: Comparison, entry: Entry, batch: str) -> Cell:
    known = [
        row.latency_ms[batch].p50 for e in comparison.entries for row in (e.baseline, e.final) if row and batch in row.latency_ms
    ]
    ms = ms_scale(known)
    before = entry.baseline.latency_ms.get(batch) if entry.baseline else None
    after = entry.final.latency_ms.get(batch) if entry.final else None
    if after is None:
        return Cell(MISSING)
    verdict = speed_verdict(before, after)
    small: tuple[str, ...] = (f"from {ms.bare(before.p50)}",) if before else ()
    if before and after.p50 > 0:
        small += (verdict if verdict == "no clear difference" else faster(before.p50 / after.p50),)
    return Cell(ms.bare(after.p50), small, "bad" if verdict == "slower" else "")


def _quality(fmt: MetricFormat, entry: Entry) -> list[Cell]:
    quality = entry.final.quality.get(fmt.name) if entry.final else None
    change = entry.final.change.get(fmt.name) if entry.final else None
    value = Cell(fmt.value(quality.value), (fmt.interval(quality), f"n = {quality.n:,}")) if quality else Cell(MISSING)
    if change is None:
        return [value, Cell(MISSING)]
    tone = {"worse": "bad", "better": "good"}.get(change.verdict, "")
    return [value, Cell(fmt.change(change), (fmt.change_interval(change), change.words), tone)]


def _gates(entry: Entry) -> Cell:
    gates = entry.report.gates
    counts = [(v, sum(g.verdict == v for g in gates)) for v in ("missed", "not shown", "met")]
    words = ", ".join(f"{n} {verdict}" for verdict, n in counts if n)
    return Cell(words or "none set", tone="bad" if counts[0][1] else "")


def _pictures(comparison: Comparison) -> list[tuple[Any, str, str]]:
    """(picture, caption, sentence about the front) against latency and against disk."""
    found = []
    batch = comparison.batches[0] if comparison.batches else ""
    unit = bytes_scale(r.disk_bytes for e in comparison.entries for r in e.report.rows)
    options: list[tuple[str, str, Callable[[Row], float | None]]] = [
        (
            "latency",
            f"median latency at batch {batch}, ms",
            lambda r: r.latency_ms[batch].p50 if batch in r.latency_ms else None,
        ),
        ("disk", f"disk, {unit.unit}", lambda r: r.disk_bytes / unit.divisor),
    ]
    for key, x_label, ask in options:
        points = _points(comparison, ask)
        if not comparison.metric or not points:
            continue
        fmt = metric_format(comparison.entries[0].report, comparison.metric)
        axes = Axes(f"{fmt.name} against {x_label}, all runs", "; ".join(p.tip for p in points), x_label, axis_name(fmt),
                    higher_is_better=fmt.higher_is_better)  # fmt: skip
        best = "; ".join(points[i].tip for i in pareto_front(points, fmt.higher_is_better))
        found.append((scatter(points, axes, f"compare-{key}", front=True), f"Beaten by no other model here: {best}.", key))
    return found


def _points(comparison: Comparison, ask: Callable[[Row], float | None]) -> list[Point]:
    points = []
    for i, entry in enumerate(comparison.entries):
        fmt = metric_format(entry.report, comparison.metric)
        scale = fmt.scale
        for row in entry.report.rows:
            quality, x = row.quality.get(comparison.metric), ask(row)
            if quality is None or x is None:
                continue
            last = row is entry.final
            points.append(Point(
                x=x, y=quality.value * scale, label=entry.name if last else "", series=i % 8, shape=SHAPES[row.runtime],
                y_interval=(quality.low * scale, quality.high * scale) if last or row is entry.baseline else None,
                hollow=row.step == BASELINE, ghost=row.rolled_back, strong=last,
                tip=f"{entry.name}, {row_name(row)}: {fmt.value(quality.value)} at {x:.3g}",
            ))  # fmt: skip
    return points


def render_compare_html(comparison: Comparison) -> str:
    """The comparison as one self-contained page."""
    used = {row.runtime for e in comparison.entries for row in e.report.rows}
    legend = [(marker("circle", i % 8), e.name) for i, e in enumerate(comparison.entries)]
    legend += [(marker(SHAPES[r], 8), name) for r, name in RUNTIMES.items() if r in used]
    legend.append((marker("circle", 8, "hollow"), "baseline (outline)"))
    if any(row.rolled_back for e in comparison.entries for row in e.report.rows):
        legend.append((marker("circle", 8, "ghost"), "rolled back (dashed)"))
    sections = compared([Run(e.name, e.report, e.folder) for e in comparison.entries])
    values = {
        "comparison": comparison,
        "table": comparison_table(comparison),
        "pictures": _pictures(comparison),
        "legend": legend,
        "contents": [*PARTS[:2], *((s.anchor, s.title) for s in sections), *PARTS[2:]],
        "sections": sections,
    }
    return fill_template("compare.html.j2", html_filters(), values)


def render_compare_text(comparison: Comparison, width: int | None = None) -> str:
    """The comparison for a terminal.

    Args:
        width: in characters, 110 where it is left out; all but the first batch size are left out where they do not fit.
    """
    width, table = width or WIDTH, comparison_table(comparison)
    show = [i for i, (_, title) in enumerate(table.columns) if title != "Steps took"]
    spare = [i for i in show if table.columns[i][1].startswith("batch")][1:]
    while max(map(len, (text := _grid(table, show)).splitlines())) > width and spare:
        show.remove(spare.pop())
    lines = [text, textwrap.fill(table.note, width)]
    if comparison.warnings:
        bullets = [
            textwrap.fill(w, width, initial_indent="! ", subsequent_indent="  ", break_on_hyphens=False)
            for w in comparison.warnings
        ]
        lines.append("Compare with care\n" + "\n".join(bullets))
    return "\n\n".join(lines) + "\n"


def _grid(table: Table, show: Sequence[int]) -> str:
    heads = [_head(*table.columns[i]) for i in show]
    body = [[_narrow(row[i]) for i in show] for row in table.rows]
    return text_grid(heads, body, [column for column, i in enumerate(show) if i in table.words])


def _head(group: str, title: str) -> str:
    words = {"difference to baseline": "difference", "value": ""}.get(title, title)
    return f"{words}, ms" if words.startswith("batch") else "\n".join(w for w in (group, words) if w)


def _narrow(cell: Cell) -> str:
    lines = [*cell.text.split(", "), *cell.small, *(f"[{tag}]" for tag in cell.tags)]
    return "\n".join(lines).replace("no clear difference", "no clear\ndifference")
