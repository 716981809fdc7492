"""What a report says in words (verdicts, bad news, where the speed came from), and the report for terminals.

The other views show the same words, so that a loss reads the same everywhere.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from mmcompress.report.alerts import Alert, Tone
from mmcompress.report.format import (
    BASELINE,
    MISSING,
    RUNTIMES,
    SAME_SHARE,
    MetricFormat,
    Scale,
    Speed,
    baseline_row,
    batches,
    bytes_scale,
    count_scale,
    faster,
    final_row,
    headline_metric,
    metric_format,
    ms_scale_of,
    row_name,
    seconds_text,
    smaller,
    speeds,
    times,
)
from mmcompress.report.schema import GateResult, Report, Row
from mmcompress.report.sections import all_alerts, all_sections
from mmcompress.report.views import text_grid
from mmcompress.report.warned import warned
from mmcompress.report.words import change_alerts, change_tone, leak_alerts

WIDTH = 110
UNSTEADY = 1.5
"""A 90th percentile this many times the median, or an interval half as wide as the median, is no steady timing."""
NEAR_CHANCE = 0.1
"""Below this share of the way from guessing to all right, a baseline is called hardly better than guessing."""
SYNTHETIC = "Synthetic: the model or the data are made up. The numbers show that the tool works, nothing about real data."


@dataclass(frozen=True)
class Chip:
    """One of the four verdicts that a report opens with."""

    label: str
    value: str
    details: tuple[str, ...]
    tone: Tone


def chips(report: Report) -> list[Chip]:
    """Parameters, disk, speed and quality of the final model against the baseline."""
    baseline, final, totals = baseline_row(report), final_row(report), report.totals
    parameters = totals.parameters_ratio
    disk = totals.disk_ratio
    if baseline and final:
        parameters = final.parameters / baseline.parameters if parameters is None and baseline.parameters else parameters
        disk = final.disk_bytes / baseline.disk_bytes if disk is None and baseline.disk_bytes else disk
    counts = count_scale(row.parameters for row in report.rows)
    sizes = bytes_scale(row.disk_bytes for row in report.rows)
    both = baseline is not None and final is not None
    return [
        _size_chip("Parameters", parameters, counts.arrow(baseline.parameters, final.parameters) if baseline and final else ""),
        _size_chip("Disk", disk, sizes.arrow(baseline.disk_bytes, final.disk_bytes) if baseline and final else ""),
        _speed_chip(report),
        _quality_chip(report) if both else Chip("Quality", "not measured", (), "neutral"),
    ]


def _size_chip(label: str, ratio: float | None, detail: str) -> Chip:
    if ratio is None:
        return Chip(label, "not measured", (), "neutral")
    tone: Tone = "good" if ratio < 1 - SAME_SHARE else "bad"
    if label == "Parameters" and abs(ratio - 1) < SAME_SHARE:
        tone = "neutral"  # quantization leaves them as they are; the disk is where it must show
    return Chip(label, smaller(ratio, less="fewer" if label == "Parameters" else "smaller",
                               more="more" if label == "Parameters" else "larger"), (detail,), tone)  # fmt: skip


def _speed_chip(report: Report) -> Chip:
    found = [s for s in speeds(report) if s.ratio is not None]
    if not found:
        rows = (baseline_row(report), final_row(report))
        if any(row and row.disturbed for row in rows):
            return Chip("Speed", "not known", ("other programs kept the machine busy",), "caution")
        return Chip("Speed", "not measured", (), "neutral")
    verdicts = {s.verdict for s in found}
    tone: Tone = "bad" if "slower" in verdicts else "good" if verdicts == {"faster"} else "neutral"
    lines = []
    for speed in found:
        ms = ms_scale_of(report, speed.batch)
        span = f": {ms.arrow(speed.before.p50, speed.after.p50)}" if speed.before and speed.after else ""
        verdict = "" if speed is found[0] and speed.verdict != "no clear difference" else f", {_speed_word(speed)}"
        lines.append(f"batch {speed.batch}{span}{verdict}")
    first = found[0]
    return Chip("Speed", _speed_word(first), tuple(lines), tone)


def _speed_word(speed: Speed) -> str:
    if speed.verdict == "no clear difference":
        return "no clear difference" if speed.ratio is None else f"no clear difference ({times(speed.ratio)})"
    return faster(speed.ratio)


def _quality_chip(report: Report) -> Chip:
    baseline, final, metric = baseline_row(report), final_row(report), headline_metric(report)
    change = final.change.get(metric) if final else None
    label = f"Quality: {metric}" if metric else "Quality"
    direction = metric_format(report, metric).direction
    label += f" ({direction})" if direction else ""
    if baseline is None or final is None or metric not in final.quality:
        return Chip(label, "not measured", (), "neutral")
    fmt = metric_format(report, metric)
    before = baseline.quality[metric].value if metric in baseline.quality else None
    span = f"{fmt.value(before)} → {fmt.value(final.quality[metric].value)}"
    if change is None:
        return Chip(label, fmt.value(final.quality[metric].value), (span, "no paired difference was taken"), "neutral")
    interval = f"95% interval {fmt.change_interval(change)}"
    return Chip(
        label,
        f"{fmt.change(change)}",
        (span, interval, f"{change.words}, n = {change.n:,}"),
        change_tone(change),
    )


def bad_news(report: Report) -> list[Alert]:
    """What speaks against the result besides gates (``gate_words`` has those), worst first."""
    alerts = leak_alerts(report.leaks)
    if not report.totals.finished:
        done = len({row.step for row in report.rows} - {BASELINE})
        alerts.append(
            Alert("bad", f"The run is not finished: {done} step{'s' * (done != 1)} measured so far, the rest is missing.")
        )
    undone = dict.fromkeys(row.step for row in report.rows if row.rolled_back)
    alerts += [Alert("bad", f"{s} was rolled back: it missed a gate, and the final model does not contain it.") for s in undone]
    alerts += _bad_totals(report) + all_alerts(report) + _near_chance(report) + _unsteady(report)
    final = final_row(report)
    if final is not None and final.loads_with == "mmcompress":
        alerts.append(Alert("caution", "The final model loads with mmcompress only, not with transformers alone."))
    alerts += warned(report)
    return sorted(alerts, key=lambda a: a.tone != "bad")


def _unsteady(report: Report) -> list[Alert]:
    """Timings that a ratio must not be taken from: the machine did something else meanwhile."""
    final = final_row(report)
    found = []
    for row in report.rows:
        for batch, t in row.latency_ms.items():
            if row.step not in (BASELINE, final.step if final else "") or t.p50 <= 0:
                continue
            if (t.p90 or 0.0) > UNSTEADY * t.p50 or t.high - t.low > (UNSTEADY - 1) * t.p50:
                ms = ms_scale_of(report, batch)
                span = f"median {ms(t.p50)}, {ms.bare(t.low)} to {ms.bare(t.high)}" + (f", p90 {ms.bare(t.p90)}" if t.p90 else "")
                found.append(f"{row_name(row)} at batch {batch} ({span})")
    if not found:
        return []
    words = f"The timing was unsteady: {'; '.join(found)}. The machine may have been busy with something else"
    return [Alert("caution", f"{words}; time again before quoting a speed.")]


def _near_chance(report: Report) -> list[Alert]:
    """A baseline that guesses has nothing to lose, so its small drop and its met gates say nothing."""
    baseline, metric = baseline_row(report), headline_metric(report)
    if baseline is None or metric != "accuracy" or metric not in baseline.quality or len(baseline.classes) < 2:
        return []
    many = len(baseline.classes)
    value, chance = baseline.quality[metric].value, 1 / many
    if (value - chance) / (1 - chance) >= NEAR_CHANCE:
        return []
    fmt = metric_format(report, metric)
    return [
        Alert(
            "caution",
            f"The baseline itself is hardly better than guessing: {fmt.value(value)}, and one of {many:,} classes "
            f"at random gives {fmt.value(chance)}. It has little to lose, so a small loss shows little.",
        )
    ]


def _bad_totals(report: Report) -> list[Alert]:
    alerts = []
    by_label = {chip.label: chip for chip in chips(report)}
    for label, what in (
        ("Parameters", "The final model has not fewer parameters"),
        ("Disk", "The final model is not smaller on disk"),
    ):
        chip = by_label[label]
        if chip.tone == "bad":
            alerts.append(
                Alert("bad", f"{what}: {chip.value}, {chip.details[0]}." if chip.details[0] else f"{what}: {chip.value}.")
            )
    for speed in speeds(report):
        if speed.verdict == "slower":
            alerts.append(
                Alert("bad", f"The final model is slower than the baseline at batch {speed.batch}: {faster(speed.ratio)}.")
            )
        elif speed.verdict == "no clear difference":
            alerts.append(
                Alert(
                    "caution",
                    f"No clear difference in speed at batch {speed.batch}: it is within the noise of the timing.",
                )
            )
    final = final_row(report)
    for metric, change in final.change.items() if final else ():
        alerts += change_alerts(metric_format(report, metric), change)
    return alerts


def speed_words(report: Report, speed: Speed) -> str:
    """Where the speed at one batch size came from, as one sentence; what was not measured is said."""
    gain = speed.gain
    head = f"Batch {speed.batch}: "
    if gain is None or gain.total is None:
        return f"{head}{faster(speed.ratio)} in all; not taken apart."
    torch = ""
    if gain.compression_torch is not None:
        word = faster(gain.compression_torch).replace("same speed", "as fast as before")
        torch = f" In PyTorch alone, the compressed model is {word}."
    if gain.runtime is None or gain.compression is None:
        return f"{head}{faster(gain.total)} in all; the runtime's share was not measured.{torch}"
    slower = [" (slower)" if part < 1 - SAME_SHARE else "" for part in (gain.runtime, gain.compression, gain.total)]
    parts = f"{times(gain.runtime)}{slower[0]} from ONNX Runtime without any compression"
    parts += f", times {times(gain.compression)}{slower[1]} from compression"
    product = gain.runtime * gain.compression
    if speed.runtime != "onnxruntime" and product > 0 and abs(gain.total / product - 1) > 0.02:
        where = (
            f"running in {RUNTIMES[speed.runtime]}" if speed.runtime and speed.runtime != "onnxruntime" else "the final runtime"
        )
        parts += f", times {times(gain.total / product)} from {where}"
    total = f"{times(gain.total)}{slower[2]} in all"
    ms = ms_scale_of(report, speed.batch)
    span = f" ({ms.arrow(speed.before.p50, speed.after.p50)})" if speed.before and speed.after else ""
    return f"{head}{parts}, is {total}{span}.{torch}"


def _gate_text(gate: GateResult) -> str:
    # The words may end in the verdict, which is said before them.
    words = gate.words.replace(f": {gate.verdict}", "", 1)
    return f"{gate.verdict}: {words} ({gate.step}, {RUNTIMES.get(gate.runtime, gate.runtime)})"


def gate_words(report: Report) -> list[Alert]:
    """Each gate with its verdict, met ones included, the worst ones first."""
    tones: dict[str, Tone] = {"met": "good", "missed": "bad", "not shown": "caution"}
    gates = sorted(report.gates, key=lambda g: ("missed", "not shown", "met").index(g.verdict))
    return [Alert(tones[g.verdict], _gate_text(g)) for g in gates]


def render_text(report: Report, width: int | None = None, folder: Path | None = None) -> str:
    """The report for a terminal.

    Args:
        width: in characters, 110 where it is left out. Columns are left out, and named, where the table is wider.
        folder: the run's folder, where it is known.
    """
    width = width or WIDTH
    blocks = [_wrap(report.totals.headline, width)]
    if report.totals.synthetic:
        blocks.append(_wrap(SYNTHETIC, width))
    blocks.append(_table(report, width))
    words = [speed_words(report, s) for s in speeds(report) if s.ratio is not None]
    if words:
        blocks.append("Where the speed came from\n" + "\n".join(_bullet("", w, width) for w in words))
    gates = gate_words(report)
    if gates:
        blocks.append("Gates\n" + "\n".join(_bullet("!" if g.tone != "good" else "", g.text, width) for g in gates))
    rest = bad_news(report)
    if rest:
        blocks.append("What to know\n" + "\n".join(_bullet("!" if a.tone == "bad" else "", a.text, width) for a in rest))
    blocks += [f"{s.title}\n{s.text.strip()}" for s in all_sections(report, folder) if s.text.strip()]
    notes = [f"{row_name(row)}: {note}" for row in report.rows for note in row.notes]
    if notes:
        blocks.append("Notes\n" + "\n".join(_bullet("", note, width) for note in notes))
    if report.totals.seconds:
        blocks.append(f"The steps took {seconds_text(report.totals.seconds)}.")
    return "\n\n".join(blocks) + "\n"


def _wrap(text: str, width: int, indent: str = "", then: str = "") -> str:
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=then, break_on_hyphens=False)


def _bullet(mark: str, text: str, width: int) -> str:
    return _wrap(text, width, indent=f"{mark or '-'} ", then="  ")


def _table(report: Report, width: int) -> str:
    if not report.rows:
        return "Nothing has been measured yet."
    columns = _columns(report)
    spare = [title for title in columns if title.startswith(("params", "batch"))]
    spare = [*reversed(spare[2:]), *spare[:2]]  # later batch sizes go first, then parameters, then the first batch size
    dropped: list[str] = []
    while max(map(len, (text := _grid(columns)).splitlines())) > width and spare:
        dropped.append(spare.pop(0))
        columns.pop(dropped[-1])
    marks = [f"{mark} {words}" for mark, words in _marks(report).items() if any(c.endswith(mark) for c in columns["step"])]
    legend = "Intervals are 95%. Speed-ups and shares are against the baseline in PyTorch; differences are paired."
    metric = headline_metric(report)
    if metric and metric_format(report, metric).direction:
        legend += f" Of {metric}, {metric_format(report, metric).direction}: a change below zero is an improvement."
    lines = [text, _wrap(". ".join([*marks, legend]), width)]
    if dropped:
        lines.append(_wrap("Left out for width: " + ", ".join(t.split("\n")[0] for t in dropped) + ".", width))
    return "\n".join(lines)


def _marks(report: Report) -> dict[str, str]:
    return {"*": "Final model" if report.totals.finished else "Last step so far", "~": "Rolled back"}


def _grid(columns: dict[str, list[str]]) -> str:
    words = [i for i, title in enumerate(columns) if title in ("step", "runtime")]
    return text_grid(list(columns), list(zip(*columns.values(), strict=True)), words)


def _columns(report: Report) -> dict[str, list[str]]:
    rows, baseline, final = report.rows, baseline_row(report), final_row(report)
    sizes, counts = bytes_scale(r.disk_bytes for r in rows), count_scale(r.parameters for r in rows)
    marks = {True: " *", False: ""}
    columns = {
        "step": [r.step + (" ~" if r.rolled_back else marks[r is final and r.step != BASELINE]) for r in rows],
        "runtime": [r.runtime if r.precision == "float32" else f"{r.runtime}\n{r.precision}" for r in rows],
        f"params\n{counts.unit}".rstrip(): [counts.bare(r.parameters) for r in rows],
        f"disk, {sizes.unit}\n(share)": [_share(sizes, r, baseline) for r in rows],
    }
    for batch in batches(report):
        ms = ms_scale_of(report, batch)
        columns[f"batch {batch}, ms\n(speed-up)"] = [_latency(ms, r, baseline, batch) for r in rows]
    metric = headline_metric(report)
    if metric:
        fmt = metric_format(report, metric)
        columns[f"{fmt.title}\n[interval]"] = [_quality(fmt, r) for r in rows]
        columns[f"change, {fmt.unit}\n[interval]" if fmt.unit else "change\n[interval]"] = [_change(fmt, r) for r in rows]
    return columns


def _share(sizes: Scale, row: Row, baseline: Row | None) -> str:
    share = f" ({row.disk_bytes / baseline.disk_bytes:.0%})" if baseline and baseline.disk_bytes and row is not baseline else ""
    return sizes.bare(row.disk_bytes) + share


def _latency(ms: Scale, row: Row, baseline: Row | None, batch: str) -> str:
    found = row.latency_ms.get(batch)
    before = baseline.latency_ms.get(batch) if baseline else None
    if found is None:
        return MISSING
    speedup = f" ({before.p50 / found.p50:.1f}x)" if before and found.p50 > 0 and row is not baseline else ""
    return ms.bare(found.p50) + speedup


def _quality(fmt: MetricFormat, row: Row) -> str:
    found = row.quality.get(fmt.name)
    return f"{fmt.bare(found.value)} [{fmt.bare(found.low)},{fmt.bare(found.high)}]" if found else MISSING


def _change(fmt: MetricFormat, row: Row) -> str:
    found = row.change.get(fmt.name)
    return f"{fmt.signed(found.difference)} [{fmt.change_interval(found, ',')}]" if found else MISSING
