"""Constants stored in int8 and read as floats: which ones, how exact, and that the graph still runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mmcompress.quantization.ptq import quantize_dynamic_int8, quantize_static_int8
from mmcompress.quantization.stored import fold_lookups, store_constants
from mmcompress.quantization.weight_only import quantize_weights

CHANNELS, WIDTH, STEPS = 80, 256, 120


def speech(positions: tuple[int, ...] = (STEPS, WIDTH)) -> onnx.ModelProto:
    """A convolution over time, positions that are added, and a linear layer: how a speech encoder begins."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=positions) * np.logspace(-2, 0, positions[-2])[:, None]

    def tensor(name: str, values: NDArray[np.float64]) -> onnx.TensorProto:
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "kernel", "bias"], ["c"], "encoder.conv1/Conv", kernel_shape=[3], pads=[1, 1]),
        helper.make_node("Transpose", ["c"], ["t"], "encoder/Transpose", perm=[0, 2, 1]),
        helper.make_node("Add", ["t", "positions"], ["p"], "encoder.embed_positions/Add"),
        helper.make_node("MatMul", ["p", "linear"], ["y"], "encoder.fc/MatMul"),
    ]
    weights = [
        tensor("kernel", rng.normal(size=(WIDTH, CHANNELS, 3)) / 15),
        tensor("bias", rng.normal(size=WIDTH)),
        tensor("positions", rows),
        tensor("linear", rng.normal(size=(WIDTH, WIDTH)) / 16),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", CHANNELS, STEPS])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", STEPS, WIDTH])]
    graph = helper.make_graph(nodes, "speech", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def held(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def run(model: onnx.ModelProto) -> NDArray[np.float32]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(size=(2, CHANNELS, STEPS)).astype(np.float32)
    return np.asarray(session.run(None, {"x": x})[0])


def test_kernels_and_positions_keep_their_values_to_half_a_step() -> None:
    model = speech()
    before, wanted = held(model), run(model)
    assert set(store_constants(model, float_bytes=1_000_000)) == {"kernel", "positions"}
    onnx.checker.check_model(model)
    after = held(model)
    for name, shape in {"kernel": (WIDTH, 1, 1), "positions": (STEPS, 1)}.items():
        integers, scales = after[f"{name}_int8"], after[f"{name}_scale"].reshape(shape)
        assert integers.dtype == np.int8
        assert scales.size == shape[0]
        assert (np.abs(integers * scales - before[name]) <= 0.5001 * scales).all()
        assert np.abs(integers).max() == 127
    assert "kernel" not in after
    assert after["bias"].dtype == np.float32
    found = run(model)
    assert 0 < np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_positions_that_are_little_of_the_file_stay_float() -> None:
    positions = 4 * STEPS * WIDTH
    model = speech()
    assert store_constants(model, float_bytes=100 * positions + 200) == ("kernel",)
    model = speech()
    assert store_constants(model, float_bytes=100 * positions - 200) == ("kernel", "positions")
    model = speech((1, STEPS, WIDTH))
    assert store_constants(model, float_bytes=1_000_000) == ("kernel", "positions")
    assert held(model)["positions_scale"].shape == (STEPS,)
    model = speech((1, WIDTH))  # one row for all steps is a bias
    assert store_constants(model, float_bytes=1_000_000) == ("kernel",)


def test_patterns_and_other_readers_keep_constants_float() -> None:
    model = speech()
    assert store_constants(model, exclude=["encoder.conv1"], float_bytes=1_000_000) == ("positions",)
    model = speech()
    assert store_constants(model, include=["encoder.conv1"], float_bytes=1_000_000) == ("kernel",)
    model = speech()
    assert store_constants(model, float_bytes=1_000_000, kernels=False) == ("positions",)
    model = speech()
    model.graph.node.append(helper.make_node("Mul", ["positions", "positions"], ["square"], "encoder/Mul"))
    assert store_constants(model, float_bytes=1_000_000) == ("kernel",)


@pytest.mark.parametrize("scheme", ["dynamic", "static", "static, conv float", "int8", "int4"])
def test_the_schemes_store_them(scheme: str, tmp_path: Path) -> None:
    source, target = tmp_path / "float.onnx", tmp_path / "small.onnx"
    onnx.save(speech(), source)
    feeds = [{"x": np.random.default_rng(2).normal(size=(4, CHANNELS, STEPS)).astype(np.float32)}]
    if scheme == "dynamic":
        found = quantize_dynamic_int8(source, target)
    elif scheme.startswith("static"):
        found = quantize_static_int8(source, target, feeds, quantize_conv=scheme == "static")
    else:
        found = quantize_weights(source, target, bits=8 if scheme == "int8" else 4)
    assert set(found.tables) == {"positions"} | (set() if scheme.startswith("static") else {"kernel"})
    assert set(found.left_float) == ({"encoder.conv1/Conv"} if scheme == "static, conv float" else set())
    model = onnx.load(target)
    sizes = {name: values.nbytes for name, values in held(model).items() if values.dtype == np.float32}
    assert max(sizes.values()) < 65_536 or scheme == "static, conv float"
    wanted, got = run(speech()), run(model)
    cosines = (got * wanted).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert cosines.mean() > (0.99 if scheme == "int4" else 0.999)


def test_positions_that_are_looked_up_in_a_fixed_order_are_stored_too() -> None:
    model = speech()
    wanted = run(model)
    table, order = held(model)["positions"], np.arange(STEPS)[::-1].copy()
    place = next(i for i, one in enumerate(model.graph.initializer) if one.name == "positions")
    model.graph.initializer[place].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(table[order]), "table"))
    model.graph.initializer.append(numpy_helper.from_array(order, "order"))
    model.graph.node.insert(0, helper.make_node("Gather", ["table", "order"], ["positions"], "encoder.embed_positions/Gather"))
    assert store_constants(model, float_bytes=1_000_000) == ("kernel",)
    assert fold_lookups(model) == 1
    assert not {"table", "order"} & set(held(model))
    assert store_constants(model, float_bytes=1_000_000) == ("positions",)
    assert 0 < np.abs(run(model) - wanted).max() < 0.05


def test_rows_that_leave_the_graph_and_ids_that_are_given_stay_lookups() -> None:
    weights = [numpy_helper.from_array(np.ones((4, 2), dtype=np.float32), "t"), numpy_helper.from_array(np.array([1, 2]), "i")]
    nodes = [
        helper.make_node("Gather", ["t", "i"], ["rows"], "a/Gather"),
        helper.make_node("Gather", ["t", "ids"], ["given"], "b/Gather"),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("rows", "given")]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, weights))
    assert fold_lookups(model) == 0
    assert [node.op_type for node in model.graph.node] == ["Gather", "Gather"]
