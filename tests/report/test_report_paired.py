"""Runs against each other, example by example, and only where the examples are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmcompress.measure.quality import save_scores
from mmcompress.report.compare import compare_reports, differences_table, render_compare_text, short_names
from mmcompress.report.compare_page import render_compare_html
from mmcompress.report.paired import Scored, pair
from mmcompress.report.schema import Report
from mmcompress.tasks.base import Scores
from tests.report import examples
from tests.report.test_report_html import Page

N = 400


def _values(seed: int, share: float) -> np.ndarray:
    return (np.random.default_rng(seed).random(N) < share).astype(np.float64)


BASELINE, FIRST = _values(0, 0.9), _values(1, 0.8)
SECOND = np.where(np.arange(N) < 40, 1 - FIRST, FIRST)  # the first forty answers are turned round


def _run(folder: Path, final: np.ndarray, baseline: np.ndarray = BASELINE) -> Scored:
    report = examples.full()
    for row in report.rows:
        row.folder = "steps/03-quantize" if row.step == "3-quantize" else "steps/00-baseline"
    rows = {(row.step, row.runtime): row for row in report.rows}
    for name, runtime, values in (("00-baseline", "torch", baseline), ("03-quantize", "openvino", final)):
        place = folder / "measurements" / name
        place.mkdir(parents=True, exist_ok=True)
        save_scores(Scores(per_example={"accuracy": values}), place / f"scores-{runtime}.safetensors")
    (folder / "run.json").write_text(json.dumps({"inputs": {"data.eval data/test.parquet": [10, 1], "data.train x": [5, 5]}}))
    return Scored(report, rows["baseline", "torch"], rows["3-quantize", "openvino"], folder)


def test_the_same_examples_are_paired(tmp_path: Path) -> None:
    found = pair(_run(tmp_path / "a", FIRST), _run(tmp_path / "b", SECOND))
    assert found.reason == ""
    change = found.changes["accuracy"]
    won, lost = int((FIRST[:40] == 0).sum()), int((FIRST[:40] == 1).sum())
    assert (change.won, change.lost, change.n) == (won, lost, N)
    assert change.difference == pytest.approx((won - lost) / N)
    assert change.low < change.difference < change.high
    assert change.verdict == "worse"
    assert pair(_run(tmp_path / "a", FIRST), _run(tmp_path / "c", FIRST)).changes["accuracy"].difference == 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r: r.report.recipe["task"].update(templates=["{}"]), "tasks differ"),
        (lambda r: r.report.recipe["data"].update(eval={"path": "x"}), "evaluation data differ"),
        (
            lambda r: (r.folder / "run.json").write_text('{"inputs": {"data.eval data/test.parquet": [11, 1]}}'),
            "files are not the",
        ),
        (lambda r: (r.folder / "measurements/03-quantize/scores-openvino.safetensors").unlink(), "not in both runs"),
        (lambda r: (r.folder / "measurements/03-quantize/scores-openvino.safetensors").write_bytes(b"no"), "not in both runs"),
    ],
)
def test_what_forbids_pairing_is_said(tmp_path: Path, spoil: Callable[[Scored], object], said: str) -> None:
    first, other = _run(tmp_path / "a", FIRST), _run(tmp_path / "b", SECOND)
    spoil(other)
    found = pair(first, other)
    assert said in found.reason
    assert found.changes == {}


def test_a_baseline_that_was_scored_otherwise_saw_other_examples(tmp_path: Path) -> None:
    first = _run(tmp_path / "a", FIRST)
    assert pair(first, _run(tmp_path / "b", SECOND, np.roll(BASELINE, 7))).reason.startswith(
        "the same baseline was scored otherwise"
    )
    nearly = BASELINE.copy()
    nearly[:4] = 1 - nearly[:4]  # a processor that rounds otherwise turns one in a hundred
    assert pair(first, _run(tmp_path / "c", SECOND, nearly)).reason == ""
    shorter = pair(first, _run(tmp_path / "d", SECOND[:50]))
    assert shorter.reason == "they scored different numbers of examples"


def test_the_page_and_the_terminal_say_it(tmp_path: Path) -> None:
    runs: list[tuple[str, Report]] = []
    for name, values in (("a", FIRST), ("b", SECOND)):
        runs.append((name, _run(tmp_path / name, values).report))
    found = compare_reports(runs, [tmp_path / "a", tmp_path / "b"])
    page, text = Page(render_compare_html(found)).text, render_compare_text(found)
    for said in ("Against a, on the same examples", "worse", f"{N}"):
        assert said in page
        assert said in text
    apart = compare_reports(runs)
    table = differences_table(apart)
    assert table is not None
    assert "b cannot be paired with a: the runs' folders are not known." in Page(render_compare_html(apart)).text
    assert "cannot be paired" in render_compare_text(apart)


def test_the_headline_names_only_what_is_certain() -> None:
    slow = examples.full()
    for row in slow.rows:
        row.disk_bytes += 1_000_000
    found = compare_reports([("a", examples.full()), ("b", slow)]).headline
    assert found == "Of 2 runs, a is the smallest (115 MB); accuracy is 86.2% in a, 86.2% in b."
    for row in slow.rows:
        for latency in row.latency_ms.values():
            latency.p50, latency.low, latency.high = latency.p50 / 2, latency.low / 2, latency.high / 2
    found = compare_reports([("a", examples.full()), ("b", slow)]).headline
    assert found.startswith("Of 2 runs, a is the smallest (115 MB), b the fastest at batch 1 (4.2 ms); accuracy is")


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_names([Path("/x/runs/a"), Path("/x/runs/b")]) == ["a", "b"]
    assert short_names([Path("/x/one/a"), Path("/x/two/a")]) == ["one/a", "two/a"]
