"""Post-training int8: close to float, the right nodes in integers, tables in int8, clear errors."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.naming import matches, unmatched
from mmcompress.quantization.ptq import quantize_dynamic_int8, quantize_static_int8

from .conftest import image_inputs, text_inputs

MAKE = {"vision": image_inputs, "text": lambda batch: text_inputs(batch, 8)}
INTEGER_KERNELS = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm", "QLinearMatMul"}


def feeds(name: str, batch: int) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in MAKE[name](batch).items()}


def run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(path).run(None, inputs)[0]


def lowest_cosine(left: np.ndarray, right: np.ndarray) -> float:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / norms).min())


def kernels(path: Path, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(path, options)
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def quantize(scheme: str, name: str, source: Path, target: Path):
    if scheme == "dynamic":
        return quantize_dynamic_int8(source, target)
    return quantize_static_int8(source, target, (feeds(name, 4) for _ in range(3)))


@pytest.mark.parametrize("name", ["vision", "text"])
@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_int8_is_close_small_and_runs_on_integer_kernels(exported, tmp_path, scheme, name):
    target = tmp_path / "int8.onnx"
    result = quantize(scheme, name, exported[name], target)
    for batch in (1, 2, 5):
        inputs = feeds(name, batch)
        assert lowest_cosine(run(target, inputs), run(exported[name], inputs)) > 0.99
    # 2 layers of q, k, v, out, fc1, fc2, and the projection
    matmuls = [layer for layer in result.quantized if "patch_embedding" not in layer]
    assert len(matmuls) == 13
    assert result.float_products == 4
    counts = kernels(target, tmp_path)
    assert sum(counts[kernel] for kernel in INTEGER_KERNELS) == 13 + (name == "vision")  # the patch embedding
    assert result.bytes_before == exported[name].stat().st_size
    assert result.bytes_after == target.stat().st_size
    assert result.shrank
    assert result.bytes_after < 0.46 * result.bytes_before
    assert result.op_counts == Counter(node.op_type for node in onnx.load(target).graph.node)


def test_excluded_layers_stay_float(exported, tmp_path):
    layers = [
        "model.vision_model.encoder.layers.0.mlp.fc1/MatMul",
        "model.vision_model.encoder.layers.1.mlp.fc1/MatMul",
    ]
    for quantizer in ("dynamic", "static"):
        target = tmp_path / f"{quantizer}.onnx"
        options = {"exclude": ["fc1", "nonsense"]}
        if quantizer == "dynamic":
            result = quantize_dynamic_int8(exported["vision"], target, **options)
        else:
            result = quantize_static_int8(exported["vision"], target, [feeds("vision", 2)], **options)
        assert result.unmatched_exclude == ("nonsense",)
        assert set(layers) <= set(result.left_float)
        assert not any("fc1" in name for name in result.quantized)
        model = onnx.load(target)
        float_weights = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
        found = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in float_weights]
        assert found == layers


def test_what_stays_float_reads_floats(exported, tmp_path):
    """Keys and values share their input with the queries that stay float; only what is int8 is given rounded values."""
    target = tmp_path / "int8.onnx"
    quantize_static_int8(exported["vision"], target, [feeds("vision", 2)], exclude=["q_proj"])
    graph = onnx.load(target).graph
    makers = {name: node for node in graph.node for name in node.output}
    for letter, kind in (("q", "LayerNormalization"), ("k", "DequantizeLinear"), ("v", "DequantizeLinear")):
        found = [n for n in graph.node if n.op_type == "MatMul" and f".{letter}_proj/" in n.name]
        assert [makers[node.input[0]].op_type for node in found] == [kind, kind]


def test_convolution_is_quantized_where_asked_for(exported, tmp_path):
    for flag in (False, True):
        target = tmp_path / f"{flag}.onnx"
        result = quantize_static_int8(exported["vision"], target, [feeds("vision", 4)], quantize_conv=flag)
        assert any("patch_embedding" in name for name in result.quantized) is flag
        assert kernels(target, tmp_path)["Conv"] == int(not flag)


def test_outputs_and_per_tensor_weights(exported, tmp_path):
    target = tmp_path / "outputs.onnx"
    quantize_static_int8(exported["vision"], target, [feeds("vision", 4)], outputs=True, per_channel=False)
    assert kernels(target, tmp_path)["QLinearMatMul"] == 13
    weights = onnx_graph_int8(target)
    scales = {node.input[0]: node.input[1] for node in onnx.load(target).graph.node if node.op_type == "DequantizeLinear"}
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in onnx.load(target).graph.initializer}
    assert {sizes[scales[name]] for name in weights} == {1}


def onnx_graph_int8(path: Path) -> list[str]:
    graph = onnx.load(path).graph
    return [tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2]


def test_calibration_is_read_once_a_batch_at_a_time(exported, tmp_path):
    drawn = []

    def batches():
        for number in range(5):
            drawn.append(number)
            yield feeds("vision", 2)

    stream = batches()
    quantize_static_int8(exported["vision"], tmp_path / "int8.onnx", stream)
    assert drawn == [0, 1, 2, 3, 4]
    assert next(stream, None) is None


def test_ranges_come_from_all_of_the_calibration(exported, tmp_path):
    """The first Quantize's scale is the range over both batches by 255, whichever comes last."""
    small, large = feeds("vision", 2), {"pixel_values": 10 * feeds("vision", 2)["pixel_values"]}
    scales = []
    for number, order in enumerate(([small, large], [large, small], [small])):
        target = tmp_path / f"{number}.onnx"
        quantize_static_int8(exported["vision"], target, order, quantize_conv=True)
        graph = onnx.load(target).graph
        node = next(n for n in graph.node if n.op_type == "QuantizeLinear" and "Reshape_flat" in n.input[0])
        scales.append(float(numpy_helper.to_array(next(t for t in graph.initializer if t.name == node.input[1]))))
    values = large["pixel_values"]
    assert scales[0] == scales[1] == pytest.approx((values.max() - values.min()) / 255, rel=1e-5)
    assert scales[2] == pytest.approx(scales[0] / 10, rel=1e-5)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [([], "needs calibration data"), ([{"pixels": np.zeros(1)}], r"lacks \['pixel_values'\]"), ([{}], "lacks")],
)
def test_bad_calibration_is_refused(exported, tmp_path, calibration, message):
    with pytest.raises(ValueError, match=message):
        quantize_static_int8(exported["vision"], tmp_path / "int8.onnx", calibration)
    assert not (tmp_path / "int8.onnx").exists()


