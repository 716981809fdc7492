"""Merged layers are taken apart: the same answers from int8 files without copies, and what is not known is left alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from transformers import BlipVisionConfig, BlipVisionModel

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.arrangements import ARRANGEMENTS, arrange
from mmcompress.quantization.merged import split_merged
from mmcompress.quantization.onnx_export import export_component
from mmcompress.quantization.prepared import Prepared
from mmcompress.quantization.ptq import quantize_dynamic_int8, quantize_static_int8
from mmcompress.quantization.ranges import collect_ranges

from .conftest import Component

LAYERS = 2


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
        config = BlipVisionConfig(**sizes, image_size=32, patch_size=8, initializer_range=0.1)  # by default 1e-10
        self.model = BlipVisionModel(config).eval()
        for parameter in self.model.parameters():  # biases start at 0, where errors would not show
            if parameter.ndim == 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(pixel_values=pixel_values).last_hidden_state,)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny vision tower of BLIP."""
    path = tmp_path_factory.mktemp("blip") / "tower.onnx"
    axes = {"pixel_values": {0: "batch"}, "hidden": {0: "batch"}}
    part = Component("tower", Tower().eval(), ("pixel_values",), ("hidden",), axes, {"pixel_values": pixels(2)})
    export_component(part, part.examples, path)
    return path


def pixels(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def run(path: Path, batch: int) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options).run(None, {"pixel_values": pixels(batch).numpy()})[0]


def takers(path: Path) -> int:
    """Gather nodes that take a part out of what was folded."""
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "Gather"]
    return sum(1 for node in nodes for a in node.attribute if a.name == "axis" and a.i == 2)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_every_placement_takes_them_apart_and_answers_as_before(blip, tmp_path, name):
    prepared, chosen = Prepared(blip, tmp_path), ARRANGEMENTS[name]
    ranges = collect_ranges(blip, [{"pixel_values": pixels(4).numpy()}])
    whole, split = tmp_path / "whole.onnx", tmp_path / "split.onnx"
    if chosen.ranges == "run time":
        found = quantize_dynamic_int8(prepared, whole, per_channel=chosen.per_channel)
    else:
        options = {"outputs": chosen.outputs, "attention": chosen.attention, "scores": chosen.scores, "signed": chosen.signed}
        found = quantize_static_int8(
            prepared, whole, ranges, per_channel=chosen.per_channel, quantize_conv=chosen.conv, **options
        )
    result = arrange(name, prepared, split, lambda: ranges)
    assert takers(whole) == 3 * LAYERS
    assert takers(split) == 0
    assert (result.quantized, result.left_float, result.tables) == (found.quantized, found.left_float, found.tables)
    assert sum("qkv" in layer for layer in result.quantized) == LAYERS
    assert abs(result.bytes_after - found.bytes_after) < 0.1 * found.bytes_after
    if chosen.fused:
        assert result.op_counts["QAttention"] == LAYERS
    for batch in (1, 3):
        np.testing.assert_allclose(run(split, batch), run(whole, batch), atol=1e-5)


def test_rounded_inputs_stay_the_only_ones_that_the_parts_read(blip, tmp_path):
    ranges = collect_ranges(blip, [{"pixel_values": pixels(4).numpy()}])
    arrange("static", blip, tmp_path / "int8.onnx", lambda: ranges)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    parts = [node for node in graph.node if "qkv" in node.name and node.op_type == "MatMul"]
    assert len(parts) == 3 * LAYERS
    assert {tuple(makers[name] for name in node.input) for node in parts} == {("DequantizeLinear", "DequantizeLinear")}


def test_a_layer_that_stays_float_stays_whole(blip, tmp_path):
    target = tmp_path / "int8.onnx"
    result = arrange("dynamic", blip, target, list, exclude=["layers.0.self_attn.qkv"])
    assert takers(target) == 3
    assert sum("qkv" in layer for layer in result.quantized) == LAYERS - 1
    assert [layer for layer in result.left_float if "qkv" in layer] == [
        next(n.name for n in onnx_graph.weighted_nodes(onnx.load(target)) if "qkv" in n.name)
    ]


