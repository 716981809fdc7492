"""The words for a difference in every view: certain or not, larger or smaller than the margin."""

from __future__ import annotations

from typing import Any

import pytest

from mmcompress.measure.conclusion import conclusion
from mmcompress.report.build import totals
from mmcompress.report.card import render_card
from mmcompress.report.format import MetricFormat
from mmcompress.report.html import render_html
from mmcompress.report.markdown import render_markdown
from mmcompress.report.schema import Change, Report
from mmcompress.report.text import bad_news, chips, render_text
from mmcompress.report.words import change_alerts, change_note
from tests.report import examples

ACCURACY = MetricFormat("accuracy", "percent", 1, True)


def concluded(difference: float, half: float, margin: float = 1.0, **more: Any) -> Change:
    found = examples.change(difference, 40, 31, half)
    words, needed = conclusion(difference, found.low, found.high, found.n, margin)
    return found.model_copy(update={"conclusion": words, "needed": needed, "margin": margin, **more})


def with_final(change: Change) -> Report:
    report = examples.full()
    rows = [r.model_copy(update={"change": {"accuracy": change}}) if r.step == "3-quantize" else r for r in report.rows]
    return report.model_copy(update={"rows": rows, "totals": report.totals.model_copy(update={"final_runtime": "onnxruntime"})})


@pytest.mark.parametrize(
    ("change", "tone", "words"),
    [
        (concluded(0.03, 0.01), "good", "better"),
        (concluded(0.0, 0.006), "good", "no worse than the margin of 1 point"),
        (concluded(-0.005, 0.003), "caution", "worse, but by less than the margin of 1 point"),
        (concluded(-0.03, 0.01), "bad", "worse by more than the margin of 1 point"),
        (concluded(-0.002, 0.02), "caution", "not enough examples to say"),
        (examples.change(-0.002, 9, 9, 0.02), "neutral", "no clear difference"),  # of a report before the words
    ],
)
def test_the_first_screen_says_what_the_difference_shows(change: Change, tone: str, words: str) -> None:
    chip = chips(with_final(change))[-1]
    assert chip.tone == tone
    assert words in chip.details[-1]


def test_every_view_has_the_words() -> None:
    report = with_final(concluded(-0.005, 0.003, p_value=0.0012))
    for view in (render_text(report), render_markdown(report), render_html(report), render_card(report)):
        assert "by less than the margin of 1 point" in view
    assert "exact McNemar p = 0.0012" in "".join(a.text for a in bad_news(report))


def test_alerts_by_hand() -> None:
    loss = concluded(-0.005, 0.003, p_value=0.00001)
    assert [a.text for a in change_alerts(ACCURACY, loss)] == [
        "accuracy is clearly worse than the baseline's, but by less than the margin of 1 point: -0.5 points "
        "(95% interval -0.8 to -0.2; 31 won, 40 lost; exact McNemar p < 0.0001)."
    ]
    few = concluded(-0.002, 0.02)
    (alert,) = change_alerts(ACCURACY, few)
    assert alert.tone == "caution"
    assert alert.text.startswith("2,000 examples are too few to say whether accuracy fell by more than the margin of 1 point")
    # The farther limit is 0.8 points away: 2000 * (2.801585 / 1.959964 * 2 / 0.8)^2 = 25540
    assert few.needed == pytest.approx(25_540, abs=2)
    assert "about 26,000 would be needed" in alert.text
    assert change_alerts(ACCURACY, concluded(0.0, 0.006)) == []
    errors = MetricFormat("wer", "percent", 1, False)
    assert "whether wer rose by more" in change_alerts(errors, few)[0].text


def test_notes_by_hand() -> None:
    assert change_note("accuracy", concluded(-0.03, 0.01)) == (
        "accuracy is worse than the baseline's by 3.00 points (95% interval -4.00 to -2.00)."
    )
    assert change_note("accuracy", concluded(-0.005, 0.003, p_value=0.02)) == (
        "accuracy is worse than the baseline's by 0.50 points, but by less than the margin of 1 point "
        "(95% interval -0.80 to -0.20; exact McNemar p = 0.02)."
    )
    assert "not enough examples to say" in change_note("accuracy", concluded(-0.002, 0.02))
    assert change_note("accuracy", concluded(0.0, 0.006)) == ""


def test_the_headline_says_it_too() -> None:
    report = with_final(concluded(0.0, 0.006))
    final = next(r for r in report.rows if r.step == "3-quantize")
    found = totals(report.rows, name="x", metric="accuracy", final=final, finished=True, synthetic=False)
    assert "95% interval -0.60 to +0.60, no worse than the margin of 1 point)" in found.headline
