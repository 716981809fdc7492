"""A table that is a layer's weight as well: stored once, and both read the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.arrangements import fused
from mmcompress.quantization.blocks import rtn
from mmcompress.quantization.ptq import quantize_dynamic_int8, quantize_static_int8
from mmcompress.quantization.switchboard import Switchboard
from mmcompress.quantization.tied import share_integers
from mmcompress.quantization.weight_only import quantize_weights

VOCABULARY = 300


def decoder(tied: bool, shape: tuple[int, ...] = (3,), width: int = 64) -> onnx.ModelProto:
    """Looks rows of a table up, and multiplies them by the table transposed, or by another one."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((VOCABULARY, width)).astype(np.float32)
    weight = np.ascontiguousarray(table.T) if tied else rng.standard_normal((width, VOCABULARY)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "embed_tokens/Gather"),
        helper.make_node("MatMul", ["rows", "weight"], ["logits"], "proj_out/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [*shape, size])
            for name, size in (("rows", width), ("logits", VOCABULARY))
        ],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [64, 96])
def test_a_tied_table_is_stored_once(tmp_path, shape, bits, width):
    sizes = {}
    for tied in (False, True):
        onnx.save(decoder(tied, shape, width), tmp_path / "float.onnx")
        result = quantize_weights(tmp_path / "float.onnx", tmp_path / f"{tied}.onnx", bits=bits, block_size=32)
        assert (result.quantized, result.left_float, result.tables) == (("proj_out/MatMul",), (), ("table",))
        sizes[tied] = result.bytes_after
    assert sizes[False] - sizes[True] > 0.9 * VOCABULARY * width * bits // 8
    options = ort.SessionOptions()
    options.log_severity_level = 3
    ids = np.array([0, 7, 299]).reshape(shape)
    rows, logits = ort.InferenceSession(tmp_path / "True.onnx", options).run(None, {"ids": ids})
    weight = numpy_helper.to_array(decoder(True, shape, width).graph.initializer[1])
    digits, grid = rtn(weight, bits, 32)
    held = grid.values(digits)
    np.testing.assert_allclose(rows, held.T[ids], atol=1e-6)
    # The kernel rounds its inputs to int8.
    np.testing.assert_allclose(logits, held.T[ids] @ held, atol=0.02 * np.abs(held.T[ids] @ held).max())
    if bits == 8:  # no range is cut
        assert 0 < np.abs(rows - weight.T[ids]).max() <= 0.51 * grid.scales.max()


def test_a_small_tied_table_is_stored_once_too(tmp_path):
    """Its layer takes integers in any case: floats beside them would be the table a second time."""
    model = decoder(True, width=32)
    table = numpy_helper.to_array(model.graph.initializer[0])[:40]
    for place, values in enumerate((table, np.ascontiguousarray(table.T))):
        model.graph.initializer[place].CopyFrom(numpy_helper.from_array(values, model.graph.initializer[place].name))
    model.graph.output[1].type.tensor_type.shape.dim[1].dim_value = 40
    onnx.save(model, tmp_path / "float.onnx")
    assert table.nbytes < onnx_graph.MIN_TABLE_BYTES
    assert quantize_weights(tmp_path / "float.onnx", tmp_path / "q.onnx", bits=8).tables == ("table",)
    floats = [one for one in onnx.load(tmp_path / "q.onnx").graph.initializer if one.data_type == TensorProto.FLOAT]
    assert all(np.prod(one.dims) <= 40 for one in floats)


def test_an_excluded_table_or_layer_stays_apart(tmp_path):
    onnx.save(decoder(True), tmp_path / "float.onnx")
    result = quantize_weights(tmp_path / "float.onnx", tmp_path / "q.onnx", bits=8, exclude=["embed_tokens"])
    assert (result.quantized, result.tables) == (("proj_out/MatMul",), ())
    assert result.op_counts["Gather"] == 1


