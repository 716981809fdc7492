"""Files written tensor by tensor are the same models as those that onnx writes."""

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmcompress.quantization.onnx_file import _varint, without, write_model


def product(width: int) -> onnx.ModelProto:
    """One MatMul with a weight of width x width, metadata and two operator sets."""
    weight = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "layer/MatMul")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(0, np.int64), "empty")],
        doc_string="one product",
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)])
    model.metadata_props.add(key="a", value="b")
    return model


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    model = product(40)
    before = model.SerializeToString(deterministic=True)
    write_model(model, lambda: model.graph.initializer, tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx").SerializeToString(deterministic=True) == before
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    model = product(10)
    weight = np.zeros((512, 512), np.float32)  # a megabyte

    def tensors():  # type: ignore[no-untyped-def]
        for i in range(24):
            yield numpy_helper.from_array(weight, f"w{i}")

    tracemalloc.start()
    write_model(model, tensors, tmp_path / "model.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "model.onnx").stat().st_size > 24 * weight.nbytes
    assert peak < 6 * weight.nbytes
    assert [t.name for t in onnx.load(tmp_path / "model.onnx").graph.initializer] == [f"w{i}" for i in range(24)]


@pytest.mark.parametrize(("value", "written"), [(0, b"\x00"), (127, b"\x7f"), (128, b"\x80\x01"), (300, b"\xac\x02")])
def test_numbers_as_protobuf_writes_them(value: int, written: bytes) -> None:
    # 300 is the example of protobuf's own description of its encoding.
    assert _varint(value) == written


def test_without_leaves_the_rest() -> None:
    graph = without(product(4).graph, "initializer")
    assert not graph.initializer
    assert (graph.name, graph.doc_string, graph.node[0].name, len(graph.input)) == ("product", "one product", "layer/MatMul", 1)
