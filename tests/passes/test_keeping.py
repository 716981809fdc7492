"""Keeping quality in the pass quantize: each option alone on a model whose plain int8 fails, and what it refuses."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from datasets import Dataset
from PIL import Image

import mmcompress as mm
from mmcompress.context import Context
from mmcompress.data.examples import as_examples
from mmcompress.errors import DataError
from mmcompress.passes._mixed import fewest
from mmcompress.progress import SILENT
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from tests import tiny

TASK = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {} ."])
PLANTED, TIMES = (5, 11), 2000.0


@pytest.fixture(scope="module")
def planted() -> mm.CompressedModel:
    """Two channels behind each LayerNorm of the image tower are far larger than the rest, and what reads them far smaller."""
    model = tiny.clip()
    with torch.no_grad():
        for layer in model.module.vision_model.encoder.layers:
            attention, at = layer.self_attn, list(PLANTED)
            readers = {
                layer.layer_norm1: (attention.q_proj, attention.k_proj, attention.v_proj),
                layer.layer_norm2: (layer.mlp.fc1,),
            }
            for norm, linears in readers.items():
                norm.weight[at] *= TIMES
                norm.bias[at] *= TIMES
                for linear in linears:
                    linear.weight[:, at] /= TIMES
    return model


@pytest.fixture(scope="module")
def examples(planted: mm.CompressedModel) -> Any:
    """Pictures labelled with what the float model says of them: each answer that changes is a mistake."""
    columns = tiny.rows(96)
    scores = TASK.evaluate(TorchPredict(planted), planted.processor, as_examples(tiny.dataset(96)), SILENT)
    assert scores.answers is not None
    assert len(set(scores.answers.tolist())) > 1
    columns["label"] = scores.answers.tolist()
    return as_examples(Dataset.from_dict(columns, features=tiny.dataset(1).features))


def quantized(model: mm.CompressedModel, examples: Any, where: Path, **settings: Any) -> tuple[float, float, dict[str, Any]]:
    """Accuracy, mean cosine of the pictures' embeddings, and facts."""
    context = Context(task=TASK, train=examples, workdir=where)
    new = mm.passes.Quantize(scheme={"vision": "int8-static"}, samples=32, **settings).apply(model, context=context)
    predict = OnnxPredict(new.onnx)
    accuracy = float(TASK.evaluate(predict, model.processor, examples, SILENT).per_example["accuracy"].mean())
    pixels = {"pixel_values": next(mm.passes.Quantize(samples=32)._calibration(model, context, "vision_model"))["pixel_values"]}
    a, b = (one("vision_model", pixels)["image_embeds"] for one in (predict, TorchPredict(model)))
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return accuracy, float(cosines.mean()), {**context.facts.get("keeping", {}), "history": new.history[-1]["result"]}


def test_smoothing_and_mixed_precision_restore_what_plain_int8_loses(
    planted: mm.CompressedModel, examples: Any, tmp_path: Path
) -> None:
    plain, far, facts = quantized(planted, examples, tmp_path / "plain")
    assert far < 0.98
    assert plain < 0.95
    assert set(facts) == {"history"}

    accuracy, cosine, facts = quantized(planted, examples, tmp_path / "smooth", smooth="auto")
    assert cosine > 0.999
    assert accuracy > plain
    groups = [one for one in facts["components"]["vision_model"]["smooth"] if "encoder" in one["norm"]]
    assert len(groups) == 6
    assert all({channel for channel, _ in one["outliers"]} == set(PLANTED) for one in groups)

    accuracy, cosine, facts = quantized(planted, examples, tmp_path / "mixed", max_drop=1.1)
    assert 1 - accuracy <= 0.011 + 1e-9
    assert cosine > far
    mixed = facts["mixed_precision"]
    assert 0 < len(mixed["float"]) < mixed["layers"] == 20
    distances = facts["components"]["vision_model"]["distances"]
    worst = sorted(distances, key=lambda layer: -distances[layer])[: len(mixed["float"])]
    assert [one["layer"] for one in mixed["float"]] == worst
    left = facts["history"]["components"]["vision_model"]["left_float"]
    assert {name.split("/")[0] for name in left} == set(worst)
    drops = {one["float"]: one["drop"] for one in mixed["tried"]}
    assert drops[0] == pytest.approx(100 * (1 - plain), abs=2.2)  # the same int8, by floats that stand for integers
    assert drops[len(worst)] <= 1.1 < drops[len(worst) - 1]