def test_excluding_everything_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="is left to quantize"):
        quantize_dynamic_int8(exported["vision"], tmp_path / "int8.onnx", exclude=["*"])


def test_files_too_large_for_protobuf_keep_their_weights_beside(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "EXTERNAL_DATA_LIMIT_BYTES", 10_000)
    target = tmp_path / "int8.onnx"
    result = quantize_static_int8(exported["text"], target, [feeds("text", 4)])
    assert {path.name for path in tmp_path.iterdir()} == {"int8.onnx", "int8.onnx_data"}
    assert result.bytes_after == sum(path.stat().st_size for path in tmp_path.iterdir())
    inputs = feeds("text", 3)
    assert lowest_cosine(run(target, inputs), run(exported["text"], inputs)) > 0.99


def lookup_model(table: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["rows"], name="embedding/Gather")],
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", table.shape[1]])],
        [numpy_helper.from_array(table, "table")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_table_by_hand(monkeypatch):
    """Row 0: scale 1.27 / 127 = 0.01, so 0.504 -> 50 -> 0.5. Row 1: zeros stay zeros. Row 2: scale 2."""
    monkeypatch.setattr(onnx_graph, "MIN_TABLE_BYTES", 0)
    model = lookup_model(np.array([[1.27, 0.504], [0, 0], [-254, 3.1]], dtype=np.float32))
    assert onnx_graph.quantize_tables(model) == ("table",)
    onnx.checker.check_model(model, full_check=True)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(stored["table_rows"], np.array([[127, 50], [0, 0], [-127, 2]], dtype=np.int8))
    rows = ort.InferenceSession(model.SerializeToString()).run(None, {"ids": np.array([2, 0, 1, 0])})[0]
    np.testing.assert_allclose(rows, [[-254, 4], [1.27, 0.5], [0, 0], [1.27, 0.5]], rtol=1e-6)


def test_equal_zero_points_are_kept_once_where_no_branch_and_no_output_has_their_name():
    zeros = {name: numpy_helper.from_array(np.zeros(3, dtype=np.int8), name) for name in ("a", "b", "branch", "out")}
    others = [
        numpy_helper.from_array(np.zeros(3, dtype=np.uint8), "unsigned"),
        numpy_helper.from_array(np.ones(3, dtype=np.int8), "ones"),
        numpy_helper.from_array(np.zeros((3, 1), dtype=np.int8), "column"),
        numpy_helper.from_array(np.zeros(3, dtype=np.float32), "float"),
        numpy_helper.from_array(np.zeros(3, dtype=np.float32), "same"),
    ]
    given = [one.name for one in others]
    inner = helper.make_graph(
        [helper.make_node("Identity", ["branch"], ["y"])],
        "inner",
        [],
        [helper.make_tensor_value_info("y", TensorProto.INT8, [3])],
    )
    nodes = [helper.make_node("Something", ["x", *zeros, *given], ["z"]), helper.make_node("If", ["c"], ["i"], then_branch=inner)]
    outputs = [helper.make_tensor_value_info("out", TensorProto.INT8, [3])]
    model = helper.make_model(helper.make_graph(nodes, "g", [], outputs, [*zeros.values(), *others]))
    assert onnx_graph.share_zero_points(model) == 1
    assert [one.name for one in model.graph.initializer] == ["a", "branch", "out", *given]
    assert list(model.graph.node[0].input) == ["x", "a", "a", "branch", "out", *given]
    assert model.graph.node[1].attribute[0].g.node[0].input[0] == "branch"


def test_small_and_excluded_tables_stay_float():
    assert onnx_graph.quantize_tables(lookup_model(np.ones((8, 8), dtype=np.float32))) == ()
    large = np.ones((1000, 64), dtype=np.float32)
    assert onnx_graph.quantize_tables(lookup_model(large), ("embedding",)) == ()
    assert onnx_graph.quantize_tables(lookup_model(large)) == ("table",)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.1", True),
        ("fc1", True),
        ("a.layers.1.mlp.fc1", True),
        ("*fc1", True),
        ("layers.[01].*", False),
        ("*.layers.[01].*", True),
        ("layers.11", False),
        ("fc", False),
        ("layer", False),
    ],
)
def test_patterns(pattern, expected):
    assert matches("a.layers.1.mlp.fc1", pattern) is expected
    assert unmatched(["a.layers.1.mlp.fc1"], [pattern]) == (() if expected else (pattern,))


