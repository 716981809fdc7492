"""Speed as MLPerf Inference names it: single stream, offline, end to end; starting, memory, energy, cost, and the noise."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup, escape

from mmcompress.report.alerts import Alert
from mmcompress.report.format import MISSING, baseline_row, final_row, ms_scale, row_name
from mmcompress.report.schema import BUSY_CORES, Report, Row
from mmcompress.report.schema_speed import Latency, Ratio, Served, Timing, speed_verdict_of
from mmcompress.report.sections import Section
from mmcompress.report.tables import Cell, Table
from mmcompress.report.views import escape_markdown, html_table, markdown_table, text_table

ORDER = 5
LOUD = 1.03
"""Where a model against itself may differ by more than this, the reader is told on the first screen."""
WIDTH = 110
AGAIN = "Delete measurements/side-by-side.json in the run's folder and run again on an idle machine."


def alerts(report: Report) -> list[Alert]:
    """What disturbed the timing, and noise that hides differences."""
    found: list[Alert] = []
    timing = report.timing
    if timing is None:
        for row in {id(r): r for r in (baseline_row(report), final_row(report)) if r is not None and r.disturbed}.values():
            text = f"Other programs used {row.busy_cores:.1f} cores while {row_name(row)} was timed: no speed is quoted."
            found.append(Alert("bad", text))
        return found
    if timing.busy_cores > BUSY_CORES:
        text = f"Other programs used {timing.busy_cores:.1f} cores while the models were timed side by side: no speed is quoted."
        found.append(Alert("bad", f"{text} {AGAIN}"))
    elif timing.idle_cores > BUSY_CORES:
        text = f"Models that were to wait used {timing.idle_cores:.1f} cores while another was timed: no speed is quoted."
        found.append(Alert("bad", f"{text} Is OMP_WAIT_POLICY set? {AGAIN}"))
    else:
        loud = {batch: noise.band[1] for batch, noise in report.noise.items() if noise.band[1] > LOUD}
        if loud:
            said = ", ".join(f"{band - 1:.0%} at batch {batch}" for batch, band in loud.items())
            text = f"The timing was noisy: the baseline against itself may differ by {said}; smaller differences cannot be seen."
            found.append(Alert("caution", text))
    if timing.left_out:
        found.append(Alert("caution", f"Not timed side by side: {'; '.join(timing.left_out)}."))
    return found


def section(report: Report, folder: Path | None) -> Section | None:
    """Tables of the models that were timed side by side; None where none were."""
    timing = report.timing
    rows = [row for row in report.rows if row.served is not None and not row.rolled_back]
    if timing is None or not rows:
        return None
    tables = [ratios_table(report, rows), scenarios_table(rows, timing)]
    words = sentences(report, timing)
    html = Markup("").join(
        [
            *(html_table(table) for table in tables),
            Markup("<ul>"),
            *(Markup("<li>{}</li>").format(escape(word)) for word in words),
            Markup("</ul>"),
        ]
    )
    markdown = "\n\n".join([*(markdown_table(table) for table in tables), "\n".join(f"- {escape_markdown(w)}" for w in words)])
    narrow = text_table(tables[0])
    ratios = [narrow] if max(map(len, narrow.splitlines())) <= WIDTH else _flat(tables[0])
    text = "\n\n".join([*ratios, *_flat(tables[1])])
    return Section("serving", "Single stream, offline, end to end", html, markdown, text)


def _flat(table: Table) -> list[str]:
    """A wide table as lines for a terminal: one block for each model."""
    found = []
    for row in table.rows:
        block = [row[0].text]
        for (group, title), cell in list(zip(table.columns, row, strict=True))[1:]:
            if cell.text not in ("", MISSING):
                name = f"{group}, {title}" if group else title
                block.append(f"  {name}: {' '.join([cell.text, *cell.small])}"[:WIDTH])
        found.append("\n".join(block))
    return found


def ratios_table(report: Report, rows: list[Row]) -> Table:
    """For each model its time and how many times as fast as the baseline it is; the baseline against itself as last line."""
    batches = list(report.noise) or list(rows[0].latency_ms)
    baseline = baseline_row(report)
    columns = [("", "model")]
    for batch in batches:
        columns += [(f"batch {batch}", "median, ms"), (f"batch {batch}", "times as fast [95%]")]
    lines = []
    for row in rows:
        line = [Cell(row_name(row))]
        for batch in batches:
            ms = ms_scale(r.latency_ms[batch].p50 for r in rows if batch in r.latency_ms)
            latency, ratio = row.latency_ms.get(batch), row.served.ratio.get(batch) if row.served else None
            line.append(Cell(ms.bare(latency.p50), _small(latency)) if latency else Cell(MISSING))
            line.append(_ratio(ratio, report.noise.get(batch)) if ratio else Cell("1" if row is baseline else MISSING))
        lines.append(tuple(line))
    if report.noise:
        line = [Cell("noise: the baseline against itself")]
        for batch in batches:
            line += [Cell(""), _ratio(report.noise[batch], None, judged=False)]
        lines.append(tuple(line))
    return Table("serving-ratios", "Timed side by side, taking turns", tuple(columns), tuple(lines))


def _small(latency: Latency) -> tuple[str, ...]:
    shown = [f"{name} {value:.2f}" for name, value in (("p90", latency.p90), ("p99", latency.p99)) if value is not None]
    return (*shown, f"n = {latency.n:,}")


def _ratio(ratio: Ratio, noise: Ratio | None, judged: bool = True) -> Cell:
    span = f"[{ratio.low:.2f}, {ratio.high:.2f}]"
    if not judged:
        return Cell(f"{ratio.ratio:.3f}", (f"[{ratio.low:.3f}, {ratio.high:.3f}]",))
    verdict = speed_verdict_of(ratio, noise)
    tone = {"faster": "good", "slower": "bad"}.get(verdict, "")
    return Cell(f"{ratio.ratio:.2f}", (span, verdict), tone)


def scenarios_table(rows: list[Row], timing: Timing) -> Table:
    """One line a model: the scenarios, starting, memory, energy and cost."""
    columns = (
        ("", "model"),
        ("", "offline, examples/s"),
        ("", "file to answer, ms"),
        ("", "of it preparing, ms"),
        ("", "first inference, ms"),
        ("", "load, s"),
        ("", "start, s"),
        ("", "peak memory, MB"),
        ("", "energy, J an example"),
        ("", f"cost of a million, {timing.currency}".rstrip(", ")),
    )
    shown = [column for i, column in enumerate(columns) if (i != 8 or not timing.energy) and (i != 9 or timing.price_per_hour)]
    lines = []
    for row in rows:
        served = row.served or Served()
        end = served.end_to_end
        cells = {
            "model": Cell(row_name(row)),
            "offline, examples/s": Cell(f"{served.offline.examples_per_second:,.0f}", (f"batch {served.offline.batch_size}",))
            if served.offline
            else Cell(MISSING),
            "file to answer, ms": Cell(f"{end.total_ms.p50:.2f}", _small(end.total_ms)) if end else Cell(MISSING),
            "of it preparing, ms": Cell(f"{end.preprocess_ms.p50:.2f}") if end else Cell(MISSING),
            "first inference, ms": Cell(_number(row.first_inference_ms, 1)),
            "load, s": Cell(_number(row.load_seconds, 2)),
            "start, s": Cell(_number(row.start_seconds, 2)),
            "peak memory, MB": Cell(_number(row.peak_memory_bytes and row.peak_memory_bytes / 1e6, 0)),
            "energy, J an example": Cell("; ".join(f"batch {b}: {j:.3g}" for b, j in served.joules.items()) or MISSING),
        }
        cost = served.cost_per_million
        parts = {"one by one": cost.single_stream, "offline": cost.offline} if cost else {}
        text = "; ".join(f"{name} {value:,.2f}" for name, value in parts.items() if value is not None)
        cells[columns[9][1]] = Cell(text or MISSING)
        lines.append(tuple(cells[title] for _, title in shown))
    return Table("serving-scenarios", "What serving takes", tuple(shown), tuple(lines))


def _number(value: float | None, decimals: int) -> str:
    return MISSING if value is None else f"{value:,.{decimals}f}"


def sentences(report: Report, timing: Timing) -> list[str]:
    """What the numbers mean and how they were taken."""
    rounds = ", ".join(f"{count} rounds at batch {batch}" for batch, count in timing.rounds.items())
    cores = f", on cores {', '.join(map(str, timing.affinity))}" if timing.affinity else ""
    features = ", ".join(report.environment.get("cpu_features", []))
    found = [
        f"Each model ran in a process of its own with {timing.threads} threads{cores}"
        + (f" ({features})" if features else "")
        + f"; only one computed at a time, in turns of a few calls: {rounds}. Ratios are taken round by round (Hodges-Lehmann, "
        "with the interval of Wilcoxon's signed-rank test), so that what slows the machine for a while touches both.",
        f"Other programs used {timing.busy_cores:.2f} cores meanwhile, the models that waited {timing.idle_cores:.2f}.",
    ]
    if report.noise:
        found.append(
            "The noise is the baseline as two processes of the same file. A ratio is called a difference only where its whole "
            "interval lies outside of that of the noise, taken to both sides of 1."
        )
    found += [
        "Single stream: queries of one example, one after another. Offline: all examples at hand, at the best of the batch sizes "
        "that were tried. File to answer: from the bytes of a picture or recording and a text, through decoding and preparing, "
        "to the outputs of all components.",
        "A percentile is shown where enough calls were timed that the share of slower ones is known to within half of itself "
        "(139 for p90, 1,522 for p99; MLPerf's formula, which asks for a twentieth).",
        "First inference, load and start are of a fresh process whose files the system had in memory: load is the model alone, "
        "start is everything from the start of the process until the model is loaded.",
    ]
    energy = f"Energy: not known; {timing.energy}." if timing.energy else (
        "Energy is that of the processor's whole packages, with what they need when idle and what other programs used."
    )  # fmt: skip
    found.append(energy)
    if timing.price_per_hour:
        found.append(f"Cost: at {timing.price_per_hour:g} {timing.currency} for an hour of this machine, as the recipe says.")
    return found
