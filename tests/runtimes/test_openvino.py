"""OpenVINO behind the same interface as the other runtimes, from the same files; what is said where it is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mmcompress as mm
from mmcompress.context import Context
from mmcompress.data.examples import as_examples
from mmcompress.errors import ModelError, UnavailableError
from mmcompress.recipe import ReportSettings
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
