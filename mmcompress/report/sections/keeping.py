"""What keeps quality under int8: ranges, smoothed channels, corrected biases, and which layers stayed float and why."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from mmcompress.report.alerts import Alert
from mmcompress.report.schema import Report
from mmcompress.report.sections import Section
from mmcompress.report.tables import Cell, Table
from mmcompress.report.views import escape_markdown, html_table, markdown_table

ORDER = 7
WIDTH = 110
SHOWN = 12
"""Layers and LayerNorms in a table; the report's facts have them all."""

Found = dict[str, Any]


def alerts(report: Report) -> list[Alert]:
    """Nothing: where a component could not be quantized at all, the pass has warned of it."""
    return []


def section(report: Report, folder: Path | None) -> Section | None:
    """Sentences and tables for each step; None where nothing was asked for beside the defaults."""
    found = kept(report)
    if not found:
        return None
    html, markdown, text = [], [], []
    for step, one in found.items():
        words, tables = sentences(step, one), [*layer_tables(step, one), *norm_tables(step, one)]
        html += [_list(words), *(html_table(table) for table in tables)]
        markdown += ["\n".join(f"- {escape_markdown(word)}" for word in words), *(markdown_table(table) for table in tables)]
        text += words + [line for table in tables for line in _lines(table)]
    lines = [line for one in text for line in textwrap.wrap(one, WIDTH, subsequent_indent="      ")]
    return Section("keeping", "What keeps int8 right", Markup("").join(html), "\n\n".join(markdown), "\n".join(lines))


def kept(report: Report) -> dict[str, Found]:
    """What was noted, by step."""
    found: dict[str, Found] = {}
    for row in report.rows:
        one = row.facts.get("keeping")
        if isinstance(one, dict) and one and not row.rolled_back:
            found.setdefault(row.step, one)
    return found


def sentences(step: str, found: Found) -> list[str]:
    """What was asked for and what came of it."""
    how = f"percentile {found['percentile']:g}" if found["calibration"] == "percentile" else found["calibration"]
    words = [f"{step}: ranges of activations by {how}."]
    for component, done in found["components"].items():
        groups = done.get("smooth")
        if groups is not None:
            changed = [one for one in groups if one["alpha"] is not None]
            channels = sum(len(one["outliers"]) for one in groups)
            words.append(
                f"{component}: SmoothQuant in {len(changed)} of {len(groups)} LayerNorms; {channels} channels are outliers "
                "(ten times the median channel's largest value, or more)."
            )
        layers = done.get("bias_correction")
        if layers is not None:
            most = max(layers, key=lambda one: float(one["shift"]), default=None)
            worst = f", most in {most['layer']} (by {most['shift']:.2g})" if most is not None else ""
            words.append(f"{component}: biases of {len(layers)} layers corrected{worst}.")
    mixed = found.get("mixed_precision")
    if mixed is not None:
        drops = {one["float"]: one["drop"] for one in mixed["tried"]}
        count, where = len(mixed["float"]), f"on {mixed['examples']} training examples"
        words.append(f"All {mixed['layers']} layers in int8 cost {drops[0]:.2f} points of {mixed['metric']} {where}.")
        limit = f"{mixed['max_drop']:g}"
        if not count:
            words.append(f"That is within the limit of {limit}: no layer stays in float.")
        elif count in drops:
            words.append(f"The limit is {limit}: the {count} most sensitive stay in float; that costs {drops[count]:.2f} points.")
        else:
            words.append(f"The limit is {limit}, and no smaller number of layers in float keeps it: all stay in float.")
    return words


def layer_tables(step: str, found: Found) -> list[Table]:
    """The most sensitive layers of all components, by what `max_drop` sorted them by, and which of them stayed in float."""
    left = {(one["component"], one["layer"]) for one in found.get("mixed_precision", {}).get("float", ())}
    components = found["components"].items()
    far = {(component, layer): value for component, done in components for layer, value in done.get("distances", {}).items()}
    drops = {(component, layer): value for component, done in components for layer, value in done.get("drops", {}).items()}
    ranked = sorted(far, key=lambda one: (-drops[one][0] if drops else 0.0, -far[one]))
    if not ranked:
        return []
    lines = tuple(
        (
            Cell(one[1], tags=("float",) if one in left else ()),
            Cell(one[0]),
            *([Cell("{:+.2f} [{:+.2f}, {:+.2f}]".format(*drops[one]))] if drops else []),
            Cell(f"{far[one]:.2e}"),
            Cell("stays in float" if one in left else "int8"),
        )
        for one in ranked[:SHOWN]
    )
    loss = [("", f"{found['mixed_precision']['metric']}, points lost [95%]")] if drops else []
    columns = (("", "layer"), ("", "component"), *loss, ("", "distance"), ("", "what it is"))
    note = "Distance: 1 less the mean cosine of the component's output to the float one's when this layer alone is int8."
    note += " Points: what the metric loses by that." if drops else ""
    words = (1, 4) if drops else (1, 3)
    return [Table(f"keeping-{step}-layers", f"{step}, most sensitive layers", columns, lines, words=words, note=note)]


def norm_tables(step: str, found: Found) -> list[Table]:
    """LayerNorms that were smoothed or have outliers."""
    tables = []
    for component, done in found["components"].items():
        groups = [one for one in done.get("smooth", ()) if one["alpha"] is not None or one["outliers"]]
        groups = sorted(groups, key=lambda one: -one["error_before"])[:SHOWN]
        lines = tuple(
            (
                Cell(one["norm"]),
                Cell("not changed" if one["alpha"] is None else f"{one['alpha']:g}"),
                Cell(f"{one['error_before']:.2e}"),
                Cell(f"{one['error_after']:.2e}"),
                Cell(", ".join(f"{channel} ({times:.0f}x)" for channel, times in one["outliers"][:4])),
            )
            for one in groups
        )
        columns = (("", "LayerNorm"), ("", "alpha"), ("", "error before"), ("", "error after"), ("", "outlier channels"))
        note = "Error: squared error of the layers' outputs in 8 bits over the outputs' squares, on a sample of calibration rows."
        if lines:
            title = f"{step}, {component}: smoothed channels"
            tables.append(Table(f"keeping-{step}-{component}", title, columns, lines, words=(4,), note=note))
    return tables


def _list(words: list[str]) -> Markup:
    items = Markup("").join(Markup("<li>{}</li>").format(escape(word)) for word in words)
    return Markup("<ul>{}</ul>").format(items)


def _lines(table: Table) -> list[str]:
    return [table.caption, *("  " + "  ".join(cell.text for cell in line if cell.text) for line in table.rows)]
