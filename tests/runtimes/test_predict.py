"""Torch and ONNX Runtime behind one interface, and what is wrong with broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmcompress.data.examples import as_examples
from mmcompress.errors import ModelError
from mmcompress.measure.rows import check_float_parity, export_float, parity
from mmcompress.model import CompressedModel
from mmcompress.progress import SILENT
from mmcompress.report.schema import Parity
from mmcompress.runtimes.onnx_predict import OnnxPredict, component_files
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from tests import tiny

TASK = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {} ."])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_float(tiny.clip(), tmp_path_factory.mktemp("onnx"), SILENT)


def test_both_runtimes_give_the_same_scores(model: CompressedModel, exported: Path) -> None:
    data = as_examples(tiny.dataset(30))
    torch_ = TASK.evaluate(TorchPredict(model), model.processor, data, SILENT)
    onnx = TASK.evaluate(OnnxPredict(exported, 1), model.processor, data, SILENT)
    assert torch_.answers is not None
    assert onnx.answers is not None
    assert torch_.answers.tolist() == onnx.answers.tolist()


def test_parity_is_measured_on_real_examples(model: CompressedModel, exported: Path) -> None:
    found = parity(model, OnnxPredict(exported, 1), TASK, as_examples(tiny.dataset(40)))
    assert found["vision_model"].n == 32
    assert found["text_model"].n == 6
    assert all(one.max_abs_difference < 1e-4 and one.min_cosine > 0.99999 for one in found.values())
    check_float_parity(found, "here")


def test_another_models_export_is_found_out(exported: Path) -> None:
    other = tiny.clip(seed=1)
    found = parity(other, OnnxPredict(exported, 1), TASK, as_examples(tiny.dataset(8)))
    with pytest.raises(ModelError, match="the ONNX export of vision_model differs from torch"):
        check_float_parity(found, "here")


def test_the_float_tolerance_lets_rounding_through() -> None:
    check_float_parity({"x": Parity(max_abs_difference=1e-5, min_cosine=0.9999999, n=3)}, "here")


def test_quantized_files_come_first_and_the_whole_model_is_no_component(tmp_path: Path) -> None:
    for name in ("vision_model", "vision_model_quantized", "text_model", "model"):
        (tmp_path / f"{name}.onnx").write_bytes(b"")
    assert {k: v.stem for k, v in component_files(tmp_path).items()} == {
        "text_model": "text_model",
        "vision_model": "vision_model_quantized",
    }
    (tmp_path / "sub" / "onnx").mkdir(parents=True)
    (tmp_path / "sub" / "onnx" / "text_model.onnx").write_bytes(b"")
    assert list(component_files(tmp_path / "sub")) == ["text_model"]


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no ONNX components"):
        OnnxPredict(tmp_path)
    (tmp_path / "vision_model.onnx").write_bytes(b"no protobuf at all")
    with pytest.raises(ModelError, match=r"vision_model.onnx: ONNX Runtime cannot open it"):
        OnnxPredict(tmp_path)
    with pytest.raises(ModelError, match=r"has no text_model.onnx; found: vision_model"):
        OnnxPredict(tmp_path, names=("text_model",))


def test_outputs_are_float32_arrays_by_name(model: CompressedModel) -> None:
    found = TorchPredict(model)("vision_model", {"pixel_values": np.zeros((2, 3, 16, 16), dtype=np.float32)})
    assert found["image_embeds"].shape == (2, 24)
    assert found["image_embeds"].dtype == np.float32
