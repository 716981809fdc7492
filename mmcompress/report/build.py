"""From measured rows to the report: gates, notes, the gain taken apart, the headline."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mmcompress.recipe import Gate
from mmcompress.report.schema import Gain, GateResult, Row, Totals
from mmcompress.report.schema_speed import Headline, speed_verdict_of
from mmcompress.report.words import change_note


def judge(gate: Gate, row: Row, lower_is_better: Collection[str] = ()) -> GateResult:
    """Judges one gate on one row by the whole 95% interval.

    Args:
        lower_is_better: metrics that count mistakes: there a rise is what `max_drop` bounds.
    """
    lower = gate.metric in lower_is_better
    if gate.max_drop is not None:
        change = row.change.get(gate.metric)
        # The baseline itself has no change; it meets every drop.
        difference, low, high = (change.difference, change.low, change.high) if change else (0.0, 0.0, 0.0)
        limit, what = gate.max_drop if lower else -gate.max_drop, f"{gate.metric} changed by {_points(difference)} points"
        said = f"it may rise by at most {gate.max_drop:g} points" if lower else f"at most {gate.max_drop:g} points may be lost"
    else:
        value, most = row.quality[gate.metric], gate.max_value is not None
        low, high, limit = value.low, value.high, (gate.max_value if most else gate.min_value) or 0.0
        what, said = f"{gate.metric} is {100 * value.value:.2f}", f"at {'most' if most else 'least'} {limit:g} is asked for"
        lower = most
    met, missed = (100 * high <= limit, 100 * low > limit) if lower else (100 * low >= limit, 100 * high < limit)
    verdict = "met" if met else "missed" if missed else "not shown"
    interval = (
        f"95% interval {_points(low)} to {_points(high)}" if gate.max_drop is not None else f"{100 * low:.2f} to {100 * high:.2f}"
    )
    words = f"{what} ({interval}); {said}: {verdict}"
    if verdict == "not shown":
        words += " (the interval holds the limit; more evaluation examples would decide)"
    return GateResult(
        metric=gate.metric,
        step=row.step,
        runtime=row.runtime,
        max_drop=gate.max_drop,
        min_value=gate.min_value,
        max_value=gate.max_value,
        verdict=verdict,
        words=words,
        on_miss=gate.on_miss,
    )


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def shipping_row(rows: Sequence[Row], step: str, makes_files: bool) -> Row:
    """The row that stands for a step: the ONNX one where the step made ONNX files, else torch (or what there is)."""
    own = [row for row in rows if row.step == step]
    wanted = "onnxruntime" if makes_files else "torch"
    return next((row for row in own if row.runtime == wanted), own[0])


def add_notes(row: Row, before: Row | None, shrinks: bool) -> None:
    """Says in words where a step made the model slower, larger, or no smaller than the same runtime's row before it."""
    if before is None:
        return
    if row.disk_bytes >= before.disk_bytes and row.parameters >= before.parameters and shrinks:
        row.notes.append(f"Not smaller than {before.step}: {before.disk_bytes:,} bytes before, {row.disk_bytes:,} now.")
    for batch, now in row.latency_ms.items():
        if row.disturbed or before.disturbed:
            break
        was = before.latency_ms.get(batch)
        if was is None:
            continue
        # Two processes that time the same file differ by several percent: the interval of one process's median is too narrow.
        if now.low > was.high and now.p50 > 1.1 * was.p50:
            row.notes.append(
                f"Slower than {before.step} at batch {batch}: {now.p50:.2f} ms against {was.p50:.2f} ms, "
                f"{now.p50 / was.p50:.2f}x."
            )
    for name, found in row.parity.items():
        if found.min_cosine < 0.9:
            row.notes.append(
                f"{name}: on at least one real example the output has a cosine of only {found.min_cosine:.3f} with torch's."
            )
    if row.runtime == "torch" and (saved := row.facts.get("teacher_seconds_saved", 0)) > 0:
        asked, known = row.facts["teacher_examples"], row.facts["teacher_cache_hits"]
        row.notes.append(
            f"The teacher was asked for {asked:,} examples, and {known:,} times its answer was known: about "
            f"{saved:.1f} of {saved + row.facts['teacher_seconds']:.1f} s of its time were saved."
        )
    for metric, change in row.change.items():
        if note := change_note(metric, change):
            row.notes.append(note)


