"""Robustness in the report: a planted fault is named on the first screen, numbers are those measured, and pictures are whole."""

from __future__ import annotations

import re

import pytest

from mmcompress.report.html import render_html
from mmcompress.report.markdown import render_markdown
from mmcompress.report.multiples import Line, multiple
from mmcompress.report.schema import Report
from mmcompress.report.schema_robustness import Condition, Degree, Estimate, Robustness, Shift
from mmcompress.report.sections import robustness
from mmcompress.report.text import render_text
from tests.report import examples
from tests.report.test_report_html import Page


def estimate(value: float, half: float = 0.02) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


def condition(name: str, group: str, drops: list[tuple[float, float]], verdict: str = "no clear difference") -> Condition:
    degrees = [
        Degree(
            severity=i + 1 if group in ("media", "attack") else 0,
            baseline=estimate(0.87 - one),
            final=estimate(0.86 - two),
            baseline_drop=estimate(one),
            final_drop=estimate(two),
            extra=estimate(two - one),
        )
        for i, (one, two) in enumerate(drops)
    ]
    extra = sum(two - one for one, two in drops) / len(drops)
    return Condition.model_validate(
        {
            "name": name, "group": group, "description": f"what {name} is", "degrees": degrees, "extra": estimate(extra),
            "p": 0.01, "p_adjusted": 0.02, "verdict": verdict,
            "error_ratio": 1.25 if group == "media" else None, "drop_ratio": None,
        }
    )  # fmt: skip


def report(**more: object) -> Report:
    found = examples.full()
    given: dict[str, object] = {
        "metric": "accuracy", "n": 500, "baseline": "baseline.torch", "final": "4-export.onnxruntime",
        "clean": {"baseline": estimate(0.87), "final": estimate(0.86)},
        "conditions": [
            condition("darkness", "media", [(0.01, 0.05), (0.03, 0.25)], "loses more"),
            condition("gaussian-blur", "media", [(0.01, 0.02), (0.05, 0.05)]),
            condition("upper-case", "text", [(0.0, 0.0)]),
            condition("shuffled-media", "modality", [(0.75, 0.74)]),
        ],
        "mean_error_ratio": estimate(1.1), "attack_n": 128, "attack_clean": {"baseline": estimate(0.88), "final": estimate(0.84)},
        "attacks": [condition("fgsm", "attack", [(0.1, 0.1), (0.2, 0.21)])], "notes": ["Something <b> was not measured: why."],
    }  # fmt: skip
    found.robustness = Robustness.model_validate(given | more)
    return found


def test_a_fault_in_the_dark_is_named_on_the_first_screen() -> None:
    page = render_html(report())
    first = page[: page.index("</header>")]
    assert "Compression cost robustness that clean examples do not show." in first
    assert "darkness 13.0 points more (+11.0 to +15.0)" in first
    assert "blur" not in first
    (alert,) = robustness.alerts(report())
    assert alert.tone == "bad"


def test_a_model_that_ignores_its_pictures_is_named() -> None:
    blind = report(conditions=[condition("shuffled-media", "modality", [(0.7, 0.0)])])
    (alert,) = robustness.alerts(blind)
    assert alert.text.startswith("The compressed model may not look at the pictures or recordings")
    assert "accuracy (86.0% before, 86.0% after)." in alert.text
    both = report(conditions=[condition("shuffled-text", "modality", [(0.0, 0.0)])])
    (alert,) = robustness.alerts(both)
    assert "may not look at the questions" in alert.text
    assert alert.text.endswith("nor does it the baseline's.")


