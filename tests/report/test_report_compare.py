# ruff: noqa: RUF001  the pages use real minus and multiplication signs
from __future__ import annotations

import re

import pytest

from mmcompress.errors import UserError
from mmcompress.report.compare import compare_reports, comparison_table, render_compare_text
from mmcompress.report.compare_page import numbers_table, render_compare_html
from mmcompress.report.schema import Report
from mmcompress.report.schema_behaviour import Behaviour
from tests.report import examples
from tests.report.test_report_html import Page


def _three() -> list[tuple[str, Report]]:
    return [("int8", examples.full()), ("pruned", examples.long()), ("wrong", examples.bad())]


def test_final_rows_against_their_own_baselines() -> None:
    comparison = compare_reports(_three())
    page, text = Page(render_compare_html(comparison)).text, render_compare_text(comparison)
    for fact in [
        "115 MB",
        "from 605 MB",
        "81% less",
        "3% more",
        "86.2%",
        "1 not shown, 1 met",
        "2 missed",
        "none set",
        "4.92× faster",
        "1.26× slower",
    ]:
        assert fact in page, fact
    for fact in ["int8", "115 MB", "1.26x slower", "-3.8 points", "2 missed", "[synthetic]", "Compare with care"]:
        assert fact in text, fact
    assert max(map(len, text.splitlines())) <= 120
    assert "Beaten by no other model here: int8, 3-quantize in OpenVINO" in page


def test_comparable_runs_get_no_warning() -> None:
    comparison = compare_reports([("a", examples.full()), ("b", examples.long())])
    assert comparison.warnings == ()
    assert "Same model, task, data" in render_compare_html(comparison)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.recipe.update(model="other/clip"), "The model differs: openai/clip-vit-base-patch32 (a); other/clip (b)."),
        (lambda r: r.recipe["task"].update(templates=["{}"]), "The task differs"),
        (
            lambda r: r.recipe["data"].update(eval="x.parquet"),
            "The evaluation data differs: path: data/test.parquet (a); x.parquet (b).",
        ),
        (lambda r: r.environment.update(cpu="Pentium"), "The environment's cpu differs"),
        (
            lambda r: r.environment["versions"].update(torch="2.9.0"),
            "The environment's versions.torch differs: 2.13.0 (a); 2.9.0 (b).",
        ),
        (lambda r: r.environment.pop("threads"), "The environment's threads differs: 2 (a); not recorded (b)."),
        (
            lambda r: [q.__setattr__("n", 500) for row in r.rows for q in row.quality.values()],
            "The number of evaluation examples differs",
        ),
        (lambda r: r.rows[0].latency_ms["1"].__setattr__("p50", 60.0), "at batch 1 took 41.3 ms in a, 60.0 ms in b"),
        (lambda r: r.rows[0].quality["accuracy"].__setattr__("value", 0.8), "not evaluated alike"),
        (lambda r: r.totals.__setattr__("finished", False), "b is not finished"),
        (lambda r: r.totals.__setattr__("synthetic", True), "b is synthetic"),
        (lambda r: r.environment.update(started_time="12:00"), ""),
    ],
)
def test_what_forbids_comparing_is_said(change: object, said: str) -> None:
    other = examples.full()
    change(other)  # type: ignore[operator]
    warnings = compare_reports([("a", examples.full()), ("b", other)]).warnings
    assert (said in " ".join(warnings) and len(warnings) == 1) if said else warnings == ()


def test_any_mixture_renders_and_is_well_formed() -> None:
    everything = [(name, make()) for name, make in examples.ALL.items()] + [
        ("full", examples.full()),
        (examples.HOSTILE, examples.full()),
    ]
    page = render_compare_html(compare_reports(everything))
    assert page == render_compare_html(compare_reports(everything))
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "<script" not in page
    assert "full (2)" in parsed.text
    assert "No metric was measured in all runs" in parsed.text
    assert render_compare_text(compare_reports(everything))


def test_the_best_error_rate_is_the_lowest() -> None:
    better, worse = examples.speech(), examples.speech()
    for row in worse.rows:
        # Smaller and faster, so that it is beaten in nothing but the error rate.
        row.quality["wer"].value += 0.05
        row.disk_bytes += 1_000
        row.latency_ms["1"].p50 += 1.0
    comparison = compare_reports([("better", better), ("worse", worse)])
    page = render_compare_html(comparison)
    front = re.findall(r"Beaten by no other model here: ([^<]*)", page)
    assert len(front) == 2
    for sentence in front:
        assert "better, 3-quantize in ONNX Runtime: 6.2%" in sentence
        assert "worse" not in sentence
    assert "wer (lower is better)" in page
    assert "lower is better" in render_compare_text(comparison)


def test_no_run_is_an_error() -> None:
    with pytest.raises(UserError, match="at least one run"):
        compare_reports([])


def test_times_beside_a_busy_neighbour_are_not_compared() -> None:
    busy = examples.full()
    for row in busy.rows:
        row.busy_cores = 1.0
        row.disk_bytes += 1
    found = compare_reports([("busy", busy), ("quiet", examples.full())])
    assert found.headline == "Of 2 runs, quiet is the smallest (115 MB); accuracy is 86.2% in busy, 86.2% in quiet."
    assert any(w.startswith("busy: other programs kept the machine busy") for w in found.warnings)
    cells = {row[0].text: row[4].small for row in comparison_table(found).rows}
    assert "not to be trusted" in cells["busy"]
    assert "4.92x faster" in cells["quiet"]


def test_everything_else_that_was_measured_stands_side_by_side() -> None:
    found = compare_reports([("a", examples.full()), ("b", examples.full())])
    assert numbers_table(found) is None
    with_more = examples.full()
    report_row = with_more.rows[-1]
    report_row.behaviour = Behaviour.model_validate({"agreement": {"kl": {"value": 0.25, "low": 0.125, "high": 0.5, "n": 9}}})
    table = numbers_table(compare_reports([("a", examples.full()), ("b", with_more)]))
    assert table is not None
    assert [(row[0].text, row[1].text, row[2].text, row[2].small) for row in table.rows] == [
        ("behaviour, agreement, kl", "\N{EN DASH}", "0.25", ("0.125 to 0.5",))
    ]
    assert "behaviour, agreement, kl" in render_compare_html(compare_reports([("a", examples.full()), ("b", with_more)]))
