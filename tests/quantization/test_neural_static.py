"""Numbers of a static quantization in our files; by Neural Compressor itself where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import mmcompress as mm
from mmcompress.context import Context
from mmcompress.data.examples import as_examples
from mmcompress.errors import RecipeError
from mmcompress.quantization import onnx_graph
from mmcompress.quantization.naming import module_path
from mmcompress.quantization.neural_compressor import BackendError, Toy
from mmcompress.quantization.neural_static import StaticLayer, static_layers, write_static
from mmcompress.quantization.ranges import Range
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from tests import tiny

from .conftest import image_inputs
from .test_gptq import run

INSTALLED = importlib.util.find_spec("neural_compressor") is not None
needs_it = pytest.mark.skipif(not INSTALLED, reason="needs the extra neural-compressor")
BATCHES = [(torch.randn(count, 6, 32, generator=torch.Generator().manual_seed(count)),) for count in (4, 3)]
TASK = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {} ."])


def layers_of(path: Path, tmp_path: Path) -> dict[str, tuple[int, int]]:
    """(O, I) of the layers of a float file."""
    onnx_graph.prepare(path, tmp_path / "prepared.onnx")
    model = onnx.load(tmp_path / "prepared.onnx")
    held = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    rows = {node.name: any(a.name == "transB" and a.i for a in node.attribute) for node in model.graph.node}
    nodes = onnx_graph.weighted_nodes(model)
    return {module_path(node.name): held[node.input[1]][:: 1 if rows[node.name] else -1] for node in nodes}


def test_given_numbers_stand_in_the_file(exported: dict[str, Path], tmp_path: Path) -> None:
    shapes, rng = layers_of(exported["vision"], tmp_path), np.random.default_rng(0)
    left = next(name for name in shapes if name.endswith("layers.1.mlp.fc2"))
    ends = Range(np.float32(-1.0), np.float32(1.55))  # a scale of 0.01, and 100 for 0
    given = {
        name: StaticLayer(ends, rng.integers(-128, 128, shape, dtype=np.int8), rng.uniform(1e-3, 2e-3, shape[0]).astype("f4"))
        for name, shape in shapes.items()
        if name != left
    }
    target = tmp_path / "static.onnx"
    result = write_static(exported["vision"], target, given)
    assert {module_path(name) for name in result.left_float} == {left}
    assert {module_path(name) for name in result.quantized} == set(given)
    assert result.unmatched_exclude == ()
    graph = onnx.load(target).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    seen = 0
    for node in graph.node:
        layer = given.get(module_path(node.name))
        if layer is None or node.op_type not in onnx_graph.PRODUCT_OPS:
            continue
        back, weight = makers[node.input[0]], makers[node.input[1]]
        assert held[back.input[1]] == pytest.approx(0.01)
        assert held[back.input[2]] == 100
        axis = next(a.i for a in weight.attribute if a.name == "axis")
        digits = held[weight.input[0]]
        assert np.array_equal(digits if axis == 0 else digits.T, layer.digits)
        assert np.array_equal(held[weight.input[1]], layer.scales)
        seen += 1
    assert seen == len(given)
    run(target, {name: values.numpy() for name, values in image_inputs(3).items()})


def test_patterns_leave_layers_float(exported: dict[str, Path], tmp_path: Path) -> None:
    shapes = layers_of(exported["vision"], tmp_path)
    ends = Range(np.float32(-1), np.float32(1))
    given = {name: StaticLayer(ends, np.ones(shape, np.int8), np.ones(shape[0], np.float32)) for name, shape in shapes.items()}
    result = write_static(exported["vision"], tmp_path / "static.onnx", given, exclude=["fc1", "nowhere"])
    assert all("fc1" in name for name in result.left_float)
    assert result.left_float
    assert result.unmatched_exclude == ("nowhere",)


@pytest.mark.skipif(INSTALLED, reason="says what is missing")
def test_without_the_package_the_extra_is_named(model: mm.CompressedModel, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"cannot be imported .*pip install 'mmcompress\[neural-compressor\]'"):
        static_layers(Toy().eval(), BATCHES, [{0: "batch"}])
    step = mm.passes.Quantize(scheme="int8-static", backend="neural-compressor", samples=16, reduce_range=False)
    with pytest.raises(RecipeError, match=r"quantize: vision_model: neural-compressor cannot be imported"):
        step.apply(model, context=Context(task=TASK, train=as_examples(tiny.dataset(24)), workdir=tmp_path))


@needs_it
@pytest.mark.slow
@pytest.mark.parametrize("observer", ["minmax", "kl"])
def test_it_finds_what_its_program_computes_with(observer: str) -> None:
    toy = Toy().eval()
    layers, wanted = static_layers(toy, BATCHES, [{0: "batch"}], observer)  # type: ignore[arg-type]
    assert set(layers) == {name for name, part in toy.named_modules() if isinstance(part, torch.nn.Linear)}
    for name, layer in layers.items():
        weight = toy.get_submodule(name).weight.detach().numpy()
        assert (np.abs(layer.digits * layer.scales[:, None] - weight) <= 0.51 * layer.scales[:, None]).all()
    low, high = (max(abs(float(end(batch[0]))) for batch in BATCHES) for end in (torch.min, torch.max))
    ends = layers["embed"].inputs
    assert -1.02 * low <= ends.low <= 0 <= ends.high <= 1.02 * high
    plain = toy(*BATCHES[0])[0].detach()
    assert 0 < float((wanted - plain).norm() / plain.norm()) < 0.05


@needs_it
@pytest.mark.slow
def test_the_pass_leaves_files_that_answer_as_the_program_does(model: mm.CompressedModel, tmp_path: Path) -> None:
    context = Context(task=TASK, train=as_examples(tiny.dataset(24)), workdir=tmp_path)
    step = mm.passes.Quantize(scheme="int8-static", backend="neural-compressor", samples=16, exclude=["fc2"], reduce_range=False)
    new = step.apply(model, context=context)
    for found in new.history[-1]["result"]["components"].values():
        assert found["placement"] == "static"
        assert all("fc2" in name for name in found["left_float"])
    new = mm.passes.Quantize(scheme="int8-static", backend="neural-compressor", samples=16, reduce_range=False).apply(
        model, context=Context(task=TASK, train=as_examples(tiny.dataset(24)), workdir=tmp_path / "all")
    )
    assert all(not found["left_float"] for found in new.history[-1]["result"]["components"].values())
