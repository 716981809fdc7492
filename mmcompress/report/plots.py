"""Pictures as inline SVG, drawn here so that they take the page's colours in light, dark and print.

Text stays text, ids are counted up from a given key, and nothing depends on the clock: equal points give equal strings.
Lengths are in the picture's own units; 400 of them span a phone's width, on which 13 units of text stay readable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 310
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 28, 42
LETTER, LINE = 7.0, 14.0
"""Width and height of a letter of a label, for finding room; a little more than the real ones."""
LARGEST = 12.0
"""Radius of the largest bubble."""


@dataclass(frozen=True)
class Point:
    """One model in one runtime.

    Attributes:
        weight: the bubble's area is proportional to it.
        series: 0 to 7, the colour.
        shape: ``circle``, ``square`` or ``diamond``.
        hollow: drawn as an outline, for baselines.
        ghost: drawn dashed and left out of paths and fronts, for steps that were rolled back.
        strong: the label is bold, for final models.
        tip: what is shown on hovering.
    """

    x: float
    y: float
    label: str
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    weight: float = 1.0
    series: int = 0
    shape: str = "circle"
    hollow: bool = False
    ghost: bool = False
    strong: bool = False
    tip: str = ""


@dataclass(frozen=True)
class Axes:
    """What the picture is called and how its axes are written."""

    title: str
    description: str
    x_label: str
    y_label: str
    y_text: Callable[[float], str] = field(default=lambda v: f"{v:g}")
    higher_is_better: bool = True


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def pareto_front(points: Sequence[Point], higher_is_better: bool = True) -> list[int]:
    """The indices of the points that no other point beats in both x (less is better) and y, from left to right.

    Ghosts are left out. Of equal points the first one stays.
    """
    sign = 1 if higher_is_better else -1
    order = sorted((p.x, -sign * p.y, i) for i, p in enumerate(points) if not p.ghost)
    front: list[int] = []
    best = math.inf
    for _, loss, i in order:
        if loss < best:
            front.append(i)
            best = loss
    return front


def scatter(points: Sequence[Point], axes: Axes, key: str, paths: Iterable[Sequence[int]] = (), front: bool = False) -> Markup:
    """A scatter picture with intervals, bubbles and labels that do not lie on one another.

    The y axis holds the baselines and final models with room around them. A point far outside, such as a model right
    after a cut, would squeeze all others together: it is put at the edge, with an arrow and its value. So is one far to the
    right.

    Args:
        key: makes the picture's ids unique on the page.
        paths: indices of points to be joined by a thin line.
        front: whether the Pareto front is drawn, as steps, and what it leaves behind is dimmed.
    """
    if not points:
        return Markup("")
    # An interval of an unsteady timing may be many times as wide as the picture; it runs out of it.
    furthest = _reach(points)
    far = {i for i, p in enumerate(points) if p.x > furthest}
    widest = min(max(p.x_interval[1] if p.x_interval else p.x for p in points if p.x <= furthest), 1.3 * furthest)
    to_x, x_ticks = _axis(0.0, widest * 1.06, LEFT, WIDTH - RIGHT)
    low, high = _window(points)
    room = 0.06 * (high - low)
    to_y, y_ticks = _axis(low - room, high + room, HEIGHT - BOTTOM, TOP)
    off = {i for i, p in enumerate(points) if not low <= p.y <= high}
    measured, points = points, [_at_edge(p, low, high, axes) if i in off else p for i, p in enumerate(points)]
    edge = widest * 1.06
    points = [
        replace(p, x=edge, x_interval=None, label=f"{p.label} → {_far(p.x)}") if i in far else p for i, p in enumerate(points)
    ]
    off |= far
    places = [(to_x(p.x), to_y(p.y), _radius(p, points)) for p in points]
    parts = [*_grid(axes, x_ticks, y_ticks, to_x, to_y)]
    dim = set(range(len(points))) - set(pareto_front(measured, axes.higher_is_better)) if front else set()
    for path in paths:
        line = " ".join(f"{places[i][0]:.1f},{places[i][1]:.1f}" for i in path if i not in off)
        parts.append(Markup('<polyline class="path s{}" points="{}"/>').format(points[path[0]].series, line))
    if front:
        parts.append(_front(measured, places, axes.higher_is_better))
    bars = [b for i, p in enumerate(points) for b in _bars(p, to_x, to_y, i in dim)]
    parts += [bar for bar, _ in bars]
    # Large bubbles first, so that small ones stay in sight.
    for i in sorted(range(len(points)), key=lambda i: -places[i][2]):
        parts.append(_bubble(points[i], *places[i], i in dim))
    parts += _labels(points, places, [box for _, box in bars], axes.higher_is_better)
    return Markup(
        '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title {}-desc">'
        '<title id="{}-title">{}</title><desc id="{}-desc">{}</desc>{}</svg>'
    ).format(WIDTH, HEIGHT, key, key, key, axes.title, key, axes.description, Markup("").join(parts))


def _reach(points: Sequence[Point]) -> float:
    """The largest x inside the picture: a time many times as long as the baseline's would squeeze all others together."""
    main = max(p.x for p in points if p.strong or p.hollow or not any(q.strong or q.hollow for q in points))
    return max(p.x for p in points if p.x <= 2.5 * main)


