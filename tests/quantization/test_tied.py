"""A table that is a layer's weight as well: stored once, and both read the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.blocks import rtn
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
