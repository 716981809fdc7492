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
    MISSING,
    RUNTIMES,
    SAME_SHARE,
    MetricFormat,
    baseline_row,
    batches,
    bytes_scale,
    count_scale,
    faster,
    final_row,
    flat,
    metric_format,
    ms_scale,
    plain,
    seconds_text,
    smaller,
    speed_verdict,
)
from mmcompress.report.paired import Scored, pair
from mmcompress.report.schema import Report, Row
from mmcompress.report.tables import Cell, Table
from mmcompress.report.text import WIDTH
from mmcompress.report.views import text_grid, text_table

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
    headline: str = ""


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
    headline = _headline(entries, metric, shared)
    return Comparison(tuple(entries), metric, shared, tuple(_warnings(entries, metric, shared)), headline)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _headline(entries: Sequence[Entry], metric: str, shared: Sequence[str]) -> str:
    """Which run is the smallest, the fastest and the best, in one sentence."""
    many = f"{len(entries)} run{'s' * (len(entries) != 1)} side by side: {', '.join(e.name for e in entries)}"
    known = [(e, e.final) for e in entries if e.final is not None]
    if len(entries) < 2 or len(known) < len(entries):
        return many
    smallest, size = min(((e, row.disk_bytes) for e, row in known), key=lambda item: item[1])
    said = [(smallest.name, f"is the smallest ({bytes_scale([size])(size)})")]
    if shared and all(shared[0] in row.latency_ms and not _busy(e) for e, row in known):
        quickest, row = min(known, key=lambda item: item[1].latency_ms[shared[0]].p50)
        time, others = row.latency_ms[shared[0]], [r.latency_ms[shared[0]] for e, r in known if e is not quickest]
        if all(speed_verdict(other, time) == "faster" for other in others):
            said.append((quickest.name, f"the fastest at batch {shared[0]} ({ms_scale([time.p50])(time.p50)})"))
    words = ""
    for i, (name, what) in enumerate(said):
        words += f"{name} {what}" if i == 0 else f" and {what}" if name == said[0][0] else f", {name} {what}"
    if metric and all(metric in row.quality for _, row in known):
        fmt = metric_format(known[0][0].report, metric)
        each = ", ".join(f"{fmt.value(row.quality[metric].value)} in {e.name}" for e, row in known)
        words += f"; {metric} is {each}"
    return f"Of {len(entries)} runs, {words}."


def _warnings(entries: Sequence[Entry], metric: str, shared: Sequence[str]) -> list[str]:
    found = [f"{e.name} is not finished: its last step so far is shown." for e in entries if not e.report.totals.finished]
    found += [f"{e.name} is synthetic: its numbers say nothing about real data." for e in entries if e.report.totals.synthetic]
    found += [
        f"{e.name}: other programs kept the machine busy while it was timed; its times are not to be trusted."
        for e in entries
        if _busy(e)
    ]
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


def _busy(entry: Entry) -> bool:
    return any(row is not None and row.disturbed for row in (entry.baseline, entry.final))


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
    note = "Intervals are 95%. The differences here are each run's own, to its own baseline."
    return Table(
        "comparison",
        "Final models, each against its own baseline in PyTorch",
        tuple(columns),
        tuple(body),
        heads=1,
        words=(0, 1),
        note=note,
    )


def differences_table(comparison: Comparison) -> Table | None:
    """Every other run's final model against the first run's, on the same examples; None with a single run."""
    if len(comparison.entries) < 2:
        return None
    first, *others = comparison.entries
    body, reasons = [], []
    for entry in others:
        found = pair(_scored(first), _scored(entry))
        if found.reason:
            reasons.append(f"{entry.name} cannot be paired with {first.name}: {found.reason}.")
        for metric, change in found.changes.items():
            fmt = metric_format(entry.report, metric)
            title = f"{metric} ({fmt.direction})" if fmt.direction else metric
            tone = {"worse": "bad", "better": "good"}.get(change.verdict, "")
            body.append(
                (
                    Cell(entry.name),
                    Cell(title),
                    Cell(fmt.change(change), tone=tone),
                    Cell(fmt.change_interval(change)),
                    Cell(f"{change.won:,}"),
                    Cell(f"{change.lost:,}"),
                    Cell(f"{change.n:,}"),
                    Cell(change.verdict),
                )
            )
        if found.left_out:
            reasons.append(f"{', '.join(found.left_out)}: a number over all examples, not paired between runs.")
    titles = ("Run", "Metric", "Difference", "95% interval", "Won", "Lost", "Examples", "Verdict")
    note = f"Each run's final model minus {first.name}'s, paired on the same examples. " if body else ""
    return Table(
        "differences",
        f"Against {first.name}, on the same examples" if body else f"Against {first.name}",
        tuple(("", title) for title in titles),
        tuple(body),
        heads=1,
        words=(0, 1, 7),
        note=note + " ".join(dict.fromkeys(reasons)),
    )


def _scored(entry: Entry) -> Scored:
    return Scored(entry.report, entry.baseline, entry.final, entry.folder)


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
    small: tuple[str, ...] = (f"from {ms.bare(before.p50)}",) if before else ()
    if _busy(entry):
        return Cell(ms.bare(after.p50), (*small, "not to be trusted"))
    verdict = speed_verdict(before, after)
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
    lines = [textwrap.fill(comparison.headline, width), text, textwrap.fill(table.note, width)]
    between = differences_table(comparison)
    if between is not None:
        if between.rows:
            lines.append(f"{between.caption}\n{text_table(between)}")
        lines.append(textwrap.fill(between.note, width))
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