def totals(
    rows: Sequence[Row],
    *,
    name: str,
    metric: str,
    final: Row | None,
    finished: bool,
    synthetic: bool,
    lower_is_better: Collection[str] = (),
    caveat: str = "",
    timed: Headline | None = None,
) -> Totals:
    """The run in a few numbers.

    Args:
        timed: what timing the models side by side gave; without it ratios are those of the rows' medians.
        metric: the task's headline metric.
        final: the row of the model that the run ends with; None where nothing but the baseline was measured.
        caveat: what makes the quality not to be believed, for the headline.
    """
    baseline = next((row for row in rows if row.step == "baseline" and row.runtime == "torch"), rows[0] if rows else None)
    seconds = sum({row.step: row.seconds for row in rows}.values())
    if baseline is None or final is None:
        text = f"{name}: not finished; nothing was compressed yet" if not finished else f"{name}: no pass was run"
        text += f"; quality is overstated ({caveat})." if caveat else "."
        return Totals(headline=text, finished=finished, metric=metric, seconds=seconds, synthetic=synthetic)
    gains = {batch: _gain(rows, final, batch, timed) for batch in final.latency_ms}
    return Totals(
        headline=_headline(name, baseline, final, gains, metric, finished, metric in lower_is_better, caveat),
        finished=finished,
        final_step=final.step,
        final_runtime=final.runtime,
        metric=metric,
        parameters_ratio=final.parameters / baseline.parameters,
        disk_ratio=final.disk_bytes / baseline.disk_bytes,
        flops_ratio=final.flops / baseline.flops if final.flops and baseline.flops else None,
        speedup=gains,
        seconds=seconds,
        synthetic=synthetic,
    )


def _gain(rows: Sequence[Row], final: Row, batch: str, timed: Headline | None) -> Gain:
    def p50(step: str, runtime: str) -> float | None:
        row = next((r for r in rows if r.step == step and r.runtime == runtime), None)
        return row.latency_ms[batch].p50 if row is not None and batch in row.latency_ms else None

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above and below else None

    # Steps that make files leave the torch model as it is: the last torch row before them is its own.
    last = [r.step for r in rows if r.runtime == "torch" and not r.rolled_back][-1:]
    first = ("baseline", "torch") if p50("baseline", "torch") else ("baseline", "onnxruntime")
    pairs = {
        "runtime": (("baseline", "torch"), ("baseline", "onnxruntime")),
        "compression": (("baseline", "onnxruntime"), (final.step, "onnxruntime")),
        "compression_torch": (("baseline", "torch"), (last[0] if last else "", "torch")),
        "total": (first, (final.step, final.runtime)),
    }
    busy = {(r.step, r.runtime) for r in rows if r.disturbed}
    found = {
        name: None if busy.intersection((above, below)) else ratio(p50(*above), p50(*below))
        for name, (above, below) in pairs.items()
    }
    intervals = {}
    for name, (above, below) in pairs.items():
        by_batch = timed.ratios.get(f"{'.'.join(above)}/{'.'.join(below)}", {}) if timed else {}
        if batch in by_batch:
            intervals[name] = by_batch[batch]
            found[name] = by_batch[batch].ratio
    noise = timed.noise.get(batch) if timed else None
    verdict = speed_verdict_of(intervals["total"], noise) if "total" in intervals else None
    return Gain(**found, intervals=intervals, verdict=verdict)


def _headline(
    name: str, baseline: Row, final: Row, gains: dict[str, Gain], metric: str, finished: bool, lower: bool, caveat: str
) -> str:
    parts = [
        f"{_millions(baseline.parameters)} to {_millions(final.parameters)} parameters",
        f"{baseline.disk_bytes / 1e6:.1f} to {final.disk_bytes / 1e6:.1f} MB on disk",
    ]
    batch, gain = next(iter(gains.items()), (None, None))
    if baseline.disturbed or final.disturbed:
        parts.append("speed not known (other programs kept the machine busy)")
    elif gain is not None and gain.verdict == "no clear difference":
        parts.append(f"no clear difference in speed at batch {batch}")
    elif gain is not None and gain.total is not None:
        word = f"{gain.total:.1f}x as fast at batch {batch}"
        if gain.runtime is not None and gain.compression is not None and final.runtime == "onnxruntime":
            word += f" ({gain.runtime:.1f}x by the runtime, {gain.compression:.1f}x by compression)"
        parts.append(word)
    if metric in baseline.quality and metric in final.quality:
        was, now = baseline.quality[metric], final.quality[metric]
        text = f"{metric} {100 * was.value:.1f} to {100 * now.value:.1f}"
        change = final.change.get(metric)
        said = ["lower is better"] if lower else []
        if change is not None:
            said += [f"{_points(change.difference)} points", f"95% interval {_points(change.low)} to {_points(change.high)}"]
            said += [change.conclusion] if change.conclusion else []
        parts.append(f"{text} ({', '.join(said)})" if said else text)
    caveat = f"; quality is overstated ({caveat})" if caveat else ""
    return f"{name}{'' if finished else ' (not finished)'}: " + ", ".join(parts) + f"{caveat}."


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count:,}"
