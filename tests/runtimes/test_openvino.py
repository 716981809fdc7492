"""OpenVINO behind the same interface as the other runtimes, from the same files; what is said where it is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mmcompress as mm
from mmcompress.context import Context
from mmcompress.data.examples import as_examples
from mmcompress.errors import ModelError, RecipeError, UnavailableError
from mmcompress.recipe import ReportSettings, make_recipe
from mmcompress.runtimes import openvino_predict
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.runtimes.openvino_predict import OpenVinoPredict
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from tests import tiny

TASK = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {} ."])
PIXELS = {"pixel_values": np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)}


def test_a_recipe_is_refused_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"OpenVINO is not installed; pip install 'mmcompress\[openvino\]'"):
        ReportSettings(runtimes=["torch", "openvino"])  # type: ignore[call-arg]
    with pytest.raises(UnavailableError, match="not installed"):
        OpenVinoPredict(tmp_path)


@pytest.mark.skipif(not openvino_predict.is_installed(), reason="OpenVINO is an extra")
def test_it_gives_what_onnx_runtime_gives(model: mm.CompressedModel, tmp_path: Path) -> None:
    data = as_examples(tiny.dataset(24))
    for name, step in {"float": mm.passes.Export(), "int8": mm.passes.Quantize(samples=8)}.items():
        folder = step.apply(model, context=Context(task=TASK, train=data, workdir=tmp_path / name)).onnx
        assert folder is not None
        predict = OpenVinoPredict(folder, 1)
        found, wanted = predict("vision_model", PIXELS), OnnxPredict(folder, 1)("vision_model", PIXELS)
        assert list(found) == list(wanted)
        a, b = found["image_embeds"], wanted["image_embeds"]
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosine.min() > (0.99999 if name == "float" else 0.99)
        assert predict.settings()["threads"] == 1


@pytest.mark.skipif(not openvino_predict.is_installed(), reason="OpenVINO is an extra")
def test_files_that_only_onnx_runtime_knows_are_refused(model: mm.CompressedModel, tmp_path: Path) -> None:
    step = mm.passes.Quantize(scheme="int8-dynamic", placement={"vision": "dynamic-fused"})
    folder = step.apply(model, context=Context(workdir=tmp_path)).onnx
    assert folder is not None
    with pytest.raises(ModelError, match=r"vision_model_quantized.onnx: OpenVINO cannot open it"):
        OpenVinoPredict(folder, 1, ("vision_model",))


def test_placements_can_be_timed_in_it(monkeypatch: pytest.MonkeyPatch, model: mm.CompressedModel) -> None:
    with pytest.raises(ValueError, match="runtime: openvino is what `placement: measure` times in"):
        mm.passes.Quantize(runtime="openvino")
    mm.passes.Quantize(runtime="openvino", placement={"vision": "static-scores"})  # what was chosen in it, said again
    step = mm.passes.Quantize(runtime="openvino", placement="measure")
    monkeypatch.setattr("mmcompress.passes.quantize.openvino_installed", lambda: False)
    assert step.check_against(model.family, {}) == [f"runtime: {openvino_predict.HINT}"]
    monkeypatch.setattr("mmcompress.passes.quantize.openvino_installed", lambda: True)
    assert step.check_against(model.family, {}) == []


@pytest.mark.parametrize(("runtime", "refused"), [("onnxruntime", True), ("openvino", False)])
def test_a_placement_measured_in_it_fits_a_report_of_it(monkeypatch: pytest.MonkeyPatch, runtime: str, refused: bool) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    recipe = {
        "name": "one",
        "model": "bundled:shapes-clip",
        "task": {"type": "zero-shot-image-classification", "templates": ["a {}"]},
        "data": {name: {"path": "bundled:shapes", "samples": 20} for name in ("train", "eval")},
        "passes": [{"pass": "quantize", "placement": "measure", "runtime": runtime}],
        "report": {"runtimes": ["openvino"]},
    }
    if refused:
        with pytest.raises(RecipeError, match=r"run in ONNX Runtime alone.*measure in `runtime: openvino`"):
            make_recipe(recipe)
    else:
        assert make_recipe(recipe).passes[0].runtime == "openvino"


@pytest.mark.skipif(not openvino_predict.is_installed(), reason="OpenVINO is an extra")
def test_a_placement_is_chosen_in_it(model: mm.CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcompress.passes._placement.TURN_SECONDS", 0.001)
    context = Context(task=TASK, train=as_examples(tiny.dataset(24)), workdir=tmp_path)
    step = mm.passes.Quantize(placement="measure", runtime="openvino", min_cosine=0.9, threads=1, samples=16)
    new = step.apply(model, context=context)
    assert new.onnx is not None
    for one in context.facts["placement"].values():
        assert one["runtime"] == "openvino"
        assert one["profile_ms"] == {}
        names = {c["name"] for c in one["candidates"] if c["ms"] is not None}
        assert "static-scores" in names
        assert not any(name.endswith("-fused") for name in names)
    OpenVinoPredict(new.onnx, 1)("vision_model", PIXELS)
