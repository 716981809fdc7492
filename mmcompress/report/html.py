"""The report as one HTML file that fetches nothing: inline styles, inline SVG, no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from mmcompress.report.format import (
    BASELINE,
    MISSING,
    RUNTIMES,
    MetricFormat,
    Speed,
    baseline_row,
    batches,
    bytes_scale,
    count_scale,
    fill_template,
    final_row,
    headline_metric,
    metric_format,
    ms_scale_of,
    row_name,
    smaller,
    speeds,
    times,
)
from mmcompress.report.markdown import all_tables, recipe_yaml, row_tags
from mmcompress.report.plots import Axes, Point, interval_bar, marker, scatter, value_bar
from mmcompress.report.schema import Change, Report, Row
from mmcompress.report.sections import Section, all_sections
from mmcompress.report.tables import Cell, Table
from mmcompress.report.text import SYNTHETIC, bad_news, chips, gate_words, speed_words
from mmcompress.report.views import html_filters

SHAPES = {"torch": "circle", "onnxruntime": "square", "openvino": "diamond"}
AFTER = {"metrics": "Other metrics", "towers": "Each tower", "parity": "Exported files", "classes": "Who pays for it"}
"""Parts of the page that show a table, by its key."""
SERIES = {"torch": 0, "onnxruntime": 1, "openvino": 2}


@dataclass(frozen=True)
class Bar:
    """One line of a small bar chart."""

    name: str
    value: str
    note: str
    picture: Markup


@dataclass(frozen=True)
class StepChange:
    """What one step changed, against the step before and against the baseline."""

    step: Cell
    runtime: str
    parameters: Cell
    disk: Cell
    disk_bar: Markup
    quality: Cell
    quality_bar: Markup


def render_html(report: Report, folder: Path | None = None) -> str:
    """The whole report as one self-contained page.

    Args:
        folder: the run's folder, for pictures and recordings of examples; they are left out where it is not given.
    """
    metric = headline_metric(report)
    tables, sections = all_tables(report), all_sections(report, folder)
    values = {
        "report": report,
        "metric": metric,
        "direction": metric_format(report, metric).direction,
        "chips": chips(report),
        "alerts": bad_news(report),
        "gates": gate_words(report),
        "synthetic": SYNTHETIC if report.totals.synthetic else "",
        "subtitle": subtitle(report),
        "pictures": pictures(report, metric),
        "legend": legend(report),
        "speeds": [(speed_words(report, s), speed_bars(report, s)) for s in speeds(report) if s.ratio is not None],
        "tables": tables,
        "sections": sections,
        "contents": contents(report, tables, sections),
        "steps": step_changes(report, metric),
        "notes": [(row, row_tags(report, row)) for row in report.rows if row.notes],
        "recipe": recipe_yaml(report),
    }
    return fill_template("report.html.j2", html_filters(), values)


def contents(report: Report, tables: dict[str, Table], sections: Sequence[Section]) -> list[tuple[str, str]]:
    """(anchor, title) of the page's parts, in their order."""
    gained = any(s.ratio is not None for s in speeds(report))
    return [
        ("picture", "Size, speed and quality"),
        *([("gain", "Where the speed came from")] if gained else ()),
        *([("results", "Every model")] if "results" in tables else ()),
        *([("steps", "What each step changed")] if len({row.step for row in report.rows}) > 1 else ()),
        *((s.anchor, s.title) for s in sections),
        *((key, title) for key, title in AFTER.items() if key in tables),
        ("gates", "Gates"),
        *([("done", "What each step cost and did")] if "cost" in tables else ()),
        ("recipe", "Recipe"),
        ("again", "How to reproduce"),
        ("how", "How it was measured"),
    ]


def subtitle(report: Report) -> list[tuple[str, str]]:
    """What was compressed, for what task, on what data and how."""
    recipe = report.recipe
    task, data = recipe.get("task"), recipe.get("data")
    held_out = data.get("eval") if isinstance(data, dict) else None
    passes = [str(p.get("pass", "?")) if isinstance(p, dict) else str(p) for p in recipe.get("passes") or ()]
    parts = [
        ("Model", recipe.get("model")),
        ("Task", task.get("type") if isinstance(task, dict) else task),
        ("Evaluated on", held_out.get("path") if isinstance(held_out, dict) else held_out),
        ("Passes", ", ".join(passes)),
    ]
    return [(name, str(value)) for name, value in parts if value]


