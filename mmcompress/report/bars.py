"""Bars for tables, as inline SVG: values from zero, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup


def value_bar(value: float, full: float, before: float | None = None, series: int = 1) -> Markup:
    """A horizontal bar from zero; what was gained since ``before`` is an outline, what was added a lighter piece.

    For tables: decoration beside a number, hidden from screen readers.
    """
    scale = 176 / full if full > 0 else 0.0
    parts = [Markup('<rect class="track" x="0" y="4" width="176" height="10" rx="2"/>')]
    if before is not None and before > value:
        parts.append(
            Markup('<rect class="gone" x="{:.1f}" y="4.5" width="{:.1f}" height="9"/>').format(
                value * scale, (before - value) * scale
            )
        )
    parts.append(
        Markup('<rect class="dot full s{}" x="0" y="4" width="{:.1f}" height="10" rx="2"/>').format(
            series, max(value * scale, 1.5)
        )
    )
    if before is not None and before < value:
        parts.append(
            Markup('<rect class="added" x="{:.1f}" y="4" width="{:.1f}" height="10"/>').format(
                before * scale, (value - before) * scale
            )
        )
    return _inline(parts, stretch=True)


def interval_bar(
    low: float,
    value: float,
    high: float,
    span: tuple[float, float],
    before: float | None = None,
    higher_is_better: bool = True,
) -> Markup:
    """A dot with its interval on an axis whose zero (the baseline) is marked; all rows of a table share ``span``.

    A value outside of the span is an arrow at the edge.
    """
    start, end = min(span[0], 0.0), max(span[1], 0.0)
    if end <= start:
        end = start + 1.0

    def place(v: float) -> float:
        return 8 + (min(max(v, start), end) - start) / (end - start) * 160

    above, below = ("good", "bad") if higher_is_better else ("bad", "good")
    tone = below if high < 0 else above if low > 0 else "even"
    parts = [Markup('<line class="zero" x1="{:.1f}" x2="{:.1f}" y1="0" y2="18"/>').format(place(0), place(0))]
    if before is not None:
        parts.append(Markup('<line class="leader" x1="{:.1f}" x2="{:.1f}" y1="9" y2="9"/>').format(place(before), place(value)))
    if not start <= value <= end:
        tip = 1 if value < start else 175
        arrow = f"M{tip} 9L{tip + (8 if tip == 1 else -8)} 4V14Z"
        return _inline([*parts, Markup('<path class="mean {}" d="{}"/>').format(tone, arrow)])
    parts.append(Markup('<line class="whisker {}" x1="{:.1f}" x2="{:.1f}" y1="9" y2="9"/>').format(tone, place(low), place(high)))
    parts.append(Markup('<circle class="mean {}" cx="{:.1f}" cy="9" r="4.5"/>').format(tone, place(value)))
    return _inline(parts)


def _inline(parts: Iterable[Markup], *, stretch: bool = False) -> Markup:
    looks = Markup(' stretch" preserveAspectRatio="none') if stretch else ""
    return Markup('<svg class="inline{}" viewBox="0 0 176 18" aria-hidden="true" focusable="false">{}</svg>').format(
        looks, Markup("").join(parts)
    )
