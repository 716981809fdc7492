"""The report as one HTML file that fetches nothing: inline styles, inline SVG, no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from mmcompress.report.alerts import Alert
from mmcompress.report.bars import value_bar
from mmcompress.report.format import (
    BASELINE,
    RUNTIMES,
    MetricFormat,
    Speed,
    batches,
    bytes_scale,
    fill_template,
    final_row,
    headline_metric,
    metric_format,
    ms_scale_of,
    row_name,
    speeds,
    times,
)
from mmcompress.report.markdown import all_tables, recipe_yaml
from mmcompress.report.plots import Axes, Point, marker, scatter
from mmcompress.report.reproduce import reproduce
from mmcompress.report.schema import Report, Row
from mmcompress.report.sections import Section, all_sections
from mmcompress.report.summary import summary_table
from mmcompress.report.tables import Table
from mmcompress.report.text import SYNTHETIC, bad_news, chips, gate_words, speed_words
from mmcompress.report.views import html_filters
from mmcompress.report.waterfall import SERIES, row_tags, waterfalls

SHAPES = {"torch": "circle", "onnxruntime": "square", "openvino": "diamond"}
AFTER = {
    "results": "Every model",
    "metrics": "Other metrics",
    "towers": "Each tower",
    "parity": "Exported files",
    "classes": "Who pays for it",
    "decided": "What was decided",
    "rounds": "Rounds",
    "done": "What each step cost and did",
}
"""Parts of the page that show a table, by its key."""
SHOWN_ALERTS = 7
"""More than these, without the bad ones, stand in a fold."""


@dataclass(frozen=True)
class Bar:
    """One line of a small bar chart."""

    name: str
    value: str
    note: str
    picture: Markup


def render_html(report: Report, folder: Path | None = None) -> str:
    """The whole report as one self-contained page.

    Args:
        folder: the run's folder, for pictures and recordings of examples; they are left out where it is not given.
    """
    metric = headline_metric(report)
    tables, sections = all_tables(report), all_sections(report, folder)
    falls, summary = waterfalls(report, metric), summary_table(report)
    first, rest = first_screen([*(Alert(g.tone, f"Gate {g.text}") for g in gate_words(report)), *bad_news(report)])
    values = {
        "report": report,
        "chips": chips(report),
        "alerts": first,
        "more": rest,
        "gates": gate_words(report),
        "synthetic": SYNTHETIC if report.totals.synthetic else "",
        "subtitle": subtitle(report),
        "pictures": pictures(report, metric),
        "legend": legend(report),
        "speeds": [(speed_words(report, s), speed_bars(report, s)) for s in speeds(report) if s.ratio is not None],
        "tables": tables,
        "sections": sections,
        "contents": contents(report, tables, sections, summary),
        "falls": falls,
        "summary": summary,
        "notes": [(row, row_tags(report, row)) for row in report.rows if row.notes],
        "recipe": recipe_yaml(report),
        "again": reproduce(report, folder),
        "version": made_by(report),
    }
    return fill_template("report.html.j2", html_filters(), values)


def first_screen(alerts: Sequence[Alert]) -> tuple[list[Alert], list[Alert]]:
    """What stands on the first screen, worst first, and what is folded away behind it; bad news never is."""
    order = ("bad", "caution", "neutral", "good")
    known = sorted(alerts, key=lambda alert: order.index(alert.tone))
    bad = sum(alert.tone == "bad" for alert in known)
    shown = max(bad, SHOWN_ALERTS)
    if len(known) == shown + 1:  # a fold for one line saves nothing
        shown += 1
    return known[:shown], known[shown:]


def made_by(report: Report) -> str:
    """The version that made the report, where it is recorded."""
    versions = report.environment.get("versions")
    return str(versions.get("mmcompress", "")) if isinstance(versions, dict) else ""


def contents(
    report: Report, tables: dict[str, Table], sections: Sequence[Section], summary: Table | None
) -> list[tuple[str, str]]:
    """(anchor, title) of the page's parts, in their order."""
    gained = any(s.ratio is not None for s in speeds(report))
    return [
        ("picture", "Size, speed and quality"),
        *([("summary", summary.caption)] if summary else ()),
        *([("steps", "What each step changed")] if len({row.step for row in report.rows}) > 1 else ()),
        *([("gain", "Where the speed came from")] if gained else ()),
        *((s.anchor, s.title) for s in sections),
        *((key, title) for key, title in AFTER.items() if ("cost" if key == "done" else key) in tables),
        ("gates", "Gates"),
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
    return scatter(points, axes, "picture-latency" if batch else "picture-disk", paths, front=True)


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
