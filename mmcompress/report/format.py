"""Numbers as words, and the look-ups that every view of a report shares.

All strings are plain ASCII-friendly text ("-0.6", "2.79x"); the HTML view puts typographic signs in afterwards. A value
that was not measured is written ``MISSING``, never as zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jinja2

from mmcompress.report.schema import Change, Gain, Latency, Quality, Report, Row

MISSING = "\N{EN DASH}"
BASELINE = "baseline"
RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

_BYTES = ((1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))
_COUNTS = ((1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T"))
_FLOPS = ((1.0, "FLOPs"), (1e3, "kFLOPs"), (1e6, "MFLOPs"), (1e9, "GFLOPs"), (1e12, "TFLOPs"))

LONG_LIST = 8
"""Lists with more entries are cut in the views; report.json has all of them."""
SAME_SHARE = 0.005
"""Ratios nearer to 1 than this are called the same: they would be printed as 0%."""


SPEED_NOISE = 0.03
"""Medians nearer than this are not told apart: an interval knows one process only, and processes differ among themselves."""


@dataclass(frozen=True)
class Scale:
    """One unit and one number of decimals for a whole column, so that its decimals line up."""

    divisor: float
    unit: str
    decimals: int

    def bare(self, value: float | None) -> str:
        """The number without its unit."""
        return MISSING if value is None else f"{value / self.divisor:,.{self.decimals}f}"

    def __call__(self, value: float | None) -> str:
        """The number with its unit."""
        return MISSING if value is None else f"{self.bare(value)} {self.unit}".rstrip()

    def arrow(self, before: float | None, after: float | None) -> str:
        """``"14.4 -> 4.2 MB"``, both in the same unit."""
        return f"{self.bare(before)} → {self(after)}"


def _scale(values: Iterable[float | None], units: Sequence[tuple[float, str]]) -> Scale:
    known = [abs(v) for v in values if v]
    if not known:
        return Scale(*units[0], 0)
    divisor, unit = next((u for u in reversed(units) if max(known) >= u[0]), units[0])
    return Scale(divisor, unit, 0 if divisor == 1 else _decimals(min(known) / divisor, 2))


def _decimals(smallest: float, most: int) -> int:
    """Decimals that leave the smallest number of a column three digits where ``most`` allows it."""
    return max(0, min(most, 2 - math.floor(math.log10(smallest))))


def bytes_scale(values: Iterable[float | None]) -> Scale:
    """For bytes; 1 MB is 10^6 bytes."""
    return _scale(values, _BYTES)


def count_scale(values: Iterable[float | None]) -> Scale:
    """For parameters: k, M, B."""
    return _scale(values, _COUNTS)


def flops_scale(values: Iterable[float | None]) -> Scale:
    """For floating point operations of one example."""
    return _scale(values, _FLOPS)


def ms_scale(values: Iterable[float | None]) -> Scale:
    """For milliseconds: two digits are more than most clocks repeat."""
    known = [v for v in values if v]
    return Scale(1.0, "ms", max(1, _decimals(min(known) * 10, 3)) if known else 1)


def seconds_text(seconds: float) -> str:
    """``"0.4 s"``, ``"38 s"``, ``"3 min 20 s"``, ``"2 h 5 min"``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def smaller(ratio: float | None, less: str = "smaller", more: str = "larger") -> str:
    """A ratio to the baseline in words: ``"71% smaller"``, ``"12% larger"``, ``"unchanged"``."""
    if ratio is None:
        return MISSING
    if abs(ratio - 1) < SAME_SHARE:
        return "unchanged"
    if ratio >= 2:
        return f"{ratio:.1f}x as large"
    # Nothing is ever 100% smaller: a tiny rest keeps its decimals.
    share = abs(1 - ratio) * 100
    return f"{share:.{0 if share < 99 else 1}f}% {less if ratio < 1 else more}"


def faster(ratio: float | None) -> str:
    """A ratio of times, baseline over this, in words: ``"2.79x faster"``, ``"1.25x slower"``, ``"same speed"``."""
    if ratio is None or ratio <= 0:
        return MISSING
    if abs(ratio - 1) < SAME_SHARE:
        return "same speed"
    return f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x slower"