def _far(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:,.1f}"


def _window(points: Sequence[Point]) -> tuple[float, float]:
    def ends(p: Point) -> tuple[float, float]:
        return p.y_interval or (p.y, p.y)

    main = [p for p in points if p.strong or p.hollow] or list(points)
    low, high = min(ends(p)[0] for p in main), max(ends(p)[1] for p in main)
    reach = 2.5 * (high - low)
    inside = [p for p in points if low - reach <= p.y <= high + reach] if reach > 0 else list(points)
    low, high = min(ends(p)[0] for p in inside), max(ends(p)[1] for p in inside)
    if high > low:
        return low, high
    half = abs(high) * 0.05 or 0.01
    return low - half, high + half


def _at_edge(point: Point, low: float, high: float, axes: Axes) -> Point:
    arrow = "↓" if point.y < low else "↑"
    edge = low if point.y < low else high
    return replace(point, y=edge, y_interval=None, label=f"{point.label} {arrow} {axes.y_text(point.y)}")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _axis(low: float, high: float, start: float, end: float) -> tuple[Callable[[float], float], list[float]]:
    if high <= low:
        high = low + 1.0
    return (lambda v: start + (v - low) / (high - low) * (end - start)), ticks(low, high)


def _radius(point: Point, points: Sequence[Point]) -> float:
    largest = max(p.weight for p in points)
    if min(p.weight for p in points) == largest:
        return 6.5
    return max(4.0, LARGEST * math.sqrt(point.weight / largest)) if largest > 0 else 5.0


def _grid(
    axes: Axes,
    x_ticks: list[float],
    y_ticks: list[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
) -> list[Markup]:
    floor, parts = HEIGHT - BOTTOM, []
    for y in y_ticks:
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, to_y(y), to_y(y))
        )
        parts.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                LEFT - 7, to_y(y) + 4, axes.y_text(y)
            )
        )
    for x in x_ticks:
        parts.append(
            Markup('<line class="axis" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(to_x(x), to_x(x), floor, floor + 4)
        )
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(to_x(x), floor + 18, f"{x:,g}")
        )
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, floor, floor))
    parts.append(
        Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}</text>').format(WIDTH - RIGHT, HEIGHT - 8, axes.x_label)
    )
    parts.append(Markup('<text class="name" x="{}" y="15">{}</text>').format(4, axes.y_label))
    words, height = ("↖ better", TOP + 8) if axes.higher_is_better else ("↙ better", floor - 8)
    parts.append(Markup('<text class="hint" x="{}" y="{}">{}</text>').format(LEFT + 6, height, words))
    return parts


def _front(points: Sequence[Point], places: Sequence[tuple[float, float, float]], higher_is_better: bool) -> Markup:
    corners: list[str] = []
    for i in pareto_front(points, higher_is_better):
        x, y, _ = places[i]
        if corners:
            corners.append(f"{x:.1f},{corners[-1].split(',')[1]}")
        corners.append(f"{x:.1f},{y:.1f}")
    corners.append(f"{WIDTH - RIGHT},{corners[-1].split(',')[1]}" if corners else "")
    return Markup('<polyline class="front" points="{}"/>').format(" ".join(corners))


