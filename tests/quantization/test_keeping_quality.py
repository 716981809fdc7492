"""Smoothing and bias correction: by hand, against what the int8 file itself does, and on a model with planted outliers."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mmcompress.quantization.bias_correction import correct_biases
from mmcompress.quantization.onnx_export import export_component
from mmcompress.quantization.ptq import quantize_static_int8
from mmcompress.quantization.ranges import collect_ranges
from mmcompress.quantization.smoothing import outliers, scales, smooth

from .conftest import image_inputs, make_clip, make_components, text_inputs

PLANTED = (3, 17, 40)
TIMES = 100.0


def run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(path).run(None, inputs)[0]


def mean_cosine(left: np.ndarray, right: np.ndarray) -> float:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / norms).mean())


def pictures(count: int) -> dict[str, np.ndarray]:
    return {"pixel_values": image_inputs(count)["pixel_values"].numpy()}


def texts(count: int) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in text_inputs(count, 8).items()}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three channels behind each LayerNorm are 100 times larger, and what reads them as much smaller: the same function."""
    model = make_clip()
    with torch.no_grad():
        for tower in (model.vision_model, model.text_model):
            for layer in tower.encoder.layers:
                attention = layer.self_attn
                for norm, readers in (
                    (layer.layer_norm1, (attention.q_proj, attention.k_proj, attention.v_proj)),
                    (layer.layer_norm2, (layer.mlp.fc1,)),
                ):
                    norm.weight[list(PLANTED)] *= TIMES
                    norm.bias[list(PLANTED)] *= TIMES
                    for reader in readers:
                        reader.weight[:, list(PLANTED)] /= TIMES
    folder = tmp_path_factory.mktemp("planted")
    parts = make_components(model)
    for name, part in parts.items():
        export_component(part, part.examples, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in parts}


def test_smoothing_restores_what_planted_outliers_cost(planted, tmp_path):
    wanted, feeds = run(planted["vision"], pictures(16)), [pictures(8)]
    found = {}
    for alpha in (None, "auto", 0.5):
        source = planted["vision"]
        if alpha is not None:
            source = tmp_path / f"smooth-{alpha}.onnx"
            groups = smooth(planted["vision"], source, feeds, alpha)
            np.testing.assert_allclose(run(source, pictures(16)), wanted, atol=2e-4)
            # Two in each of two layers, and the projection behind the last LayerNorm.
            assert len(groups) == 5
            assert sorted(len(one.layers) for one in groups) == [1, 1, 1, 3, 3]
            inside = [one for one in groups if "encoder" in one.norm]
            assert len(inside) == 4
            for one in inside:
                assert {channel for channel, _ in one.outliers} == set(PLANTED)
                assert one.error_after < 0.2 * one.error_before
            if alpha == "auto":
                assert all(one.alpha is None or one.error_after < one.error_before for one in groups)
        target = tmp_path / f"int8-{alpha}.onnx"
        quantize_static_int8(source, target, feeds, reduce_range=False)
        found[alpha] = mean_cosine(run(target, pictures(16)), wanted)
    assert found[None] < 0.995 < 0.999 < found["auto"]
    assert found[0.5] > 0.999


def test_smoothing_leaves_alone_what_is_asked_to(planted, tmp_path):
    groups = smooth(planted["text"], tmp_path / "text.onnx", [texts(4)], exclude=["re:layers\\.0"])
    assert {one.norm.split(".")[-2] for one in groups if "encoder" in one.norm} == {"1"}
    np.testing.assert_allclose(run(tmp_path / "text.onnx", texts(5)), run(planted["text"], texts(5)), atol=2e-4)


def test_scales_by_hand():
    """sqrt(16) / sqrt(4) = 2, sqrt(9) / sqrt(0.25) = 6; alpha 1 takes the inputs' own, and what is 0 stays."""
    inputs, weights = np.array([16.0, 9.0, 0.0, 5.0]), np.array([4.0, 0.25, 1.0, 0.0])
    np.testing.assert_allclose(scales(inputs, weights, 0.5), [2, 6, 1, 1])
    np.testing.assert_allclose(scales(inputs, weights, 1.0), [16, 9, 1, 1])
    np.testing.assert_allclose(scales(inputs, weights, 0.0), [0.25, 4, 1, 1])


def test_outliers_by_hand():
    assert outliers(np.array([1.0, 2.0, 3.0, 40.0, 2.0])) == ((3, 20.0),)
    assert outliers(np.array([1.0, 2.0, 3.0])) == ()


