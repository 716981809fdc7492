"""From rows to gates, notes, gains and the headline."""

from __future__ import annotations

import pytest

from mmcompress.recipe import Gate
from mmcompress.report.build import add_notes, judge, totals
from mmcompress.report.html import render_html
from mmcompress.report.schema import Change, Latency, Quality, Report, Row
from mmcompress.report.text import render_text


def latency(ms: float) -> Latency:
    return Latency(p50=ms, p90=ms, p99=ms, low=ms * 0.99, high=ms * 1.01, n=50)


def row(step: str, runtime: str, ms: float, **given: object) -> Row:
    base: dict[str, object] = {
        "step": step,
        "runtime": runtime,
        "parameters": 1_000_000,
        "disk_bytes": 4_000_000,
        "latency_ms": {"1": latency(ms)},
        "quality": {"accuracy": Quality(value=0.9, low=0.88, high=0.92, n=1000)},
    }
    return Row.model_validate({**base, **given})


def changed(low: float, middle: float, high: float) -> dict[str, Change]:
    return {"accuracy": Change(difference=middle, low=low, high=high, n=1000, lost=1, won=0, verdict="no clear difference")}


@pytest.mark.parametrize(
    ("low", "middle", "high", "verdict"),
    [
        (-0.009, -0.004, 0.001, "met"),
        (-0.011, -0.004, 0.001, "not shown"),
        (-0.03, -0.011, 0.001, "not shown"),
        (-0.05, -0.03, -0.011, "missed"),
        (-0.01, -0.005, 0.0, "met"),
    ],
)
def test_a_drop_is_judged_by_the_whole_interval(low: float, middle: float, high: float, verdict: str) -> None:
    found = judge(Gate(metric="accuracy", max_drop=1.0), row("1-prune", "torch", 5, change=changed(low, middle, high)))
    assert found.verdict == verdict
    assert f"{100 * middle:+.2f}" in found.words


@pytest.mark.parametrize(("limit", "verdict"), [(87, "met"), (90, "not shown"), (93, "missed")])
def test_a_least_value_is_judged_by_the_whole_interval(limit: float, verdict: str) -> None:
    assert judge(Gate(metric="accuracy", min_value=limit), row("1-prune", "torch", 5)).verdict == verdict


def test_a_rise_of_an_error_rate_is_a_drop() -> None:
    for low, middle, high, verdict in (
        (-0.03, -0.02, -0.01, "met"),
        (-0.001, 0.004, 0.009, "met"),
        (-0.001, 0.004, 0.011, "not shown"),
        (0.011, 0.03, 0.05, "missed"),
    ):
        found = judge(
            Gate(metric="accuracy", max_drop=1.0), row("1-x", "torch", 5, change=changed(low, middle, high)), {"accuracy"}
        )
        assert (found.verdict, f"{100 * middle:+.2f} points" in found.words) == (verdict, True)
        assert "it may rise by at most 1 points" in found.words


@pytest.mark.parametrize(("limit", "verdict"), [(93, "met"), (90, "not shown"), (87, "missed")])
def test_a_largest_value_is_judged_by_the_whole_interval(limit: float, verdict: str) -> None:
    found = judge(Gate(metric="accuracy", max_value=limit), row("1-prune", "torch", 5), {"accuracy"})
    assert (found.verdict, found.max_value, found.min_value) == (verdict, limit, None)
    assert f"at most {limit} is asked for" in found.words


def test_the_headline_says_which_way_is_better() -> None:
    found = rows(change=changed(-0.01, 0.02, 0.05))
    texts = [
        totals(
            found, name="x", metric="accuracy", final=found[-1], finished=True, synthetic=False, lower_is_better=lower
        ).headline
        for lower in ((), ("accuracy",))
    ]
    assert "accuracy 90.0 to 90.0 (+2.00 points, 95% interval -1.00 to +5.00)" in texts[0]
    assert "accuracy 90.0 to 90.0 (lower is better, +2.00 points, 95% interval -1.00 to +5.00)" in texts[1]


def rows(**given: object) -> list[Row]:
    return [
        row("baseline", "torch", 12.0),
        row("baseline", "onnxruntime", 6.0),
        row("1-prune", "torch", 8.0, parameters=600_000),
        row("2-quantize", "onnxruntime", 2.0, parameters=600_000, disk_bytes=1_000_000, **given),
    ]


def made(found: list[Row]) -> Report:
    sums = totals(found, name="x", metric="accuracy", final=found[-1], finished=True, synthetic=False)
    return Report(name="x", recipe={}, environment={}, rows=found, totals=sums)


def test_the_gain_is_taken_apart() -> None:
    gain = made(rows()).totals.speedup["1"]
    assert (gain.runtime, gain.compression, gain.total) == (2.0, 3.0, 6.0)
    assert gain.compression_torch == 1.5
    sums = made(rows()).totals
    assert "6.0x as fast at batch 1 (2.0x by the runtime, 3.0x by compression)" in sums.headline
    assert (sums.parameters_ratio, sums.disk_ratio) == (0.6, 0.25)


def test_a_busy_neighbour_takes_the_speed_out_of_the_headline() -> None:
    report = made(rows(busy_cores=0.8))
    assert "speed not known" in report.totals.headline
    assert "as fast" not in report.totals.headline
    for page in (render_html(report), render_text(report)):
        assert "speed not known" in page
        assert "6.0x" not in page.replace("(6.0x)", "")


def test_bad_news_is_said_in_words() -> None:
    before, after = row("baseline", "torch", 5.0), row("1-prune", "torch", 7.0, change=changed(-0.05, -0.03, -0.02))
    after.change["accuracy"].verdict = "worse"
    add_notes(after, before, shrinks=True)
    text = " ".join(after.notes)
    assert "Not smaller than baseline" in text
    assert "Slower than baseline at batch 1: 7.00 ms against 5.00 ms" in text
    assert "accuracy is worse than the baseline's by 3.00 points" in text
    smaller = row("1-prune", "torch", 4.0, disk_bytes=2_000_000, parameters=500_000)
    add_notes(smaller, before, shrinks=True)
    assert smaller.notes == []


def test_noise_is_not_called_slower() -> None:
    after = row("1-finetune", "torch", 5.1)
    add_notes(after, row("baseline", "torch", 5.0), shrinks=False)
    assert after.notes == []


def test_notes_say_how_much_of_the_teachers_time_was_saved() -> None:
    facts = {"teacher_seconds": 2.0, "teacher_seconds_saved": 6.0, "teacher_examples": 1000, "teacher_cache_hits": 3000}
    after = row("2-distill", "torch", 5.0, facts=facts)
    add_notes(after, row("1-prune", "torch", 5.0), shrinks=False)
    (note,) = after.notes
    assert "asked for 1,000 examples" in note
    assert "3,000 times" in note
    assert "about 6.0 of 8.0 s" in note
    asked_each_time = row("2-distill", "torch", 5.0, facts={**facts, "teacher_seconds_saved": 0.0})
    add_notes(asked_each_time, row("1-prune", "torch", 5.0), shrinks=False)
    assert not asked_each_time.notes
