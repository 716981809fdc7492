"""What was done to keep int8 right, in the three views."""

from __future__ import annotations

from typing import Any

from mmcompress.report.html import render_html
from mmcompress.report.markdown import render_markdown
from mmcompress.report.sections.keeping import section
from mmcompress.report.text import render_text
from tests.report import examples

FACTS: dict[str, Any] = {
    "calibration": "percentile",
    "percentile": 99.99,
    "smooth": "auto",
    "bias_correction": True,
    "components": {
        "vision_model": {
            "smooth": [
                {
                    "norm": "vision.layers.0.layer_norm1",
                    "layers": ["vision.layers.0.q"],
                    "alpha": 0.6,
                    "error_before": 0.02,
                    "error_after": 0.001,
                    "outliers": [[5, 120.0]],
                },
                {
                    "norm": "vision.layers.1.layer_norm1",
                    "layers": ["vision.layers.1.q"],
                    "alpha": None,
                    "error_before": 0.001,
                    "error_after": 0.001,
                    "outliers": [],
                },
            ],
            "bias_correction": [{"layer": "vision.<b>.q", "shift": 0.02, "spread": 1.0}],
            "distances": {"vision.layers.0.q": 2e-3, "vision.layers.1.q": 1e-5},
        }
    },
    "mixed_precision": {
        "metric": "accuracy",
        "max_drop": 0.3,
        "examples": 1024,
        "tried": [{"float": 0, "drop": 1.5}, {"float": 1, "drop": 0.2}],
        "float": [{"component": "vision_model", "layer": "vision.layers.0.q", "distance": 2e-3}],
        "layers": 2,
    },
}


def report(**changes: Any) -> Any:
    made = examples.full()
    made.rows[-1].facts["keeping"] = {**FACTS, **changes}
    return made


def test_all_views_say_what_was_done_and_what_stayed_float() -> None:
    made = report()
    for view in (render_html(made, None), render_markdown(made), render_text(made)):
        assert "What keeps int8 right" in view
        assert "ranges of activations by percentile 99.99." in view
        assert "SmoothQuant in 1 of 2 LayerNorms; 1 channels are outliers" in view
        assert "5 (120x)" in view
        assert "All 2 layers in int8 cost 1.50 points of accuracy on 1024 training examples." in view
        assert "the 1 most sensitive stay in float" in view
        assert "stays in float" in view
        assert "<b>" not in view.split("What keeps int8 right")[1].split("Where")[0] or view == render_text(made)
    found = section(made, None)
    assert found is not None
    assert max(map(len, found.text.splitlines())) <= 110


def test_layers_judged_by_the_metric_show_what_it_loses() -> None:
    drops = {"vision.layers.0.q": [0.1, -0.2, 0.4], "vision.layers.1.q": [1.5, 0.5, 2.5]}
    components = {"vision_model": {**FACTS["components"]["vision_model"], "drops": drops}}
    made = report(components=components)
    for view in (render_html(made, None), render_markdown(made), render_text(made)):
        plain = view.replace("\\", "").replace("\N{MINUS SIGN}", "-")
        assert plain.index("+1.50 [+0.50, +2.50]") < plain.index("+0.10 [-0.20, +0.40]")
    assert "accuracy, points lost [95%]" in render_markdown(made).replace("\\", "")
    assert "points lost" not in render_html(report(), None)


def test_nothing_left_float_and_everything_left_float() -> None:
    mixed = FACTS["mixed_precision"]
    none = {**mixed, "tried": [{"float": 0, "drop": 0.1}], "float": []}
    assert "no layer stays in float" in render_text(report(mixed_precision=none))
    both = [{"component": "vision_model", "layer": layer, "distance": 1.0} for layer in ("a", "b")]
    every = {**mixed, "tried": [{"float": 0, "drop": 9.0}, {"float": 1, "drop": 9.0}], "float": both}
    assert "all stay in float" in render_text(report(mixed_precision=every))


def test_there_is_no_section_without_anything_asked_for() -> None:
    assert section(examples.full(), None) is None
