"""Small pictures side by side that share their axes: two lines over a few degrees of something, with intervals.

Lengths are in the picture's own units, of which 240 span it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mmcompress.report.plots import outline, ticks

WIDTH, HEIGHT = 240, 150
LEFT, RIGHT, TOP, BOTTOM = 38, 12, 10, 26


@dataclass(frozen=True)
class Line:
    """One model over the degrees.

    Attributes:
        name: for the text on hovering.
        values: (value, low, high) at each degree.
        series: 0 to 7, the colour.
        shape: ``circle``, ``square`` or ``diamond``.
        hollow: drawn as outlines, for baselines.
    """

    name: str
    values: Sequence[tuple[float, float, float]]
    series: int
    shape: str = "circle"
    hollow: bool = False


def multiple(
    lines: Sequence[Line],
    degrees: Sequence[str],
    title: str,
    key: str,
    span: tuple[float, float],
    text: Callable[[float], str],
) -> Markup:
    """One small picture.

    Args:
        degrees: what stands below each place.
        title: what the picture is called, for those who do not see it; its numbers follow by themselves.
        key: makes its ids unique on the page.
        span: the ends of the y axis, the same for all pictures side by side.
        text: writes a value.
    """
    low, high = span if span[1] > span[0] else (span[0] - 0.5, span[1] + 0.5)

    def to_y(value: float) -> float:
        return HEIGHT - BOTTOM - (min(max(value, low), high) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    def to_x(place: int) -> float:
        return LEFT + (place + 0.5) * (WIDTH - LEFT - RIGHT) / len(degrees)

    parts = []
    for y in ticks(low, high, 4):
        line = '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        parts.append(Markup(line).format(LEFT, WIDTH - RIGHT, to_y(y), to_y(y)))
        parts.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 5, to_y(y) + 4, f"{y:g}")
        )
    for i, degree in enumerate(degrees):
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(to_x(i), HEIGHT - 8, degree)
        )
    for at, one in enumerate(lines):
        parts += _line(one, [to_x(i) + 5 * at - 2.5 * (len(lines) - 1) for i in range(len(degrees))], to_y, degrees, text)
    said = "; ".join(
        f"{one.name}: " + ", ".join(f"{degree} {text(v[0])}" for degree, v in zip(degrees, one.values, strict=True))
        for one in lines
    )
    return Markup(
        '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title {}-desc">'
        '<title id="{}-title">{}</title><desc id="{}-desc">{}</desc>{}</svg>'
    ).format(WIDTH, HEIGHT, key, key, key, title, key, said, Markup("").join(parts))


def _line(
    one: Line, xs: Sequence[float], to_y: Callable[[float], float], degrees: Sequence[str], text: Callable[[float], str]
) -> list[Markup]:
    path = " ".join(f"{x:.1f},{to_y(v[0]):.1f}" for x, v in zip(xs, one.values, strict=True))
    parts = [Markup('<polyline class="path s{}" points="{}"/>').format(one.series, path)]
    kind = "hollow" if one.hollow else "full"
    tag = {"square": "rect", "diamond": "path"}.get(one.shape, "circle")
    for x, degree, (value, low, high) in zip(xs, degrees, one.values, strict=True):
        bar = '<line class="bar s{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
        parts.append(Markup(bar).format(one.series, x, x, to_y(low), to_y(high)))
        tip = f"{one.name}, {degree}: {text(value)} ({text(low)} to {text(high)})"
        parts.append(
            Markup('<{} class="dot {} s{}"><title>{}</title></{}>').format(
                outline(one.shape, x, to_y(value), 3.4), kind, one.series, tip, tag
            )
        )
    return parts