def int8_file(folder, scheme, model, **options):
    """Quantizes a decoder by calibration, or with ranges of each call."""
    onnx.save(model, folder / "float.onnx")
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    feeds = [{"ids": np.arange(i, i + 3).reshape(shape)} for i in range(0, VOCABULARY, 7)[:-1]]
    if scheme == "static":
        return quantize_static_int8(folder / "float.onnx", folder / "q.onnx", feeds, **options)
    return quantize_dynamic_int8(folder / "float.onnx", folder / "q.onnx", **options)


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_integers_of_a_tied_table_are_stored_once(tmp_path, shape, scheme):
    sizes = {}
    for tied in (False, True):
        result = int8_file(tmp_path, scheme, decoder(tied, shape), reduce_range=False)
        assert (result.quantized, result.left_float, result.tables) == (("proj_out/MatMul",), (), ("table",))
        sizes[tied] = result.bytes_after
        ort.InferenceSession(tmp_path / "q.onnx")  # no name stands twice
    assert sizes[False] - sizes[True] > 0.95 * VOCABULARY * 64
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "q.onnx").graph.initializer}
    (integers,) = (values for values in held.values() if values.shape == (VOCABULARY, 64))
    table = numpy_helper.to_array(decoder(True, shape).graph.initializer[0])
    units = np.abs(table).max(1, keepdims=True) / 127
    ids = np.array([0, 7, 299]).reshape(shape)
    rows, logits = ort.InferenceSession(tmp_path / "q.onnx").run(None, {"ids": ids})
    assert (np.abs(integers * units - table) <= 0.501 * units).all()
    rounding = 0.02 if scheme == "static" else 1e-6  # it rounds what was looked up once more
    np.testing.assert_allclose(rows, (integers * units)[ids], atol=rounding)
    assert (np.abs(rows - table[ids]).max(-1) > 1e-4).all()
    np.testing.assert_allclose(logits, rows @ table.T, atol=0.02 * np.abs(rows @ table.T).max())


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_a_table_is_not_rounded_as_coarsely_as_a_layer_with_one_scale(tmp_path, scheme):
    int8_file(tmp_path, scheme, decoder(True), per_channel=False)
    graph = onnx.load(tmp_path / "q.onnx").graph
    assert sorted(tuple(one.dims) for one in graph.initializer if len(one.dims) == 2 and 1 not in one.dims) == [
        (64, VOCABULARY),
        (VOCABULARY, 64),
    ]


def test_integers_of_a_table_with_its_own_pattern_stay_apart(tmp_path):
    assert int8_file(tmp_path, "dynamic", decoder(True), exclude=["embed_tokens"]).tables == ()
    assert int8_file(tmp_path, "dynamic", decoder(True), include=["proj_out"]).tables == ()
    held = onnx.load(tmp_path / "q.onnx").graph
    assert any(tuple(one.dims) == (VOCABULARY, 64) and one.data_type == TensorProto.FLOAT for one in held.initializer)
    assert share_integers(onnx.load(tmp_path / "q.onnx")) == ("table",)


def test_a_layer_of_other_weights_is_not_taken_for_the_table(tmp_path):
    int8_file(tmp_path, "static", decoder(True), exclude=["embed_tokens"])
    model = onnx.load(tmp_path / "q.onnx")
    (place,) = (i for i, one in enumerate(model.graph.initializer) if one.name == "table")
    table = numpy_helper.to_array(model.graph.initializer[place]).copy()
    table[5, 9] += 0.03  # more than half a scale
    model.graph.initializer[place].CopyFrom(numpy_helper.from_array(table, "table"))
    before = model.SerializeToString()
    assert share_integers(model) == ()
    assert model.SerializeToString() == before


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_a_fused_file_stores_it_once_too(tmp_path, scheme):
    found = int8_file(tmp_path, scheme, decoder(True))
    whole = fused(tmp_path / "q.onnx", tmp_path / "fused.onnx", found)
    assert whole.bytes_after < found.bytes_after + 2_000
    ids = {"ids": np.array([0, 7, 299])}
    answers = [ort.InferenceSession(tmp_path / name).run(None, ids) for name in ("q.onnx", "fused.onnx")]
    for one, other in zip(*answers, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_its_layer_can_be_switched_and_is_no_product_of_activations(tmp_path):
    assert int8_file(tmp_path, "static", decoder(True)).float_products == 0
    board = Switchboard(tmp_path / "float.onnx", tmp_path / "q.onnx")
    assert board.layers == ("proj_out",)
    ids = {"ids": np.array([0, 7, 299])}
    plain, rounded = (board(ids, int8)["logits"] for int8 in ((), ("proj_out",)))
    (expected,) = ort.InferenceSession(tmp_path / "q.onnx").run(["logits"], ids)
    np.testing.assert_allclose(rounded, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(plain - expected).max() > 1e-3
