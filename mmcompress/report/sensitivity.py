"""What cutting costs as one HTML page: a picture for each axis, and the numbers. Takes the plain data of `curves.sensitivity`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from mmcompress.report.format import fill_template
from mmcompress.report.plots import Axes, Point, marker, scatter
from mmcompress.report.tables import Cell, Table
from mmcompress.report.text import SYNTHETIC
from mmcompress.report.views import html_filters

SHAPES = ("circle", "square", "diamond")
HUNDRED = 100.0


def render_sensitivity_html(found: Mapping[str, Any]) -> str:
    """The page; it fetches nothing."""
    axes = list(dict.fromkeys(curve["axis"] for curve in found["curves"]))
    towers = list(dict.fromkeys(curve["tower"] for curve in found["curves"]))
    looks = {tower: (SHAPES[i % len(SHAPES)], i % 8) for i, tower in enumerate(towers)}
    legend = [(marker(shape, series), tower) for tower, (shape, series) in looks.items()]
    legend.append((marker("circle", 8, "hollow"), "uncut (outline)"))
    values = {
        "found": found,
        "synthetic": SYNTHETIC if found["synthetic"] else "",
        "pictures": [(_picture(found, axis, looks), axis) for axis in axes],
        "legend": legend,
        "table": sensitivity_table(found),
        "uncut": f"{HUNDRED * found['quality']['value']:.1f}%",
        "direction": "lower is better" if found["lower_is_better"] else "",
    }
    return fill_template("sensitivity.html.j2", html_filters(), values)


def _picture(found: Mapping[str, Any], axis: str, looks: Mapping[str, tuple[str, int]]) -> Markup:
    quality = found["quality"]
    interval = (HUNDRED * quality["low"], HUNDRED * quality["high"])
    points = [Point(0.0, HUNDRED * quality["value"], "uncut", y_interval=interval, series=8, hollow=True, tip="uncut")]
    paths = []
    for curve in found["curves"]:
        if curve["axis"] != axis:
            continue
        shape, series = looks[curve["tower"]]
        first = len(points)
        for i, p in enumerate(curve["points"]):
            last = i == len(curve["points"]) - 1
            low, high = (HUNDRED * (quality["value"] + p[f"difference_{end}"]) for end in ("low", "high"))
            said = f"{curve['tower']}: {p['ratio']:g} of {axis} cut: {HUNDRED * p['difference']:+.1f} points"
            points.append(
                Point(
                    p["share"],
                    HUNDRED * p["value"],
                    curve["tower"] if last else "",
                    y_interval=(low, high),
                    series=series,
                    shape=shape,
                    strong=True,
                    tip=said,
                )
            )
        paths.append([*range(first, len(points))])
    title = f"{found['metric']} against the share of {axis} that is cut"
    described = Axes(title, "; ".join(p.tip for p in points), f"share of {axis} cut", f"{found['metric']}, %")
    return scatter(points, described, f"picture-{axis}", paths)


def sensitivity_table(found: Mapping[str, Any]) -> Table:
    """All cuts with what they cost."""
    rows = []
    for curve in found["curves"]:
        for p in curve["points"]:
            tone = {"worse": "bad", "better": "good"}.get(p["verdict"], "")
            ends = f"{HUNDRED * p['difference_low']:+.1f} to {HUNDRED * p['difference_high']:+.1f}"
            rows.append(
                (
                    Cell(curve["tower"]),
                    Cell(curve["axis"]),
                    Cell(f"{p['ratio']:g}"),
                    Cell(f"{p['kept']:,}"),
                    Cell(f"{p['parameters']:,}", (f"{HUNDRED * p['parameters'] / found['parameters']:.0f}%",)),
                    Cell(f"{HUNDRED * p['value']:.1f}%"),
                    Cell(f"{HUNDRED * p['difference']:+.1f} points", (ends,), tone),
                )
            )
    columns = tuple(("", t) for t in ("Tower", "Axis", "Ratio", "Kept", "Parameters", str(found["metric"]), "Difference"))
    note = "Kept counts units of a layer, whole heads for the width, or layers. Differences are paired, with their 95% interval."
    return Table("sensitivity", "What each cut costs", columns, tuple(rows), heads=1, words=(0, 1), note=note)