def merged(shape: tuple[int, ...] = (-1, 5, 3, 2, 4), indices: tuple[int, ...] = (0, 1, -1), axis: int = 2) -> onnx.ModelProto:
    """A dynamic int8 layer of 24 outputs, folded, whose parts are outputs."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.integers(-127, 128, (6, 24)).astype(np.int8),
        "zero": np.zeros(24, np.int8),
        "scale": rng.random(24).astype(np.float32),
        "bias": rng.normal(size=24).astype(np.float32),
        "shape": np.asarray(shape, np.int64),
        **{f"i{i}": np.asarray(i, np.int64) for i in indices},
    }
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "quantize"),
        helper.make_node("MatMulInteger", ["q", "w", "z", "zero"], ["integers"], "qkv/MatMul"),
        helper.make_node("Cast", ["integers"], ["floats"], "qkv/Cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "scale"], ["scales"], "qkv/scales"),
        helper.make_node("Mul", ["floats", "scales"], ["scaled"], "qkv/Mul"),
        helper.make_node("Add", ["bias", "scaled"], ["added"], "qkv/Add"),
        helper.make_node("Reshape", ["added", "shape"], ["folded"], "Reshape"),
        *(helper.make_node("Gather", ["folded", f"i{i}"], [f"y{i}"], f"Gather_{i}", axis=axis) for i in indices),
    ]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in indices]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 5, 6])]
    tensors = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "g", given, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def answers(model: onnx.ModelProto) -> list[np.ndarray]:
    values = np.random.default_rng(1).normal(size=(2, 5, 6)).astype(np.float32)
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": values})


@pytest.mark.parametrize("indices", [(0, 1, -1), (2, 0), (1,)])
def test_parts_by_hand(indices):
    model = merged(indices=indices)
    wanted = answers(model)
    assert split_merged(model) == {"qkv/MatMul": tuple(f"qkv/MatMul_part_{i % 3}" for i in sorted(i % 3 for i in indices))}
    counts = Counter(node.op_type for node in model.graph.node)
    assert (counts["MatMulInteger"], counts["Gather"], counts["DynamicQuantizeLinear"]) == (len(indices), 0, 1)
    for ours, theirs in zip(answers(model), wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_layers_that_share_weights_are_cut_into_parts_of_their_own_sizes():
    model, other = merged(), merged(shape=(-1, 5, 2, 3, 4), indices=(0, 1))
    for node in other.graph.node[1:]:
        node.name = f"other.{node.name}"
        node.input[:] = [
            name if name in ("q", "s", "z", "w", "zero", "scale", "bias") else f"other.{name}" for name in node.input
        ]
        node.output[:] = [f"other.{name}" for name in node.output]
        model.graph.node.append(node)
    for tensor in other.graph.initializer:
        if tensor.name not in ("w", "zero", "scale", "bias"):
            tensor.name = f"other.{tensor.name}"
            model.graph.initializer.append(tensor)
    for value in other.graph.output:
        value.name = f"other.{value.name}"
        model.graph.output.append(value)
    wanted = answers(model)
    assert {name: len(parts) for name, parts in split_merged(model).items()} == {"qkv/MatMul": 3, "other.qkv/MatMul": 2}
    for ours, theirs in zip(answers(model), wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def reading(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model with a value that is read once more."""
    model.graph.node.append(helper.make_node("Neg", [name], ["more"], "Neg"))
    kind = TensorProto.INT32 if name == "integers" else TensorProto.FLOAT
    model.graph.output.append(helper.make_tensor_value_info("more", kind, None))
    return model


def giving(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model with a value that is an output, too."""
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return model


@pytest.mark.parametrize(
    "model",
    [
        merged(shape=(-1, 5, 24, 1, 1), indices=(0, 1), axis=1),
        merged(shape=(-1, 5, 3, 8)),
        merged(indices=(2, -1)),
        reading(merged(), "folded"),
        reading(merged(), "added"),
        reading(merged(), "integers"),
        giving(merged(), "folded"),
        giving(merged(), "scaled"),
    ],
    ids=["other axis", "four axes", "a part twice", "folded", "added", "integers", "folded out", "scaled out"],
)
def test_what_is_read_otherwise_is_left_alone(model):
    before = model.SerializeToString()
    assert split_merged(model) == {}
    assert model.SerializeToString() == before
    assert answers(model)
