"""What `inspect --sensitivity` measures, and that it stays away from the evaluation data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmcompress as mm
from mmcompress.curves import render_sensitivity
from mmcompress.errors import DataError, RecipeError
from mmcompress.passes.prune import Prune
from mmcompress.report.sensitivity import render_sensitivity_html
from tests import tiny
from tests.test_cli import call


def test_numbers_are_those_of_the_cut_model(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, passes=[{"pass": "prune", "ratio": 0.5, "criterion": "random", "round_to": 16}])
    found = mm.sensitivity(recipe, ratios=[0.5, 0.7, 0.75], samples=16)
    assert found["criterion"] == "random"
    assert found["quality"]["n"] == 16
    assert [(c["tower"], c["axis"]) for c in found["curves"]] == [
        (t, a) for a in ("ffn", "depth", "width") for t in ("vision", "text")
    ]
    by = {(c["tower"], c["axis"]): c["points"] for c in found["curves"]}
    assert [p["kept"] for p in by["vision", "ffn"]] == [48, 32]  # 0.7 and 0.75 round to the same
    assert [p["kept"] for p in by["vision", "depth"]] == [2, 1]  # half of 3 is rounded up
    point = by["vision", "ffn"][0]
    model = mm.load(tmp_path / "model")
    cut = Prune(ratio={"vision": 0.5}, round_to=16).apply(model)
    assert point["parameters"] == cut.parameters()
    assert point["difference"] == pytest.approx(point["value"] - found["quality"]["value"])
    assert point["difference_low"] <= point["difference"] <= point["difference_high"]
    assert "95% interval" in render_sensitivity(found)
    page = render_sensitivity_html(found)
    assert page.count('<svg class="plot"') == 3
    assert "://" not in page


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"data": {"eval": {"path": "test.parquet"}}}, {}, "data.eval is not used"),
        ({}, {"ratios": [1.5]}, "above 0 and below 1"),
        ({}, {"axes": ["ffm"]}, "did you mean 'ffn'"),
        ({}, {"criterion": "tailor"}, "did you mean 'taylor'"),
        ({}, {"criterion": "spacing", "axes": ["ffn"]}, "leave nothing to cut"),
    ],
)
def test_what_cannot_be_measured_is_said(changes: dict[str, Any], arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, **{**changes, "passes": []})
    with pytest.raises((DataError, RecipeError), match=said):
        mm.sensitivity(recipe, **arguments)


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(tmp_path)))
    # The evaluation split is not even opened.
    (tmp_path / "test.parquet").unlink()
    page = tmp_path / "page.html"
    shared = ["--sensitivity", tmp_path / "recipe.yaml", "--ratio", "0.5", "--axis", "ffn", "--samples", "16"]
    done = call("inspect", *shared, "--json", "-o", page)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(c["tower"], [p["ratio"] for p in c["points"]]) for c in found["curves"]] == [("vision", [0.5]), ("text", [0.5])]
    assert "What cutting each tower costs" in page.read_text()
    assert call("inspect", tmp_path / "model", *shared).returncode == 2