def times(ratio: float | None) -> str:
    """``"2.79x"``."""
    return MISSING if ratio is None else f"{ratio:.2f}x"


def speed_verdict(before: Latency | None, after: Latency | None) -> str:
    """``faster`` or ``slower`` where the intervals of the medians are apart by more than noise, else ``no clear difference``."""
    if before is None or after is None:
        return ""
    if after.high < before.low and after.p50 < before.p50 * (1 - SPEED_NOISE):
        return "faster"
    if after.low > before.high and after.p50 > before.p50 * (1 + SPEED_NOISE):
        return "slower"
    return "no clear difference"


@dataclass(frozen=True)
class MetricFormat:
    """How one metric is written: as percent, as points (times 100 without a sign) or plain; differences of the first two are
    in points.
    """

    name: str
    kind: Literal["percent", "points", "plain"]
    decimals: int
    higher_is_better: bool

    @property
    def unit(self) -> str:
        """The unit of a difference."""
        return "" if self.kind == "plain" else "points"

    @property
    def scale(self) -> float:
        """What a value is multiplied with before it is written."""
        return 1.0 if self.kind == "plain" else 100.0

    @property
    def title(self) -> str:
        """The name with its unit, for axes: ``"accuracy, %"``."""
        return f"{self.name}, %" if self.kind == "percent" else self.name

    @property
    def direction(self) -> str:
        """What must be said where a reader would take more for better."""
        return "" if self.higher_is_better else "lower is better"

    def bare(self, value: float) -> str:
        """A value without its unit."""
        return _no_minus_zero(f"{value * self.scale:.{self.decimals}f}")

    def value(self, value: float | None) -> str:
        """``"86.9%"``."""
        return MISSING if value is None else self.bare(value) + ("%" if self.kind == "percent" else "")

    def interval(self, found: Quality) -> str:
        """``"85.4 to 88.3"``."""
        return f"{self.bare(found.low)} to {self.bare(found.high)}"

    def signed(self, value: float) -> str:
        """A difference: ``"+0.3"``."""
        text = self.bare(value)
        return text if text.startswith("-") or float(text) == 0 else f"+{text}"

    def change(self, change: Change) -> str:
        """``"-0.6 points"``."""
        return f"{self.signed(change.difference)} {self.unit}".rstrip()

    def change_interval(self, change: Change, between: str = " to ") -> str:
        """``"-1.1 to +0.1"``; an end that is not zero keeps the decimals that show on which side of zero it lies."""
        return f"{self._end(change.low)}{between}{self._end(change.high)}"

    def _end(self, value: float) -> str:
        finer = (replace(self, decimals=self.decimals + more) for more in range(4))
        texts = [f.signed(value) for f in finer]
        return texts[0] if value == 0 else next((t for t in texts if float(t) != 0), texts[0])


def _no_minus_zero(text: str) -> str:
    return text.removeprefix("-") if float(text) == 0 else text


def metric_format(report: Report, metric: str) -> MetricFormat:
    """How a report's metric is written: as the report says, else told from its numbers."""
    found = [q for row in report.rows if (q := row.quality.get(metric))]
    kind = report.units.get(metric) or ("percent" if all(0 <= q.value <= 1 for q in found) else "plain")
    decimals = 3 if kind == "plain" else 1 if max((q.n for q in found), default=0) < 10_000 else 2
    return MetricFormat(metric, kind, decimals, metric not in report.lower_is_better)


def baseline_row(report: Report, runtime: str | None = None) -> Row | None:
    """The baseline in a runtime; without one, the one that all differences are taken to: torch, else the first."""
    rows = [row for row in report.rows if row.step == BASELINE]
    if runtime is None:
        rows.sort(key=lambda row: row.runtime != "torch")
    else:
        rows = [row for row in rows if row.runtime == runtime]
    return rows[0] if rows else None


def final_row(report: Report) -> Row | None:
    """The row that the run ends with: what the totals name, else the last one that was kept and is no baseline."""
    kept = [row for row in report.rows if row.step != BASELINE and not row.rolled_back]
    totals = report.totals
    named = [row for row in report.rows if row.step == totals.final_step and row.runtime in (totals.final_runtime or row.runtime)]
    return named[0] if named else (kept[-1] if kept else None)