def pictures(report: Report, metric: str) -> list[tuple[Markup, str]]:
    """The pictures of quality against latency and against disk, with a caption each; none where quality is missing."""
    rows = [row for row in report.rows if metric in row.quality]
    if not rows:
        return []
    fmt, found = metric_format(report, metric), []
    better = "up" if fmt.higher_is_better else "down"
    batch = next((b for b in batches(report) if any(b in r.latency_ms for r in rows)), "")
    timed = [row for row in rows if batch in row.latency_ms]
    if timed:
        name = f"median latency at batch {batch}, ms"
        found.append(
            (
                _picture(report, timed, fmt, batch, name),
                f"Faster is left, better is {better}; the bubble's area is the size on disk.",
            )
        )
    unit = bytes_scale(r.disk_bytes for r in rows).unit
    found.append((_picture(report, rows, fmt, "", f"disk, {unit}"), f"Smaller is left, better is {better}."))
    return found


def _picture(report: Report, rows: list[Row], fmt: MetricFormat, batch: str, x_label: str) -> Markup:
    points = [_point(report, row, fmt, batch) for row in rows]
    paths = []
    for runtime in RUNTIMES:
        path = [i for i, row in enumerate(rows) if row.runtime == runtime and not row.rolled_back]
        if len(path) > 1:
            paths.append(path)
    facts = "; ".join(p.tip for p in points)
    axes = Axes(f"{fmt.name} against {x_label}", facts, x_label, axis_name(fmt), higher_is_better=fmt.higher_is_better)
    return scatter(points, axes, "picture-latency" if batch else "picture-disk", paths)


def axis_name(fmt: MetricFormat) -> str:
    """The metric with its unit and, where lower is better, its direction."""
    return f"{fmt.title} ({fmt.direction})" if fmt.direction else fmt.title


def _point(report: Report, row: Row, fmt: MetricFormat, batch: str) -> Point:
    scale = fmt.scale
    quality, sizes = row.quality[fmt.name], bytes_scale(r.disk_bytes for r in report.rows)
    latency = row.latency_ms.get(batch)
    tags = row_tags(report, row)
    said = "".join(f" ({tag})" for tag in tags)
    tip = f"{row_name(row)}{said}: {fmt.value(quality.value)} ({fmt.interval(quality)}), {sizes(row.disk_bytes)}"
    return Point(
        x=latency.p50 if latency else row.disk_bytes / sizes.divisor,
        y=quality.value * scale,
        label=row.step,
        x_interval=(latency.low, latency.high) if latency else None,
        y_interval=(quality.low * scale, quality.high * scale),
        weight=float(row.disk_bytes) if latency else 1.0,
        series=SERIES[row.runtime],
        shape=SHAPES[row.runtime],
        hollow=row.step == BASELINE,
        ghost=row.rolled_back,
        strong="final" in tags,
        tip=tip + (f", {ms_scale_of(report, batch)(latency.p50)}" if latency else ""),
    )


def legend(report: Report) -> list[tuple[Markup, str]]:
    """What the markers of the pictures mean."""
    used = {row.runtime for row in report.rows}
    keys = [(marker(SHAPES[r], SERIES[r]), name) for r, name in RUNTIMES.items() if r in used]
    keys.append((marker("circle", 8, "hollow"), "baseline (outline)"))
    if any(row.rolled_back for row in report.rows):
        keys.append((marker("circle", 8, "ghost"), "rolled back (dashed)"))
    return keys


