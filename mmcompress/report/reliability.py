"""Reliability diagrams as inline SVG: accuracy against confidence, with how many answers lie where. Torch-free.

Lengths are in the picture's own units, of which 240 span it.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from mmcompress.report.schema_behaviour import ReliabilityBin

WIDTH, HEIGHT = 240, 284
LEFT, RIGHT, TOP, FLOOR = 38, 12, 24, 214
"""The square of the diagram; below it stand the counts."""
COUNTS = 26
"""Height of the tallest count."""


def reliability(bins: Sequence[ReliabilityBin], title: str, key: str, series: int, hollow: bool = False) -> Markup:
    """One diagram: a bar for each bin up to its accuracy, a tick at its mean confidence, and the diagonal of a calibrated model.

    Args:
        title: what the picture is called; its numbers follow for those who do not see it.
        key: makes its ids unique on the page.
        series: 0 to 8, the colour.
        hollow: bars as outlines, for baselines.
    """
    wide, high = WIDTH - LEFT - RIGHT, FLOOR - TOP

    def to_x(value: float) -> float:
        return LEFT + value * wide

    def to_y(value: float) -> float:
        return FLOOR - value * high

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line("grid", to_x(0), to_x(1), to_y(tick), to_y(tick)))
        label = '<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{:.0f}</text>'
        parts.append(Markup(label).format(LEFT - 5, to_y(tick) + 4, "end", 100 * tick))
        parts.append(Markup(label).format(to_x(tick), FLOOR + 14, "middle", 100 * tick))
    most = max((b.n for b in bins), default=0)
    for b in bins:
        if not b.n or b.accuracy is None or b.confidence is None:
            continue
        tip = f"confidence {b.low:.0%} to {b.high:.0%}: {b.n:,} answers, {b.accuracy:.0%} right at a mean of {b.confidence:.0%}"
        x, across = to_x(b.low) + 1, (b.high - b.low) * wide - 2
        rect = '<rect class="dot {} s{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
        tall = max(b.accuracy * high, 1.0)
        parts.append(Markup(rect).format("hollow" if hollow else "full", series, x, FLOOR - tall, across, tall, tip))
        parts.append(_line("axis", x, x + across, to_y(b.confidence), to_y(b.confidence)))
        deep = max(1.0, COUNTS * b.n / most)
        parts.append(Markup(rect).format("hollow", 8, x, FLOOR + 22, across, deep, f"{b.n:,} answers"))
    parts.append(_line("path s8", to_x(0), to_x(1), to_y(0), to_y(1)))
    name = '<text class="name" x="{}" y="{}" text-anchor="{}">{}</text>'
    parts.append(Markup(name).format(WIDTH - RIGHT, HEIGHT - 4, "end", "confidence, %; below: how many"))
    parts.append(Markup(name).format(4, 13, "start", "right, %"))
    said = "; ".join(
        f"{b.low:.0%} to {b.high:.0%}: {b.accuracy:.0%} right of {b.n:,}" for b in bins if b.n and b.accuracy is not None
    )
    return Markup(
        '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title {}-desc">'
        '<title id="{}-title">{}</title><desc id="{}-desc">{}</desc>{}</svg>'
    ).format(WIDTH, HEIGHT, key, key, key, title, key, said, Markup("").join(parts))


def _line(kind: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(kind, x1, x2, y1, y2)