def headline_metric(report: Report) -> str:
    """The metric that the report leads with, or an empty string."""
    if report.totals.metric:
        return report.totals.metric
    return next(iter(report.metrics), next((m for row in report.rows for m in row.quality), ""))


def batches(report: Report) -> list[str]:
    """All batch sizes that were timed, small ones first."""
    found = {b for row in report.rows for b in (*row.latency_ms, *(k for c in row.components.values() for k in c.latency_ms))}
    return sorted(found, key=lambda b: (int(b) if b.isdigit() else math.inf, b))


@dataclass(frozen=True)
class Speed:
    """The final model's speed at one batch size against the baseline in torch."""

    batch: str
    before: Latency | None
    after: Latency | None
    runtime: str
    ratio: float | None
    verdict: str
    gain: Gain | None


def ms_scale_of(report: Report, batch: str) -> Scale:
    """One number of decimals for all medians at a batch size."""
    return ms_scale(row.latency_ms[batch].p50 for row in report.rows if batch in row.latency_ms)


def speeds(report: Report) -> list[Speed]:
    """The speed at each batch size, in the runtime that the totals are about; none where the machine was busy meanwhile."""
    baseline, final = baseline_row(report), final_row(report)
    if (baseline and baseline.disturbed) or (final and final.disturbed):
        return []
    found = []
    for batch in batches(report):
        before = baseline.latency_ms.get(batch) if baseline else None
        gain = report.totals.speedup.get(batch)
        ratio = gain.total if gain else None
        rows = [r for r in report.rows if final and r.step == final.step and batch in r.latency_ms]
        row = _timed_row(rows, final, before, ratio, batch)
        after = row.latency_ms[batch] if row else None
        if ratio is None and before and after and after.p50 > 0:
            ratio = before.p50 / after.p50
        verdict = gain.verdict if gain and gain.verdict else speed_verdict(before, after)
        if before is None or after is None:
            if ratio is None:
                continue
            verdict = "faster" if ratio > 1 + SAME_SHARE else "slower" if ratio < 1 - SAME_SHARE else "no clear difference"
        found.append(Speed(batch, before, after, row.runtime if row else "", ratio, verdict, gain))
    return found


def _timed_row(rows: Sequence[Row], final: Row | None, before: Latency | None, ratio: float | None, batch: str) -> Row | None:
    """The row of the final step that a total speaks of: the one it fits, else the final row itself."""
    if not rows or final is None:
        return None
    if before is None or ratio is None:
        return final if final in rows else rows[0]
    return min(rows, key=lambda r: abs(before.p50 / r.latency_ms[batch].p50 - ratio) if r.latency_ms[batch].p50 > 0 else math.inf)


def row_name(row: Row) -> str:
    """``"3-quantize in ONNX Runtime"``."""
    return f"{row.step} in {RUNTIMES[row.runtime]}"


def plain(value: Any) -> str:
    """A JSON value in one line, for facts and settings that no view knows by name."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, dict):
        inner = ((k, f"({plain(v)})" if isinstance(v, dict) and v else plain(v)) for k, v in value.items())
        return ", ".join(f"{k}: {v}" for k, v in inner) or "none"
    if isinstance(value, list | tuple):
        if len(value) > LONG_LIST:
            return f"{', '.join(plain(v) for v in value[:3])}, ... ({len(value):,} in all)"
        return ", ".join(plain(v) for v in value) or "none"
    return str(value)


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested dictionary as lines of dotted keys and plain values."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines += flat(value, f"{prefix}{key}.")
        else:
            # Environments hold versions and settings: thousands separators would misquote them.
            lines.append((f"{prefix}{key}", str(value) if type(value) is int else plain(value)))
    return lines


@functools.cache
def _templates(filters: frozenset[tuple[str, Callable[..., Any]]]) -> jinja2.Environment:
    """Keeps templates compiled, which takes longer than filling them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is None or ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    return environment


def fill_template(name: str, filters: Mapping[str, Callable[..., Any]], values: dict[str, Any]) -> str:
    """Fills a template of this package; names with ``.html`` in them escape every value."""
    return _templates(frozenset(filters.items())).get_template(name).render(values)