def norm_and_layer(path: Path) -> Path:
    """y = LayerNorm(x) W + b over 2 channels, gains 2 and 4, offsets 1 and 0, W = [[1, 2], [3, 0.5]], b = [1, 1]."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("LayerNormalization", ["x", "gain", "offset"], ["n"], name="norm/LayerNormalization", axis=-1),
            helper.make_node("MatMul", ["n", "w"], ["p"], name="layer/MatMul"),
            helper.make_node("Add", ["p", "b"], ["y"], name="layer/Add"),
        ],
        "two",
        [value("x", TensorProto.FLOAT, ["batch", 2])],
        [value("y", TensorProto.FLOAT, ["batch", 2])],
        [
            numpy_helper.from_array(np.array(values, dtype=np.float32), name)
            for name, values in {"gain": [2, 4], "offset": [1, 0], "w": [[1, 2], [3, 0.5]], "b": [1, 1]}.items()
        ],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_folding_by_hand(tmp_path):
    """Normalised rows are (1, -1) and (-1, 1): inputs are (3, -4) and (-1, 4), so max|X| = (3, 4); max|W| = (2, 3).

    With alpha 1 the scales are 3 and 4: gains 2/3 and 1, offsets 1/3 and 0, rows of W times 3 and 4.
    """
    source = norm_and_layer(tmp_path / "two.onnx")
    feeds = [{"x": np.array([[1000, -1000], [-1000, 1000]], dtype=np.float32)}]
    (group,) = smooth(source, tmp_path / "smooth.onnx", feeds, 1.0)
    assert (group.norm, group.layers, group.alpha) == ("norm", ("layer",), 1.0)
    found = weights_of(tmp_path / "smooth.onnx")
    np.testing.assert_allclose(found["gain"], [2 / 3, 1], rtol=1e-5)
    np.testing.assert_allclose(found["offset"], [1 / 3, 0], rtol=1e-5)
    np.testing.assert_allclose(found["w"], [[3, 6], [12, 2]], rtol=1e-5)


def one_layer(path: Path, weight: np.ndarray, bias: np.ndarray) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["p"], name="layer/MatMul"), helper.make_node("Add", ["p", "b"], ["y"])],
        "one",
        [value("x", TensorProto.FLOAT, ["batch", weight.shape[0]])],
        [value("y", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_bias_correction_by_hand(tmp_path):
    """Inputs are 0 and 255 in steps of 1, so they lose nothing. Weights 127 and 0.6 have a step of 1: 0.6 becomes 1.

    The mean input of channel 1 is 100, so the output is 0.4 * 100 too large, and the bias of 5 becomes -35.
    """
    source = one_layer(tmp_path / "one.onnx", np.array([[127.0], [0.6]], dtype=np.float32), np.array([5.0], dtype=np.float32))
    feeds = [{"x": np.array([[255, 0], [0, 200]], dtype=np.float32)}]
    (done,) = correct_biases(source, tmp_path / "corrected.onnx", lambda: feeds)
    assert done.layer == "layer"
    assert done.shift == pytest.approx(40)
    np.testing.assert_allclose(weights_of(tmp_path / "corrected.onnx")["b"], [-35], rtol=1e-5)


@pytest.mark.parametrize("calibration", ["min-max", "percentile"])
def test_a_corrected_int8_layer_has_the_float_ones_mean(tmp_path, calibration):
    """By ONNX Runtime's own int8 file. Percentile 90 cuts a tenth off, of inputs that are not centred."""
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(32, 8)).astype(np.float32)
    source = one_layer(tmp_path / "one.onnx", weight, draw.normal(size=8).astype(np.float32))
    feeds = [{"x": draw.gamma(2, size=(64, 32)).astype(np.float32)} for _ in range(3)]
    rows = np.concatenate([one["x"] for one in feeds])
    correct_biases(source, tmp_path / "corrected.onnx", lambda: feeds, calibration=calibration, percentile=90)
    gaps = {}
    for name, path in (("plain", source), ("corrected", tmp_path / "corrected.onnx")):
        ranges = collect_ranges(source, feeds, calibration, 90)
        quantize_static_int8(path, tmp_path / f"{name}-int8.onnx", ranges, reduce_range=False)
        gaps[name] = np.abs((run(tmp_path / f"{name}-int8.onnx", {"x": rows}) - run(source, {"x": rows})).mean(axis=0))
    assert gaps["corrected"].max() < 1e-3
    assert gaps["plain"].max() > (0.05 if calibration == "percentile" else 2e-3)


@pytest.mark.parametrize("name", ["vision", "text"])
def test_bias_correction_of_a_tower_changes_its_biases_a_little(exported, tmp_path, name):
    feeds = [pictures(8) if name == "vision" else texts(8)]
    done = correct_biases(exported[name], tmp_path / "corrected.onnx", lambda: feeds)
    assert len(done) == 12  # not the projection, which has no bias
    assert all(0 < one.shift < 0.05 for one in done)
    inputs = pictures(5) if name == "vision" else texts(5)
    assert mean_cosine(run(tmp_path / "corrected.onnx", inputs), run(exported[name], inputs)) > 0.9999