def test_easier_attacks_and_worse_confidence_are_named() -> None:
    shift = Shift(
        data="data.ood (x)", score="softmax", n_inside=100, n_outside=90,
        auroc={"baseline": estimate(0.9), "final": estimate(0.8), "difference": estimate(-0.1)},
        fpr95={"baseline": estimate(0.3), "final": estimate(0.5), "difference": estimate(0.2)},
    )  # fmt: skip
    found = report(conditions=[], attacks=[condition("pgd", "attack", [(0.1, 0.4)], "loses more")], shift=shift)
    texts = [a.text for a in robustness.alerts(found)]
    assert texts[0].startswith(
        "The compressed model is easier to attack. It loses more than the baseline itself does to PGD 30.0 points"
    )
    assert "AUROC of 0.900 for the baseline and 0.800 for the compressed model (difference -0.100" in texts[1]
    assert "30.0% (baseline) and 50.0% (compressed) of the others pass too" in texts[1]


def test_a_model_that_breaks_under_a_condition_is_named() -> None:
    found = report(conditions=[], notes=["contrast at severity 5: 4-export.onnxruntime: the model gives NaN"])
    assert [a.text for a in robustness.alerts(found)] == [
        "The compressed model could not be scored: contrast at severity 5: 4-export.onnxruntime: the model gives NaN"
    ]


def test_nothing_is_said_where_nothing_was_measured_or_nothing_is_wrong() -> None:
    assert robustness.section(examples.full(), None) is None
    assert robustness.alerts(examples.full()) == []
    assert robustness.alerts(report(conditions=[condition("jpeg", "media", [(0.1, 0.1)])])) == []


def test_every_view_has_the_numbers() -> None:
    found = report()
    part = robustness.section(found, None)
    assert part is not None
    assert max(map(len, part.text.splitlines())) <= 110
    for view in (render_markdown(found, None), render_text(found)):
        assert "Of 3 kinds of damage 1 cost the compressed model (4-export.onnxruntime) clearly more" in " ".join(view.split())
        assert "Mean corruption error" in view
    # A mean loss of 2 points for the baseline and 15 for the compressed model.
    line = next(line for line in part.text.splitlines() if line.startswith("darkness"))
    assert line.split()[1:4] == ["2.0", "15.0", "+13.0"]
    assert "| darkness (what darkness is) | 84.0%" in part.markdown


def test_the_page_stays_whole_and_its_pictures_say_what_they_show() -> None:
    page = render_html(report())
    found = Page(page)
    assert len(found.ids) == len(set(found.ids))
    assert {"robustness", "robustness-darkness-title", "robustness-fgsm-desc"} <= set(found.ids)
    assert "Something &lt;b&gt; was not measured" in page
    picture = page[page.index('id="robustness-darkness-desc"') :]
    assert picture[picture.index(">") + 1 :].startswith("baseline: 0 87.0, 1 86.0, 2 84.0; compressed: 0 86.0, 1 81.0, 2 61.0")


def test_a_small_picture_puts_values_where_they_belong() -> None:
    line = Line("one", [(0.0, 0.0, 0.0), (100.0, 90.0, 100.0)], 1)
    picture = str(multiple([line], ["a", "b"], "A <title>", "key", (0, 100), lambda v: f"{v:g}"))
    points = re.search(r'polyline class="path s1" points="([^"]+)"', picture)
    assert points is not None
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in points[1].split())
    assert (x0, x1) == (38 + 47.5, 38 + 142.5)
    assert (y0, y1) == (124.0, 10.0)
    assert "A &lt;title&gt;" in picture
    assert "one, b: 100 (90 to 100)" in picture
    flat = str(multiple([Line("one", [(5.0, 5.0, 5.0)], 0)], ["a"], "t", "k", (5, 5), str))
    assert "nan" not in flat


@pytest.mark.parametrize("more", [{"metric": "", "n": 0, "clean": {}, "conditions": [], "attacks": [], "mean_error_ratio": None}])
def test_a_shift_alone_is_a_section_too(more: dict[str, object]) -> None:
    same = estimate(0.7)
    shift = Shift(
        data="x", score="similarity", n_inside=10, n_outside=10,
        auroc={"baseline": same, "final": same, "difference": estimate(0)},
        fpr95={"baseline": same, "final": same, "difference": estimate(0)},
    )  # fmt: skip
    part = robustness.section(report(**more, shift=shift), None)
    assert part is not None
    assert "A model's largest similarity tells" in part.text
