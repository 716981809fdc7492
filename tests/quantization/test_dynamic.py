"""The dynamic quantizer that rounds all channels at once: what it writes is what ONNX Runtime's own writes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.base_quantizer import BaseQuantizer

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.dynamic import OPS, write_dynamic


def numbers(path: Path) -> dict[str, tuple[str, bytes]]:
    """Initializers by name, however they are encoded."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    return {name: (f"{values.dtype}{values.shape}", values.tobytes()) for name, values in found.items()}


def nodes(path: Path) -> list[bytes]:
    return [node.SerializeToString() for node in onnx.load(path).graph.node]


def theirs(prepared: Path, target: Path, excluded: list[str], per_channel: bool, reduce_range: bool) -> None:
    quantize_dynamic(
        prepared,
        target,
        op_types_to_quantize=list(OPS),
        per_channel=per_channel,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=excluded,
        extra_options={"MatMulConstBOnly": True},
    )


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_tower_is_that_of_the_library(exported, tmp_path, per_channel, reduce_range):
    prepared = tmp_path / "prepared.onnx"
    onnx_graph.prepare(exported["vision"], prepared)
    excluded = [node.name for node in onnx_graph.weighted_nodes(onnx.load(prepared)) if "fc1" in node.name]
    assert excluded
    theirs(prepared, tmp_path / "theirs.onnx", excluded, per_channel, reduce_range)
    write_dynamic(prepared, tmp_path / "ours.onnx", excluded, per_channel=per_channel, reduce_range=reduce_range)
    assert numbers(tmp_path / "ours.onnx") == numbers(tmp_path / "theirs.onnx")
    assert nodes(tmp_path / "ours.onnx") == nodes(tmp_path / "theirs.onnx")


def awkward(path: Path) -> None:
    """A Gemm with a transposed weight, one of three axes, two products of one; channels of zeros, ties, tiny numbers."""
    rng = np.random.default_rng(0)
    gemm = rng.normal(size=(6, 4)).astype(np.float32)
    gemm[2] = 0
    gemm[3] = [127, 0.5, 1.5, -2.5]
    gemm[4] = [-1e-44, 1e-44, 0, 0]
    shared = rng.normal(size=(6, 6)).astype(np.float32)
    batched = rng.normal(size=(1, 6, 5)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "gemm", "bias"], ["a"], "gemm", transB=1),
            helper.make_node("MatMul", ["a", "shared"], ["b"], "first"),
            helper.make_node("MatMul", ["b", "shared"], ["c"], "second"),
            helper.make_node("MatMul", ["c", "batched"], ["y"], "batched"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "B", 5])],
        [
            numpy_helper.from_array(gemm, "gemm"),
            numpy_helper.from_array(np.arange(6, dtype=np.float32), "bias"),
            numpy_helper.from_array(shared, "shared"),
            numpy_helper.from_array(batched, "batched"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save_model(model, path)


def test_awkward_weights_are_those_of_the_library(tmp_path, monkeypatch):
    source, prepared = tmp_path / "float.onnx", tmp_path / "prepared.onnx"
    awkward(source)
    onnx_graph.prepare(source, prepared)
    theirs(prepared, tmp_path / "theirs.onnx", [], True, False)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight went channel by channel")

    monkeypatch.setattr(BaseQuantizer, "quantize_weight_per_channel_impl", refuse)
    write_dynamic(prepared, tmp_path / "ours.onnx", [], per_channel=True, reduce_range=False)
    ours = numbers(tmp_path / "ours.onnx")
    assert ours == numbers(tmp_path / "theirs.onnx")
    assert nodes(tmp_path / "ours.onnx") == nodes(tmp_path / "theirs.onnx")
    assert sum(name.endswith("_quantized") for name in ours) == 3
