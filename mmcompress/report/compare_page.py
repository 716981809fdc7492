"""Any number of runs side by side as one HTML page that fetches nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmcompress.report.compare import Comparison, comparison_table, differences_table
from mmcompress.report.format import (
    BASELINE,
    MISSING,
    RUNTIMES,
    bytes_scale,
    fill_template,
    metric_format,
    plain,
    row_name,
)
from mmcompress.report.frame import flat_row
from mmcompress.report.html import SHAPES, axis_name
from mmcompress.report.plots import Axes, Point, marker, pareto_front, scatter
from mmcompress.report.schema import Row
from mmcompress.report.sections import Run, Section, compared
from mmcompress.report.tables import Cell, Table
from mmcompress.report.text import bad_news, chips, gate_words
from mmcompress.report.views import html_filters

SHOWN = ("quality", "change", "latency_ms", "components", "parity")
"""What the other parts of the page show."""
ENDS = ("low", "high", "n")


def contents(comparison: Comparison, sections: Sequence[Section]) -> list[tuple[str, str]]:
    """(anchor, title) of the page's parts, in their order."""
    several = len(comparison.entries) > 1
    return [
        ("models", "Final models"),
        ("front", "What is worth choosing from"),
        *([("between", "Between the runs")] if several else ()),
        *((s.anchor, s.title) for s in sections),
        *([("metrics", "All metrics")] if metrics_table(comparison) is not None else ()),
        *([("numbers", "Everything else")] if numbers_table(comparison) is not None else ()),
        ("words", "Each run by itself"),
    ]


def metrics_table(comparison: Comparison) -> Table | None:
    """Every metric of every run's final model; None where there is not more than the one that the main table holds."""
    names = dict.fromkeys(m for e in comparison.entries if e.final for m in e.final.quality)
    if not set(names) - {comparison.metric}:
        return None
    body = []
    for metric in names:
        fmts = [metric_format(e.report, metric) for e in comparison.entries]
        title = f"{metric} ({fmts[0].direction})" if fmts[0].direction else metric
        line = [Cell(title)]
        for entry, fmt in zip(comparison.entries, fmts, strict=True):
            found = entry.final.quality.get(metric) if entry.final else None
            line.append(Cell(fmt.value(found.value), (fmt.interval(found), f"n = {found.n:,}")) if found else Cell(MISSING))
        body.append(tuple(line))
    columns = (("", "Metric"), *(("", e.name) for e in comparison.entries))
    return Table("metrics", "Final models, with 95% intervals", columns, tuple(body), heads=1, words=(0,))


def numbers_table(comparison: Comparison) -> Table | None:
    """Everything else that was measured of the final models, by its path in ``report.json``; None where there is nothing."""
    lines = [flat_row(e.final.model_dump(mode="json")) if e.final else {} for e in comparison.entries]
    paths = dict.fromkeys(path for line in lines for path in line if "." in path and path.split(".")[0] not in SHOWN)
    body = []
    for path in paths:
        head, _, end = path.rpartition(".")
        if end in ENDS and head in paths:
            continue
        cells = [_number(line, path) for line in lines]
        if any(cell.text != MISSING for cell in cells):
            body.append((Cell(path.replace(".", ", ").replace("_", " ")), *cells))
    columns = (("", "What"), *(("", e.name) for e in comparison.entries))
    note = "As in report.json and to_frame(): shares from 0 to 1, milliseconds, bytes. Small print is the 95% interval."
    return Table("numbers", "Everything else that was measured", columns, tuple(body), 1, (0,), note) if body else None


def _number(line: Mapping[str, Any], path: str) -> Cell:
    value, low, high = (line.get(f"{path}{end}") for end in ("", ".low", ".high"))
    if not isinstance(value, int | float):
        return Cell(MISSING)
    interval = (f"{plain(low)} to {plain(high)}",) if isinstance(low, int | float) and isinstance(high, int | float) else ()
    return Cell(plain(value), interval)


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
        points = _points(comparison, ask, x_label.split(", ")[-1])
        if not comparison.metric or not points:
            continue
        fmt = metric_format(comparison.entries[0].report, comparison.metric)
        axes = Axes(f"{fmt.name} against {x_label}, all runs", "; ".join(p.tip for p in points), x_label, axis_name(fmt),
                    higher_is_better=fmt.higher_is_better)  # fmt: skip
        best = "; ".join(points[i].tip for i in pareto_front(points, fmt.higher_is_better))
        found.append((scatter(points, axes, f"compare-{key}", front=True), f"Beaten by no other model here: {best}.", key))
    return found


def _points(comparison: Comparison, ask: Callable[[Row], float | None], unit: str) -> list[Point]:
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
                tip=f"{entry.name}, {row_name(row)}: {fmt.value(quality.value)} at {x:,.4g} {unit}",
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
        "between": differences_table(comparison),
        "metrics": metrics_table(comparison),
        "numbers": numbers_table(comparison),
        "cards": [(e, chips(e.report), [*gate_words(e.report), *bad_news(e.report)]) for e in comparison.entries],
        "pictures": _pictures(comparison),
        "legend": legend,
        "contents": contents(comparison, sections),
        "sections": sections,
    }
    return fill_template("compare.html.j2", html_filters(), values)
