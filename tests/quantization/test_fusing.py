"""Int8 graphs in fused operators give the very numbers of those that they are made from; all placements can be made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from mmcompress.quantization.arrangements import ARRANGEMENTS, arrange, candidates
from mmcompress.quantization.fusing import fuse
from mmcompress.quantization.onnx_export import export_component
from mmcompress.quantization.ranges import collect_ranges
from mmcompress.quantization.schemes import ArrangementName
from tests.families import tiny_whisper

from .conftest import image_inputs, text_inputs

MAKE = {"vision": image_inputs, "text": lambda batch: text_inputs(batch, 8)}


def feeds(name: str, batch: int) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in MAKE[name](batch).items()}


def run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(path).run(None, inputs)[0]


@pytest.mark.parametrize("name", ["vision", "text"])
@pytest.mark.parametrize("ranges", ["static", "static-per-tensor", "dynamic", "dynamic-per-tensor"])
def test_fused_files_give_the_same_numbers(exported, tmp_path, name, ranges):
    plain, fused = tmp_path / "plain.onnx", tmp_path / "fused.onnx"
    arrange(ranges, exported[name], plain, lambda: [feeds(name, 4)])
    found = fuse(plain, fused)
    # Rounding to int8 is what differences of a last bit would be seen in.
    for batch in (1, 5):
        np.testing.assert_allclose(run(fused, feeds(name, batch)), run(plain, feeds(name, batch)), atol=2e-3)
    kinds = Counter(node.op_type for node in onnx.load(fused).graph.node)
    assert found.attentions == kinds["QAttention"] == 2
    assert found.zero_points > 0
    if ranges.startswith("static"):
        assert found.biases == 12  # 2 layers of q, k, v, out, fc1 and fc2
    assert {one.domain for one in onnx.load(fused).opset_import} <= {"", "com.microsoft"}


@pytest.mark.parametrize("name", sorted(ARRANGEMENTS))
def test_every_placement_can_be_made_and_is_close(exported, tmp_path, name):
    target = tmp_path / f"{name}.onnx"
    arrange(name, exported["vision"], target, lambda: [feeds("vision", 4)])
    ours, theirs = run(target, feeds("vision", 3)), run(exported["vision"], feeds("vision", 3))
    cosine = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert 0.97 < cosine.min() < 1


def test_recipes_know_the_names_of_all_placements():
    assert set(get_args(ArrangementName)) == set(ARRANGEMENTS)
    assert candidates("int8-static") == tuple(name for name in ARRANGEMENTS if not name.startswith("static-scores"))
    assert "static-scores" in candidates("int8-static", "openvino")
    assert not any(ARRANGEMENTS[name].fused for name in candidates("int8-static", "openvino"))
    assert candidates("int8-dynamic", "openvino") == ("dynamic", "dynamic-per-tensor")
    assert candidates("int8-dynamic") == ("dynamic", "dynamic-fused", "dynamic-per-tensor", "dynamic-per-tensor-fused")


def test_attention_products_are_integers_where_asked_for(exported, tmp_path):
    counts = {}
    for name in ("static", "static-attention"):
        path = tmp_path / f"{name}.onnx"
        arrange(name, exported["vision"], path, lambda: [feeds("vision", 4)])
        counts[name] = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert counts["static-attention"]["QuantizeLinear"] > counts["static"]["QuantizeLinear"]


@pytest.mark.parametrize(
    ("placement", "calibration"),
    [("static-scores", "min-max"), ("static-scores", "percentile"), ("static-scores-per-tensor", "min-max")],
)
def test_scores_are_made_of_signed_integers_that_are_moved_about(exported, tmp_path, placement, calibration):
    """Queries and keys are rounded before they are reshaped and transposed; what a softmax gives stays float."""
    path, rows = tmp_path / "scores.onnx", feeds("vision", 8)
    ranges = collect_ranges(exported["vision"], [rows], calibration, 99.0)
    arrange(placement, exported["vision"], path, lambda: ranges)
    model = onnx.load(path)
    makers = {name: node for node in model.graph.node for name in node.output}
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    scores = 0
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] in held or makers[node.input[1]].input[0] in held:  # a layer
            continue
        first = makers[node.input[0]]
        if first.op_type == "Softmax":
            assert makers[node.input[1]].op_type == "Transpose"
            continue
        scores += 1
        for given in node.input:
            steps, name = [], given
            while makers[name].op_type in ("Reshape", "Transpose", "DequantizeLinear", "QuantizeLinear"):
                steps.append(makers[name])
                name = makers[name].input[0]
            assert [step.op_type for step in steps][-2:] == ["DequantizeLinear", "QuantizeLinear"]
            assert {step.op_type for step in steps[:-2]} == {"Reshape", "Transpose"}
            assert held[steps[-1].input[2]].dtype == np.int8
            assert held[steps[-1].input[2]] == 0
            low, high = ranges.limits(True)[given]
            assert held[steps[-1].input[1]] == pytest.approx(max(abs(low), abs(high)) / 127, rel=1e-5)
    assert scores == 2  # of two layers
    ours, theirs = run(path, feeds("vision", 3)), run(exported["vision"], feeds("vision", 3))
    cosine = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert cosine.min() > 0.97


def test_whisper_s_scaled_queries_and_keys_without_bias_are_fused_too(tmp_path):
    model = tiny_whisper.whisper()
    part = model.family.components(model.module)["encoder_model"]
    source, plain, fused = (tmp_path / f"{name}.onnx" for name in ("float", "plain", "fused"))
    examples = model.family.example_inputs(model.module.config, part, 3)
    export_component(part, examples, source)
    given = {name: value.numpy() for name, value in examples.items()}
    arrange("static", source, plain, lambda: [given])
    assert fuse(plain, fused).attentions == 3
    np.testing.assert_allclose(run(fused, given), run(plain, given), atol=2e-3)
    close = run(fused, given), run(source, given)
    assert np.corrcoef(*(values.ravel() for values in close))[0, 1] > 0.97
