"""A choice of one row for each example comes before the layers that work row by row, and gives the very numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmcompress.quantization.selected_rows import select_rows_early

from .conftest import image_inputs, text_inputs

EXAMPLES = {"vision": image_inputs(3), "text": text_inputs(3, 8)}


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    found: np.ndarray = ort.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    return found


@pytest.mark.parametrize("name", ["vision", "text"])
def test_towers_give_the_same_with_fewer_rows(exported: dict[str, Path], name: str) -> None:
    model = onnx.load(exported[name])
    feeds = {key: value.numpy() for key, value in EXAMPLES[name].items()}
    before = run(model, feeds)
    assert select_rows_early(model) == 3  # output projection and two feed-forward layers of the last block
    np.testing.assert_allclose(run(model, feeds), before, rtol=1e-5, atol=1e-6)
    makers = {output: node for node in model.graph.node for output in node.output}
    moved = [n for n in model.graph.node if n.op_type == "MatMul" and makers[n.input[0]].op_type == "Unsqueeze"]
    assert ["out_proj" in node.name for node in moved] == [True]
    assert select_rows_early(model) == 0  # there is nothing left to move


def network(middle: list[onnx.NodeProto], extra_output: str = "") -> onnx.ModelProto:
    """(B, 4, 2), the nodes given from ``x`` to ``y``, then the first of the four rows."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((2, 2)), "b": rng.standard_normal(2), "places": rng.standard_normal((1, 4, 2))}
    initializers = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    initializers.append(numpy_helper.from_array(np.asarray(0, dtype=np.int64), "first"))
    choice = helper.make_node("Gather", ["y", "first"], ["out"], "choice", axis=1)
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["B", 2])]
    if extra_output:
        outputs.append(helper.make_tensor_value_info(extra_output, TensorProto.FLOAT, ["B", 4, 2]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4, 2])]
    graph = helper.make_graph([*middle, choice], "g", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def layer(source: str, target: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("MatMul", [source, "w"], [f"{target}.product"], f"{target}/MatMul"),
        helper.make_node("Add", [f"{target}.product", "b"], [target], f"{target}/Add"),
    ]


X = np.random.default_rng(1).standard_normal((3, 4, 2)).astype(np.float32)


def test_a_residual_is_chosen_on_both_of_its_ways() -> None:
    start = helper.make_node("Softmax", ["x"], ["s"], "soft", axis=1)  # over the rows: it needs them all
    model = network([start, *layer("s", "a"), helper.make_node("Add", ["a", "s"], ["y"], "residual")])
    before = run(model, {"x": X})
    assert select_rows_early(model) == 1
    assert sum(node.op_type == "Gather" for node in model.graph.node) == 1
    np.testing.assert_allclose(run(model, {"x": X}), before, rtol=1e-6)


def test_a_column_of_features_is_no_row() -> None:
    """(B, 2) has no tokens: what is taken along its second axis is a feature, which needs the whole product."""
    model = network([helper.make_node("ReduceMean", ["x"], ["mean"], "mean", axes=[1], keepdims=0), *layer("mean", "y")])
    model.opset_import[0].version = 13  # axes as an attribute
    before = run(model, {"x": X})
    assert select_rows_early(model) == 0
    np.testing.assert_array_equal(run(model, {"x": X}), before)


@pytest.mark.parametrize("case", ["read elsewhere", "an output", "over the rows", "places"])
def test_what_needs_all_rows_stays(case: str) -> None:
    if case == "read elsewhere":
        middle = [*layer("x", "y"), helper.make_node("ReduceSum", ["y"], ["sum"], "sum", keepdims=1)]
    elif case == "an output":
        middle = layer("x", "y")
    elif case == "over the rows":
        middle = [*layer("x", "a"), helper.make_node("Softmax", ["a"], ["y"], "soft", axis=1)]
    else:
        middle = [*layer("x", "a"), helper.make_node("Add", ["a", "places"], ["y"], "add")]
    model = network(middle, {"an output": "y", "read elsewhere": "sum"}.get(case, ""))
    before = model.SerializeToString()
    assert select_rows_early(model) == 0
    assert model.SerializeToString() == before
