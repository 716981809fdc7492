from __future__ import annotations

import re

import pytest

from mmcompress.report.bars import interval_bar
from mmcompress.report.format import (
    MISSING,
    MetricFormat,
    bytes_scale,
    count_scale,
    faster,
    flat,
    metric_format,
    ms_scale,
    plain,
    seconds_text,
    smaller,
    speed_verdict,
)
from mmcompress.report.plots import Axes, Point, pareto_front, scatter, ticks
from mmcompress.report.schema import Report
from tests.report import examples


def test_one_unit_and_decimals_for_a_column() -> None:
    sizes = bytes_scale([605_156_676, 14_401_028, None, 0])
    assert [sizes(v) for v in (605_156_676, 14_401_028, 0, None)] == ["605.2 MB", "14.4 MB", "0.0 MB", MISSING]
    assert count_scale([3_600_257])(3_600_257) == "3.60 M"
    assert bytes_scale([999])(999) == "999 B"
    assert ms_scale([0.0123, 4.0])(0.0123) == "0.012 ms"
    assert ms_scale([])(None) == MISSING


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.29, "71% smaller"),
        (1.12, "12% larger"),
        (1.001, "unchanged"),
        (0.004, "99.6% smaller"),
        (2.5, "2.5x as large"),
        (None, MISSING),
    ],
)
def test_smaller(ratio: float | None, expected: str) -> None:
    assert smaller(ratio) == expected


@pytest.mark.parametrize(
    ("ratio", "expected"), [(2.789, "2.79x faster"), (0.8, "1.25x slower"), (1.002, "same speed"), (None, MISSING)]
)
def test_faster(ratio: float | None, expected: str) -> None:
    assert faster(ratio) == expected


def test_speed_verdict_needs_intervals_apart_and_more_than_noise() -> None:
    ten = examples.latency(10.0)
    assert speed_verdict(ten, examples.latency(5.0)) == "faster"
    assert speed_verdict(ten, examples.latency(20.0)) == "slower"
    assert speed_verdict(ten, examples.latency(10.1)) == "no clear difference"
    tight = ten.model_copy(update={"p50": 10.2, "low": 10.19, "high": 10.21})
    assert speed_verdict(ten.model_copy(update={"low": 9.99, "high": 10.01}), tight) == "no clear difference"
    assert speed_verdict(None, ten) == ""


def test_seconds() -> None:
    assert [seconds_text(s) for s in (0.42, 38.4, 200, 7500)] == ["0.4 s", "38 s", "3 min 20 s", "2 h 5 min"]


def test_shares_are_points_and_other_metrics_keep_their_unit() -> None:
    points = MetricFormat("accuracy", "percent", decimals=1, higher_is_better=True)
    assert (points.value(0.8694), points.signed(0.003), points.signed(-0.0001)) == ("86.9%", "+0.3", "0.0")
    report = examples.full()
    for row in report.rows:
        row.quality["loss"] = examples.quality(0.5).model_copy(update={"value": 2.5})
        row.change["loss"] = examples.change(0.5, 1, 0).model_copy(update={"verdict": "worse"})
    fmt = metric_format(report, "loss")
    assert (fmt.value(2.5), fmt.change(report.rows[1].change["loss"])) == ("2.500", "+0.500")
    assert fmt.title == "loss"


def test_directions_and_units_are_what_the_report_says() -> None:
    report = examples.speech()
    wer, cider, accuracy = (metric_format(report, m) for m in ("wer", "cider", "exact_match"))
    # A word error rate may pass 1 and is written as percent all the same.
    assert (wer.value(1.23), wer.signed(0.012), wer.unit, wer.title) == ("123.0%", "+1.2", "points", "wer, %")
    assert (wer.direction, accuracy.direction) == ("lower is better", "")
    # CIDEr is written times 100 and is no share.
    assert (cider.value(1.2341), cider.signed(-0.05), cider.unit, cider.title) == ("123.4", "-5.0", "points", "cider")


