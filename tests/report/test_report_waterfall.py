"""What each step changed, and how to make the same numbers again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mmcompress.measure.headline import applied
from mmcompress.report.alerts import Alert
from mmcompress.report.html import SHOWN_ALERTS, first_screen
from mmcompress.report.markdown import render_markdown
from mmcompress.report.reproduce import recipe_hash, reproduce
from mmcompress.report.schema import Warning_
from mmcompress.report.schema_speed import Headline, Served, Timing
from mmcompress.report.summary import summary_table
from mmcompress.report.text import bad_news
from mmcompress.report.waterfall import waterfalls
from tests.report import examples


def _said(report: object, key: str) -> list[tuple[str, str, str, str]]:
    found = {w.key: w for w in waterfalls(report, "accuracy")}[key]  # type: ignore[arg-type]
    return [(f.step.text, f.value, f.did, f.tone) for f in found.falls]


def test_each_step_against_the_one_before() -> None:
    report = examples.full()
    assert [did for _, _, did, _ in _said(report, "disk")] == ["", "26% less", "unchanged", "74% less"]
    assert [tone for *_, tone in _said(report, "disk")] == ["", "good", "", "good"]
    assert [did for _, _, did, _ in _said(report, "quality")] == ["", "-25.7 points", "+25.4 points", "-0.4 points"]


def test_a_step_that_was_undone_is_nothing_to_build_on() -> None:
    report = examples.full()
    report.rows[3].disk_bytes = report.rows[0].disk_bytes // 2
    for row in report.rows:
        row.rolled_back = row.step == "1-prune"
    assert [did for _, _, did, _ in _said(report, "disk")] == ["", "26% less", "50% less", "62% less"]


def test_the_runtime_is_a_step_of_its_own_where_all_steps_ran_in_it() -> None:
    report = examples.full()
    # Only the last step ran in OpenVINO: the way leads through torch.
    assert [(step, did) for step, _, did, _ in _said(report, "latency")] == [
        ("baseline", ""), ("1-prune", "1.29x faster"), ("2-distill", "no clear difference"), ("3-quantize", "3.79x faster"),
    ]  # fmt: skip
    report.totals.final_runtime = "onnxruntime"
    for step, ms in (("1-prune", 22.0), ("2-distill", 22.0)):
        torch = next(row for row in report.rows if row.step == step)
        twin = torch.model_copy(update={"runtime": "onnxruntime", "latency_ms": {"1": examples.latency(ms)}}, deep=True)
        report.rows.insert(report.rows.index(torch) + 1, twin)
    assert [(step, value, did) for step, value, did, _ in _said(report, "latency")] == [
        ("baseline", "41.3 ms", ""), ("baseline", "29.0 ms", "1.42x faster"), ("1-prune", "22.0 ms", "1.32x faster"),
        ("2-distill", "22.0 ms", "no clear difference"), ("3-quantize", "10.4 ms", "2.12x faster"),
    ]  # fmt: skip


def test_a_step_that_left_the_same_files_is_neither_faster_nor_slower() -> None:
    report = examples.full()
    last = report.rows[-1]
    twin = last.model_copy(update={"step": "4-export", "same_files_as": last.step}, deep=True)
    twin.latency_ms["1"] = examples.latency(last.latency_ms["1"].p50 / 2)  # was timed anew
    report.rows.append(twin)
    report.totals.final_step = "4-export"
    assert _said(report, "latency")[-1][2:] == ("the same files", "")


def test_the_same_files_have_the_same_times() -> None:
    """Of two steps with the same files only the later one is timed side by side."""
    report = examples.full()
    one = report.rows[-1]
    two = one.model_copy(update={"step": "4-export", "same_files_as": one.step}, deep=True)
    rows, name = [one, two], f"4-export.{two.runtime}"
    again = {"1": examples.latency(3.0)}
    timing = Timing(models=[name], rounds={"1": 9}, seconds=1.0, busy_cores=0.1, idle_cores=0.0, threads=1, affinity=[0])
    applied(Headline(of="", latency_ms={name: again}, served={name: Served()}, ratios={}, noise={}, timing=timing), rows)
    assert one.latency_ms == two.latency_ms == again
    assert one.served is None or one.served != Served()
    assert one.busy_cores == two.busy_cores == 0.1


def test_one_row_is_no_waterfall() -> None:
    assert waterfalls(examples.empty(), "") == []
    assert summary_table(examples.empty()) is None


def test_the_summary_by_hand() -> None:
    table = summary_table(examples.full())
    assert table is not None
    lines = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert lines["Size on disk"] == ["605 MB", "115 MB", "81% less"]
    assert lines["Median latency, batch 1"] == ["41.3 ms", "8.4 ms", "4.92x faster"]
    assert lines["accuracy"] == ["86.9%", "86.2%", "-0.7 points"]


def test_markdown_for_a_pull_request_is_short_before_the_first_fold() -> None:
    text = render_markdown(examples.full())
    top = text[: text.index("<details>")]
    assert len(top.splitlines()) < 25
    for said in ("81% smaller", "Gate not shown", "| Size on disk | 605 MB | 115 MB | 81% less |"):
        assert said in top
    assert text.count("<details>") == text.count("</details>") > 5


def test_bad_news_is_never_folded_away() -> None:
    bad = [Alert("bad", str(i)) for i in range(9)]
    mild = [Alert("caution", str(i)) for i in range(9)]
    assert first_screen([*mild, *bad]) == (bad, mild)
    assert first_screen(mild) == (mild[:SHOWN_ALERTS], mild[SHOWN_ALERTS:])
    assert first_screen(mild[: SHOWN_ALERTS + 1]) == (mild[: SHOWN_ALERTS + 1], [])


def test_how_to_reproduce_by_hand(tmp_path: Path) -> None:
    report = examples.full()
    report.recipe.clear()
    report.recipe.update(b=[1, 2], a={"é": None})
    assert recipe_hash(report) == hashlib.sha256('{"a":{"é":null},"b":[1,2]}'.encode()).hexdigest()
    inputs = {"data.eval x.parquet": [1234, 99], "model m": [["a.safetensors", 1000, 5], ["b.safetensors", 24, 6]]}
    (tmp_path / "run.json").write_text(json.dumps({"inputs": inputs}))
    found = reproduce(report, tmp_path)
    assert found.inputs == (("data.eval x.parquet", "1,234 bytes"), ("model m", "1,024 bytes"))
    assert "torch==2.13.0\n" in found.constraints
    (tmp_path / "run.json").write_text("{")
    assert reproduce(report, tmp_path).inputs == ()
    assert reproduce(report, None).inputs == ()


def test_one_busy_neighbour_is_said_once() -> None:
    report = examples.full()
    first, second = report.rows[0], report.rows[2]
    before = [a.text for a in bad_news(report)]
    report.warnings.append(Warning_(step="baseline", text="Other programs used 1.0 cores while this was timed in torch: no."))
    first.busy_cores = 1.0
    assert f"baseline: {report.warnings[-1].text}" in [a.text for a in bad_news(report)]
    report.warnings.append(Warning_(step="1-prune", text="Other programs used 1.7 cores while this was timed in torch: no."))
    second.busy_cores, first.folder, second.folder = 1.7, "steps/00-baseline", "steps/01-prune"
    said = [a.text for a in bad_news(report)]
    (busy,) = [text for text in said if "one by one" in text]
    assert not any("timed in torch: no." in text for text in said)
    assert busy.startswith("Other programs used up to 1.7 cores while 2 of 6 models were timed one by one (baseline in PyTorch, ")
    assert "Delete measurements/00-baseline, measurements/01-prune in the run's folder" in busy
    assert set(before) - {text for text in before if "peed" in text} <= set(said)
