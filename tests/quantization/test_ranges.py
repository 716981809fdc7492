"""Ranges from one pass over calibration data: those of ONNX Runtime's own calibration, for every placement."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.ptq import quantize_static_int8
from mmcompress.quantization.ranges import activations, collect_ranges
from mmcompress.quantization.watching import pieces

from .conftest import image_inputs, text_inputs

MAKE = {"vision": image_inputs, "text": lambda batch: text_inputs(batch, 8)}


def batches(name: str) -> list[dict[str, np.ndarray]]:
    return [{key: value.numpy() for key, value in MAKE[name](count).items()} for count in (4, 3, 5)]


class Reader(CalibrationDataReader):
    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self.left = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)


ARRANGEMENTS = {
    "plain": {},
    "outputs": {"outputs": True},
    "attention": {"attention": True},
    "per-tensor": {"per_channel": False},
    "signed": {"signed": True},
    "conv-float": {"quantize_conv": False},
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", ["vision", "text"])
def test_the_file_is_the_one_that_onnxruntime_writes_when_it_calibrates_itself(exported, tmp_path, name, arrangement):
    """One pass serves all placements, and every field of the file is as `quantize_static` has it, but for what it says twice."""
    options = ARRANGEMENTS[arrangement]
    ranges = collect_ranges(exported[name], iter(batches(name)))
    assert ranges.rows == 12
    ours = tmp_path / "ours.onnx"
    quantize_static_int8(exported[name], ours, ranges, reduce_range=False, exclude=["token_embedding"], **options)
    prepared = tmp_path / "prepared.onnx"
    onnx_graph.prepare(exported[name], prepared, patches=options.get("quantize_conv", True))
    graph = onnx.load(prepared, load_external_data=False)
    nodes = onnx_graph.weighted_nodes(graph) + (onnx_graph.free_products(graph) if options.get("attention") else [])
    ops = ["MatMul", "Gemm", "Conv"] if options.get("quantize_conv", True) else ["MatMul", "Gemm"]
    signed = options.get("signed", False)
    quantize_static(
        str(prepared),
        str(tmp_path / "theirs.onnx"),
        Reader(batches(name)),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=ops,
        nodes_to_quantize=[node.name for node in nodes if node.op_type in ops],
        per_channel=options.get("per_channel", True),
        activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={
            "OpTypesToExcludeOutputQuantization": [] if options.get("outputs") else ["MatMul", "Gemm"],
            "ActivationSymmetric": signed,
        },
    )
    theirs = onnx.load(tmp_path / "theirs.onnx")
    onnx_graph.share_zero_points(theirs)
    del theirs.graph.value_info[:]
    assert onnx.load(ours) == theirs


def test_ranges_by_hand(tmp_path: Path) -> None:
    """x in two batches: {1, -2}, {3, 0}; y = x @ [[2], [1]]."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer/MatMul")],
        "one",
        [value("x", TensorProto.FLOAT, ["batch", 2])],
        [value("y", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(np.array([[2.0], [1.0]], dtype=np.float32), "w")],
    )
    path = tmp_path / "one.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    feeds = [{"x": np.array(x, dtype=np.float32)} for x in ([[1, -2]], [[3, 0]])]
    ranges = collect_ranges(path, feeds)
    assert ranges.rows == 2
    assert ranges.limits() == {"x": (-2, 3), "y": (0, 6)}


def test_every_tensor_that_products_read_or_write_is_seen(exported, tmp_path):
    """Against the tensors themselves, as the float graph gives them."""
    prepared = tmp_path / "prepared.onnx"
    onnx_graph.prepare(exported["vision"], prepared)
    model = onnx.load(prepared)
    names = activations(model)
    ranges = collect_ranges(exported["vision"], batches("vision"))
    assert set(ranges.limits()) == set(names)
    assert {node.output[0] for node in onnx_graph.free_products(model)} < set(names)
    for name in names:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    found = [dict(zip(names, session.run(names, batch), strict=True)) for batch in batches("vision")]
    for name, (low, high) in ranges.limits().items():
        assert low == min(one[name].min() for one in found)
        assert high == max(one[name].max() for one in found)


def test_what_is_not_finite_is_refused(exported):
    broken = batches("vision")
    broken[1]["pixel_values"][0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite on calibration data"):
        collect_ranges(exported["vision"], broken)


def test_batches_are_cut_where_all_inputs_have_them_first():
    five, two = np.arange(5), np.arange(2)
    cut = list(pieces([{"a": five, "b": five[:, None]}, {"a": five, "b": two}], 2))
    assert [[len(values) for values in piece.values()] for piece in cut] == [[2, 2], [2, 2], [1, 1], [5, 2]]
    assert np.concatenate([piece["a"] for piece in cut[:3]]).tolist() == five.tolist()