def test_reports_of_earlier_versions_name_neither_direction_nor_unit() -> None:
    old = examples.full().model_dump()
    del old["lower_is_better"], old["units"]
    for gate in old["gates"]:
        del gate["max_value"]
    report = Report.model_validate(old)
    assert report == examples.full()
    assert metric_format(report, "accuracy") == MetricFormat("accuracy", "percent", 1, True)


def test_interval_bars_have_the_colour_of_the_news() -> None:
    rise, fall = (0.01, 0.02, 0.03), (-0.03, -0.02, -0.01)
    colours = {
        (name, up): re.search(r'class="whisker (\w+)"', interval_bar(*ends, (-0.1, 0.1), higher_is_better=up))[1]  # type: ignore[index]
        for name, ends in (("rise", rise), ("fall", fall), ("even", (-0.01, 0.0, 0.01)))
        for up in (True, False)
    }
    assert colours == {
        ("rise", True): "good", ("rise", False): "bad", ("fall", True): "bad", ("fall", False): "good",
        ("even", True): "even", ("even", False): "even",
    }  # fmt: skip


def test_plain_values() -> None:
    assert plain({"a": {"b": 1}, "c": [1.5, True, None]}) == f"a: (b: 1), c: 1.5, yes, {MISSING}"
    assert flat({"versions": {"torch": "2.13.0"}, "year": 2026}) == [("versions.torch", "2.13.0"), ("year", "2026")]


def test_long_lists_are_cut_and_say_so() -> None:
    assert plain(list(range(48))) == "0, 1, 2, ... (48 in all)"
    assert plain(["a"] * 3) == "a, a, a"


def test_ticks_are_round() -> None:
    assert ticks(0, 43) == [0, 10, 20, 30, 40]
    assert ticks(84.3, 88.7) == [85, 86, 87, 88]


def test_pareto_front_by_hand() -> None:
    points = [
        Point(1, 1, "a"),
        Point(2, 3, "b"),
        Point(3, 2, "c"),
        Point(4, 4, "d"),
        Point(2, 3, "twin"),
        Point(0, 9, "e", ghost=True),
    ]
    assert pareto_front(points) == [0, 1, 3]
    assert pareto_front(points, higher_is_better=False) == [0]


def _labels(svg: str) -> list[tuple[float, float, float, float]]:
    found = []
    for strong, x, y, text in re.findall(r'class="label( strong)?" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', svg):
        half = len(text) * (6.8 if strong else 6.3) / 2
        found.append((float(x) - half, float(y) - 9, float(x) + half, float(y) + 2))
    return found


def test_labels_do_not_lie_on_one_another() -> None:
    points = [
        Point(10 + i % 4, 80 + i * 0.3, f"{i}-prune", y_interval=(79 + i * 0.3, 81 + i * 0.3), weight=1 + i) for i in range(10)
    ]
    labels = _labels(scatter(points, Axes("t", "d", "x", "y"), "k"))
    assert len(labels) == 10
    for i, a in enumerate(labels):
        assert a[0] >= 0
        assert a[2] <= 480
        for b in labels[i + 1 :]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1]), (a, b)


def test_point_far_off_is_at_the_edge_with_its_value() -> None:
    points = [
        Point(10, 87, "baseline", y_interval=(86, 88), hollow=True),
        Point(5, 61, "1-prune"),
        Point(5, 86, "2-distill", strong=True),
    ]
    svg = scatter(points, Axes("t", "d", "x", "y"), "k")
    assert "1-prune ↓ 61" in svg
    assert ">70<" not in svg
    assert "↓" not in scatter([*points[:2], Point(5, 60, "final", strong=True)], Axes("t", "d", "x", "y"), "k")


def test_one_point_and_no_point() -> None:
    assert "<svg" in scatter([Point(0, 0, "only", weight=0)], Axes("t", "d", "x", "y"), "k")
    assert scatter([], Axes("t", "d", "x", "y"), "k") == ""
