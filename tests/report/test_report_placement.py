"""The search for a placement of int8 in the three views: what was tried, why it lost, and how to take the choice again."""

from __future__ import annotations

from typing import Any, get_args

import yaml

import mmcompress as mm
from mmcompress.measure.placement import FLOAT, choose
from mmcompress.quantization.schemes import ArrangementName
from mmcompress.report.html import render_html
from mmcompress.report.markdown import render_markdown
from mmcompress.report.sections.placement import MEANING, placements, section, to_paste
from mmcompress.report.text import render_text
from tests.report import examples

SPEED = {FLOAT: 30.0, "static": 11.5, "static-fused": 11.0, "dynamic": 15.0}


def found(speed: dict[str, float], min_cosine: float = 0.995) -> dict[str, Any]:
    """What the pass records, from made-up times."""
    cosines = {"static": 0.9991, "static-fused": 0.9992, "dynamic": 0.9993}
    broken = {"static-attention": "cannot be made: <no> products"}
    choice = choose(cosines, broken, lambda names, number: {name: [speed[name]] for name in names}, min_cosine)
    return {
        **choice.as_data(),
        "profile_ms": {"MatMulIntegerToFloat": 6.0, "QAttention": 3.0, "Add": 1.0} if choice.chosen else {},
        "reasons": [] if choice.pays else ["this processor has no VNNI"],
        "seconds": {"calibration": 5.0, "timing": 55.0},
        "cpu_features": ["AVX512-VNNI"],
    }


def report(**parts: dict[str, Any]) -> Any:
    made = examples.full()
    made.rows[-1].facts["placement"] = parts
    return made


def test_all_views_say_what_was_tried_and_why_it_lost() -> None:
    made = report(vision_model=found(SPEED), text_model=found({**SPEED, "static-fused": 29.9, "static": 31.0, "dynamic": 30.5}))
    for view in (render_html(made, None), render_markdown(made), render_text(made)):
        assert "Where int8 went, and why" in view
        assert "slower in the last stage: 4.5% slower than static-fused" in view
        assert "dropped after stage 1: 36.4% slower than static-fused" in view
        assert "static-fused is 2.73 times as fast as float32 in ONNX Runtime (95% interval 2.73 to 2.73, 25 rounds)" in view
        assert "MatMulIntegerToFloat 60%, QAttention 30%, Add 10%" in view
        assert "The search took 1 min 0 s: calibration 5.0 s, timing 55 s." in view
        assert "Int8 is not faster than float32 here: this processor has no VNNI." in view
        assert "placement: {vision_model: static-fused, text_model: static-fused}" in view
        assert "<no>" not in view or view == render_text(made)
    assert max(map(len, section(made, None).text.splitlines())) <= 110  # type: ignore[union-attr]


def test_what_is_to_be_pasted_is_a_placement_of_the_pass() -> None:
    parts = {"vision_model": found(SPEED), "text_model": found(SPEED, min_cosine=1.0)}
    given = yaml.safe_load(to_paste(parts))
    assert given == {"placement": {"vision_model": "static-fused"}}  # text_model stayed in float32
    assert mm.passes.Quantize(**given).placement == given["placement"]
    many = {f"component_number_{i}": found(SPEED) for i in range(5)}
    assert yaml.safe_load(to_paste(many)) == {"placement": dict.fromkeys(many, "static-fused")}
    assert "stays in float32" in section(report(**parts), None).text  # type: ignore[union-attr]


def test_the_runtime_that_placements_were_timed_in_is_named() -> None:
    told = section(report(vision_model={**found(SPEED), "runtime": "openvino", "profile_ms": {}}), None)
    assert told is not None
    assert "static-fused is 2.73 times as fast as float32 in OpenVINO" in told.text
    assert "profiler" not in told.text


def test_without_a_search_there_is_no_such_part() -> None:
    assert placements(examples.full()) == {}
    assert section(examples.full(), None) is None


def test_every_placement_has_a_meaning() -> None:
    assert set(MEANING) == {FLOAT, *get_args(ArrangementName)}