def speed_bars(report: Report, speed: Speed) -> list[Bar]:
    """The way from the baseline in torch to the final model at one batch size, as bars of milliseconds."""
    final = final_row(report)
    ways = [(BASELINE, "torch"), (BASELINE, "onnxruntime")]
    ways += [(final.step, runtime) for runtime in ("onnxruntime", "openvino")] if final else []
    if final and (final.step, final.runtime) not in ways:
        ways.append((final.step, final.runtime))
    by_name = {(row.step, row.runtime): row for row in reversed(report.rows) if speed.batch in row.latency_ms}
    rows = [by_name[way] for way in dict.fromkeys(ways) if way in by_name]
    if len(rows) < 2:
        return []
    ms, slowest = ms_scale_of(report, speed.batch), max(row.latency_ms[speed.batch].p50 for row in rows)
    bars, before = [], None
    for row in rows:
        p50 = row.latency_ms[speed.batch].p50
        note = f"{times(before / p50)}" if before and p50 > 0 else ""
        bars.append(
            Bar(
                f"{row.step}, {RUNTIMES[row.runtime]}",
                ms(p50),
                note,
                value_bar(p50, slowest, before, SERIES[row.runtime]),
            )
        )
        before = p50
    return bars


def step_changes(report: Report, metric: str) -> list[StepChange]:
    """What each step changed; a step in several runtimes is shown in torch, or else in the first it was measured in."""
    shown: dict[str, Row] = {}
    for row in report.rows:
        if row.step not in shown or (row.runtime == "torch" and shown[row.step].runtime != "torch"):
            shown[row.step] = row
    final = final_row(report)
    if final is not None:
        shown[final.step] = final
    span = change_span(
        [row.change[metric] for row in shown.values() if metric in row.change],
        final.change.get(metric) if final else None,
    )
    largest = max((row.disk_bytes for row in shown.values()), default=0)
    found: list[StepChange] = []
    before: Row | None = None
    for row in shown.values():
        found.append(_step_change(report, row, before, metric, span, largest))
        if not row.rolled_back:
            before = row  # a step that was undone is nothing to build on
    return found


def change_span(changes: Sequence[Change], main: Change | None) -> tuple[float, float]:
    """The axis for differences: zero, the final model's interval, and what lies not far outside.

    A model right after a cut may be so far off that it would squeeze all other rows to a point; it is put at the edge.
    """
    low, high = min(main.low if main else 0.0, 0.0), max(main.high if main else 0.0, 0.0)
    reach = 2.5 * (high - low)
    near = [c for c in changes if not main or low - reach <= c.difference <= high + reach]
    return min([low, *(c.low for c in near)]), max([high, *(c.high for c in near)])


def _step_change(
    report: Report, row: Row, before: Row | None, metric: str, span: tuple[float, float], largest: int
) -> StepChange:
    counts, sizes = count_scale(r.parameters for r in report.rows), bytes_scale(r.disk_bytes for r in report.rows)
    fmt = metric_format(report, metric)
    change, quality = row.change.get(metric), row.quality.get(metric)
    last = before.change.get(metric) if before else None
    start = last.difference if last else 0.0 if before is not None and before is baseline_row(report) else None
    bar = Markup("")
    small: tuple[str, ...] = ()
    if change:
        bar = interval_bar(change.low, change.difference, change.high, span, start, fmt.higher_is_better)
        if start is not None:
            small = (f"{fmt.signed(change.difference - start)} {fmt.unit} by this step".replace("  ", " "),)
    tone = {"worse": "bad", "better": "good"}.get(change.verdict, "") if change else ""
    return StepChange(
        step=Cell(row.step, tags=row_tags(report, row)),
        runtime=RUNTIMES[row.runtime],
        parameters=Cell(counts(row.parameters), _by_step(row.parameters, before.parameters if before else None)),
        disk=Cell(sizes(row.disk_bytes), _by_step(row.disk_bytes, before.disk_bytes if before else None)),
        disk_bar=value_bar(row.disk_bytes, largest, before.disk_bytes if before else None, SERIES[row.runtime]),
        quality=Cell(fmt.value(quality.value) if quality else MISSING, small, tone),
        quality_bar=bar,
    )


def _by_step(value: int, before: int | None) -> tuple[str, ...]:
    return (smaller(value / before, "less", "more"),) if before else ()