def test_weights_of_seven_bits_do_not_overflow_where_products_are_added_in_pairs(tmp_path: Path) -> None:
    """Two products 255 * 127 in one pair are 64770, and int16 ends at 32767; 255 * 64 * 2 = 32640 does not reach it."""
    weight = np.full((64, 8), 1.0, dtype=np.float32)
    source = _one_matmul(tmp_path / "float.onnx", weight)
    given = np.ones((4, 64), dtype=np.float32)
    for name, quantize in (
        ("dynamic", lambda target: quantize_dynamic_int8(source, target, reduce_range=True)),
        ("static", lambda target: quantize_static_int8(source, target, [{"x": given}], reduce_range=True)),
    ):
        target = tmp_path / f"{name}.onnx"
        quantize(target)
        stored = [numpy_helper.to_array(i) for i in onnx.load(target).graph.initializer]
        assert max(int(np.abs(w.astype(int)).max()) for w in stored if w.dtype == np.int8 and w.shape == weight.shape) <= 64
        np.testing.assert_allclose(run(target, {"x": given}), np.full((4, 8), 64.0), rtol=0.02)


def _one_matmul(path: Path, weight: np.ndarray) -> Path:
    value = helper.make_tensor_value_info
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="node_linear")
    graph = helper.make_graph(
        [node],
        "one",
        [value("x", TensorProto.FLOAT, ["batch", weight.shape[0]])],
        [value("y", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_float_layer_that_shares_its_weight_with_an_int8_one_reads_floats(tmp_path, per_channel):
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"], name="first/MatMul"),
            helper.make_node("MatMul", ["x", "w"], ["z"], name="second/MatMul"),
        ],
        "two",
        [value("x", TensorProto.FLOAT, ["batch", 64])],
        [value(name, TensorProto.FLOAT, ["batch", 64]) for name in "yz"],
        [numpy_helper.from_array(weight, "w")],
    )
    source, target = tmp_path / "two.onnx", tmp_path / "int8.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), source)
    rows = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    quantize_static_int8(source, target, [{"x": rows}], exclude=["second"], per_channel=per_channel)
    y, z = ort.InferenceSession(target).run(None, {"x": rows})
    np.testing.assert_allclose(z, rows @ weight, rtol=1e-4, atol=1e-4)
    assert 0.001 < np.abs(y - rows @ weight).max() < 1