def test_layers_are_judged_by_the_metric_where_that_is_asked_for(
    planted: mm.CompressedModel, examples: Any, tmp_path: Path
) -> None:
    accuracy, _, facts = quantized(planted, examples, tmp_path, max_drop=1.1, sensitivity="metric")
    assert 1 - accuracy <= 0.011 + 1e-9
    mixed, done = facts["mixed_precision"], facts["components"]["vision_model"]
    assert mixed["sensitivity"] == "metric"
    drops, distances = done["drops"], done["distances"]
    assert set(drops) == set(distances)
    assert all(low <= drop <= high for drop, low, high in drops.values())
    # The labels are the float model's answers: a layer alone in int8 loses whole pictures of 96, and cannot win any.
    assert all(drop * 0.96 == pytest.approx(round(drop * 0.96), abs=1e-6) and drop >= 0 for drop, _, _ in drops.values())
    assert len({drop for drop, _, _ in drops.values()}) > 1
    worst = sorted(drops, key=lambda layer: (-drops[layer][0], -distances[layer]))[: len(mixed["float"])]
    assert [one["layer"] for one in mixed["float"]] == worst
    by_distance = sorted(distances, key=lambda layer: -distances[layer])
    assert sorted(drops, key=lambda layer: (-drops[layer][0], -distances[layer])) != by_distance


def test_nothing_stays_float_where_int8_is_good_enough(model: mm.CompressedModel, tmp_path: Path) -> None:
    context = Context(task=TASK, train=as_examples(tiny.dataset(24)), workdir=tmp_path)
    mm.passes.Quantize(samples=16, max_drop=100, bias_correction=True).apply(model, context=context)
    keeping = context.facts["keeping"]
    assert keeping["mixed_precision"]["float"] == []
    assert [one["float"] for one in keeping["mixed_precision"]["tried"]] == [0]
    assert set(keeping["components"]) == {"vision_model", "text_model"}
    assert len(keeping["components"]["vision_model"]["bias_correction"]) == 18


def test_the_layers_that_must_stay_float_are_the_fewest() -> None:
    for wanted in range(9):
        asked: list[int] = []

        def enough(count: int, wanted: int = wanted, asked: list[int] = asked) -> bool:
            asked.append(count)
            return count >= wanted

        assert fewest(8, enough) == wanted
        assert len(asked) <= 4
        assert 8 not in asked


def activation_scales(path: Path) -> list[float]:
    graph = onnx.load(path).graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return [float(weights[node.input[1]]) for node in graph.node if node.op_type == "QuantizeLinear"]


def test_calibration_by_percentile_gives_finer_steps(model: mm.CompressedModel, tmp_path: Path) -> None:
    found = {}
    for name, settings in {"min-max": {}, "percentile": {"percentile": 99.0}, "mse": {}}.items():
        context = Context(task=TASK, train=as_examples(tiny.dataset(24)), workdir=tmp_path / name)
        new = mm.passes.Quantize(samples=16, calibration=name, **settings).apply(model, context=context)
        assert new.onnx is not None
        found[name] = np.array(activation_scales(new.onnx / "vision_model_quantized.onnx"))
    assert (found["percentile"] <= found["min-max"] * 1.001).all()
    assert (found["percentile"] < 0.95 * found["min-max"]).mean() > 0.5
    assert (found["mse"] <= found["min-max"] * 1.001).all()


def noise(count: int) -> Any:
    columns = tiny.rows(count)
    for i in range(count):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, format="PNG")
        columns["image"][i] = {"bytes": buffer.getvalue(), "path": None}
    return as_examples(Dataset.from_dict(columns, features=tiny.dataset(1).features))


def test_calibration_on_noise_or_on_few_pictures_is_refused(model: mm.CompressedModel, tmp_path: Path) -> None:
    step = mm.passes.Quantize(samples=16)
    with pytest.raises(DataError, match="calibration data of vision_model tells nothing: pixel_values is white noise"):
        step.apply(model, context=Context(task=TASK, train=noise(16), workdir=tmp_path / "noise"))
    with pytest.raises(DataError, match="pixel_values has 6 different examples among 6; at least 8 are needed"):
        step.apply(model, context=Context(task=TASK, train=as_examples(tiny.dataset(6)), workdir=tmp_path / "few"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "int8-dynamic", "smooth": 0.5}, "smooth: is of the scheme int8-static"),
        ({"scheme": "float16", "calibration": "mse"}, "calibration: is of the scheme int8-static"),
        ({"scheme": "int8-dynamic", "max_drop": 1}, "max_drop: is of"),
        ({"scheme": {"text": "float16"}, "bias_correction": True}, "bias_correction: is of"),
        ({"smooth": 1.5}, "less than or equal to 1"),
        ({"percentile": 50}, "greater than 50"),
        ({"sensitivity": "metric"}, "sensitivity: metric sorts layers for `max_drop`"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mm.passes.Quantize(**settings)


def test_off_is_what_yaml_makes_of_it() -> None:
    assert mm.passes.Quantize(smooth=False).smooth == "off"
    assert mm.passes.Quantize(smooth=0.5).smooth == 0.5
