"""Export of components: same answers as torch at every batch size and length, and errors that say what is wrong."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from mmcompress.quantization import onnx_export
from mmcompress.quantization.onnx_export import export_component

from .conftest import Component, image_inputs, text_inputs


def run(path: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    return ort.InferenceSession(path).run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def torch_run(component: Component, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return component.module(*(inputs[name] for name in component.inputs))[0].numpy()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_vision_answers_as_torch_at_every_batch_size(components, exported, batch):
    inputs = image_inputs(batch)
    np.testing.assert_allclose(run(exported["vision"], inputs), torch_run(components["vision"], inputs), atol=1e-5)


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (2, 24), (5, 8)])
def test_text_answers_as_torch_at_every_length(components, exported, batch, length):
    inputs = text_inputs(batch, length)
    np.testing.assert_allclose(run(exported["text"], inputs), torch_run(components["text"], inputs), atol=1e-5)


def test_text_respects_the_attention_mask(components, exported):
    inputs = text_inputs(2, 8)
    plain = run(exported["text"], inputs)
    inputs["attention_mask"][:, 1] = 0  # before the end token, so that causality does not hide it
    masked = run(exported["text"], inputs)
    np.testing.assert_allclose(masked, torch_run(components["text"], inputs), atol=1e-5)
    assert np.abs(masked - plain).max() > 1e-3


def test_names_and_axes_are_the_ones_asked_for(exported):
    graph = onnx.load(exported["text"]).graph
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert axes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "sequence_length"],
        "text_embeds": ["batch_size", 32],
    }


def test_nodes_are_named_after_modules_once_each_and_no_path_of_this_machine_is_left(exported):
    graph = onnx.load(exported["vision"]).graph
    names = [node.name for node in graph.node]
    assert "model.vision_model.encoder.layers.1.mlp.fc2/MatMul" in names
    assert len(set(names)) == len(names)
    assert b"site-packages" not in exported["vision"].read_bytes()


def test_export_leaves_mode_and_attention_as_they_were(fresh, tmp_path):
    component = fresh["vision"]
    config = component.module.model.config
    component.module.train()
    component.module.model.vision_model.encoder.layers[0].eval()
    before = [part.training for part in component.module.modules()]
    attention = (config._attn_implementation, config.text_config._attn_implementation)
    export_component(component, component.examples, tmp_path / "vision.onnx")
    assert [part.training for part in component.module.modules()] == before
    assert (config._attn_implementation, config.text_config._attn_implementation) == attention == ("sdpa", "sdpa")


class Sum(nn.Module):
    """Takes its inputs as `*rest`, as a decoder takes a flat cache."""

    def forward(self, first: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor]:
        return (first + rest[0] * rest[1],)


def sum_component(**changes: object) -> Component:
    axes = {name: {0: "batch_size"} for name in ("a", "b", "c", "total")}
    examples = {name: torch.ones(2, 3) for name in ("a", "b", "c")}
    fields = {"module": Sum(), "dynamic_axes": axes, "examples": examples, **changes}
    return Component(name="sum", inputs=("a", "b", "c"), outputs=("total",), **fields)


def test_star_arguments_have_dynamic_axes_too(tmp_path):
    component = sum_component()
    export_component(component, component.examples, tmp_path / "sum.onnx")
    inputs = {name: torch.full((5, 3), float(value)) for value, name in enumerate("abc", start=2)}
    np.testing.assert_array_equal(run(tmp_path / "sum.onnx", inputs), np.full((5, 3), 2.0 + 3.0 * 4.0))


def test_weights_above_the_limit_go_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "EXTERNAL_DATA_LIMIT_BYTES", 1000)
    linear = nn.Linear(64, 64)
    component = Component("linear", _Tuple(linear), ("x",), ("y",), {"x": {0: "n"}, "y": {0: "n"}}, {})
    export_component(component, {"x": torch.ones(2, 64)}, tmp_path / "linear.onnx")
    assert (tmp_path / "linear.onnx_data").stat().st_size >= 64 * 64 * 4
    assert (tmp_path / "linear.onnx").stat().st_size < 64 * 64 * 4
    x = torch.randn(3, 64)
    np.testing.assert_allclose(run(tmp_path / "linear.onnx", {"x": x}), linear(x).detach().numpy(), atol=1e-5)


class _Tuple(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.inner(x),)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, r"missing \['c'\]"),
        ({name: torch.ones(2, 3) for name in "abcd"}, r"unknown \['d'\]"),
        ({name: torch.ones(1, 3) for name in "abc"}, "axis 0 .batch_size. of the example input a has size 1"),
    ],
)
def test_wrong_examples_are_refused(tmp_path, examples, message):
    with pytest.raises(ValueError, match=message):
        export_component(sum_component(), examples, tmp_path / "sum.onnx")


class Constant(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor]:
        return ((a + b + c).sum(dim=0, keepdim=True),)


def test_an_output_without_its_dynamic_axis_is_refused(tmp_path):
    component = sum_component(module=Constant())
    with pytest.raises(onnx_export.ExportError, match="total became the constant 1"):
        export_component(component, component.examples, tmp_path / "sum.onnx")