def _bars(point: Point, to_x: Callable[[float], float], to_y: Callable[[float], float], dim: bool) -> list[tuple[Markup, Box]]:
    x, y = to_x(point.x), to_y(point.y)
    found: list[tuple[Markup, Box]] = []
    faded = " dim" if dim else ""
    shape = Markup('<line class="bar s{}{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    if point.y_interval:
        low, high = (to_y(v) for v in point.y_interval)
        found.append((shape.format(point.series, faded, x, x, low, high), (x - 1, high, x + 1, low)))
    if point.x_interval:
        left, right = (min(to_x(v), WIDTH) for v in point.x_interval)
        found.append((shape.format(point.series, faded, left, right, y, y), (left, y - 1, right, y + 1)))
    return found


def outline(shape: str, x: float, y: float, r: float) -> Markup:
    """A marker's shape, without class; squares and diamonds have the area of the circle."""
    if shape == "square":
        half = r * math.sqrt(math.pi) / 2
        return Markup('rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1"').format(
            x - half, y - half, 2 * half, 2 * half
        )
    if shape == "diamond":
        d = r * math.sqrt(math.pi / 2)
        path = f"M{x:.1f} {y - d:.1f}L{x + d:.1f} {y:.1f}L{x:.1f} {y + d:.1f}L{x - d:.1f} {y:.1f}Z"
        return Markup('path d="{}"').format(path)
    return Markup('circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}"').format(x, y, r)


def _bubble(point: Point, x: float, y: float, r: float, dim: bool) -> Markup:
    kind = "ghost" if point.ghost else "hollow" if point.hollow else "full"
    return Markup('<{} class="dot {} s{}{}"><title>{}</title></{}>').format(
        outline(point.shape, x, y, r), kind, point.series, " dim" if dim else "", point.tip or point.label,
        {"square": "rect", "diamond": "path"}.get(point.shape, "circle"),
    )  # fmt: skip


def _labels(
    points: Sequence[Point], places: Sequence[tuple[float, float, float]], bars: Sequence[Box], higher_is_better: bool
) -> list[Markup]:
    """Puts each label where it covers least, the most important ones first."""
    taken: list[Box] = []
    circles = [(x - r, y - r, x + r, y + r) for x, y, r in places]
    corner = TOP - 4 if higher_is_better else HEIGHT - BOTTOM - 20
    circles.append((LEFT + 4, corner, LEFT + 64, corner + LINE))  # where the hint stands
    parts = []
    done: list[int] = []
    order = sorted(range(len(points)), key=lambda i: (not points[i].strong, not points[i].hollow, i))
    for i in order:
        # One name is enough for the same step in two runtimes that lie on one another.
        if not points[i].label or any(
            points[j].label == points[i].label and math.dist(places[i][:2], places[j][:2]) < 9 for j in done
        ):
            continue
        done.append(i)
        text = points[i].label if len(points[i].label) <= 24 else points[i].label[:23] + "…"
        box, distance = _free_place(text, points[i].strong, places[i], taken, circles, bars)
        taken.append(box)
        x, y, r = places[i]
        if distance > 9:
            near_x, near_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
            away = math.hypot(near_x - x, near_y - y) or 1.0
            start = (x + (near_x - x) * r / away, y + (near_y - y) * r / away)
            parts.append(
                Markup('<line class="leader" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(*start, near_x, near_y)
            )
        parts.append(
            Markup('<text class="label{}" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(
                " strong" if points[i].strong else "", (box[0] + box[2]) / 2, box[3] - 3.5, escape(text)
            )
        )
    return parts


def _free_place(
    text: str,
    strong: bool,
    place: tuple[float, float, float],
    taken: Sequence[Box],
    circles: Sequence[Box],
    bars: Sequence[Box],
) -> tuple[Box, float]:
    x, y, r = place
    wide = len(text) * LETTER * (1.08 if strong else 1.0) + 4
    best: tuple[float, Box, float] | None = None
    for distance in (4.0, 9.0, 16.0, 26.0, 38.0, 52.0, 68.0, 86.0):
        for turn in range(16):
            angle = turn * math.tau / 16
            dx, dy = math.cos(angle), -math.sin(angle)
            cx = x + dx * (r + distance + wide / 2)
            cy = y + dy * (r + distance + LINE / 2)
            box = (cx - wide / 2, cy - LINE / 2, cx + wide / 2, cy + LINE / 2)
            if box[0] < LEFT + 1 or box[2] > WIDTH - 2 or box[1] < TOP - 8 or box[3] > HEIGHT - BOTTOM - 1:
                continue
            cost = 10 * sum(_overlap(box, b) for b in taken) + 4 * sum(_overlap(box, b) for b in circles)
            cost += 2 * sum(_overlap(box, b) for b in bars) + 1.2 * distance + 1.5 * min(turn % 8, 8 - turn % 8)
            if best is None or cost < best[0]:
                best = (cost, box, distance)
    if best is None:
        return (x, y - LINE, x + wide, y), 0.0
    return best[1], best[2]


def _overlap(a: Box, b: Box) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def marker(shape: str, series: int, kind: str = "full") -> Markup:
    """A marker by itself, for legends."""
    return Markup(
        '<svg class="key" viewBox="0 0 16 16" aria-hidden="true" focusable="false"><{} class="dot {} s{}"/></svg>'
    ).format(outline(shape, 8, 8, 5), kind, series)
