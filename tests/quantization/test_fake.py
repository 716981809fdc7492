"""Fake quantization against numbers worked by hand and against numpy, and its export against itself."""

import copy
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from torch import nn

from mmcompress.quantization.fake import (
    FakeQuantLinear,
    FakeQuantPatches,
    export_qdq,
    exporting,
    insert_fake_quant,
    remove_fake_quant,
    set_fake_quant,
    set_observing,
)

from .conftest import Component, image_inputs, text_inputs


def layer_with(weight: list[list[float]], low: float, high: float, bias: list[float] | None = None) -> FakeQuantLinear:
    linear = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    linear.weight.data = torch.tensor(weight)
    if bias is not None:
        linear.bias.data = torch.tensor(bias)
    layer = FakeQuantLinear(linear)
    layer(torch.tensor([low, high]).repeat(linear.in_features)[: linear.in_features].reshape(1, -1))
    layer.observing = False
    return layer


def test_forward_by_hand():
    """Range -1 to 1.55: scale 0.01, zero point 100. Weight scales 1.27 / 127 = 0.01 and 2.54 / 127 = 0.02."""
    layer = layer_with([[1.27, 0.504], [-2.54, 0.031]], -1.0, 1.55, bias=[0.5, 0.0])
    scale, zero_point = layer.activation_parameters()
    assert scale.item() == pytest.approx(0.01)
    assert zero_point.item() == 100
    torch.testing.assert_close(layer.weight_scale(), torch.tensor([0.01, 0.02]))
    # 0.123 -> 0.12; 9 is beyond the range -> 1.55; 0.504 -> 0.50; 0.031 -> 0.04
    expected = [0.12 * 1.27 + 1.55 * 0.5 + 0.5, 0.12 * -2.54 + 1.55 * 0.04]
    torch.testing.assert_close(layer(torch.tensor([[0.123, 9.0]])), torch.tensor([expected]))


def test_forward_against_numpy():
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(7, 5)
    layer = FakeQuantLinear(linear)
    x = torch.randn(3, 4, 7, generator=generator)
    layer(x)
    layer.observing = False
    y = 1.5 * torch.randn(3, 4, 7, generator=generator)
    values, weight = y.double().numpy(), linear.weight.detach().double().numpy()
    scale = (x.max() - x.min()).item() / 255
    zero = np.rint(-x.min().item() / scale)
    rounded = (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale
    scales = np.abs(weight).max(axis=1, keepdims=True) / 127
    expected = rounded @ (np.rint(weight / scales) * scales).T + linear.bias.detach().numpy()
    np.testing.assert_allclose(layer(y).detach().numpy(), expected, atol=1e-5)


def test_gradients_pass_inside_of_the_range_and_stop_outside():
    layer = layer_with([[1.27, 0.504], [-2.54, 0.031]], -1.0, 1.55)
    x = torch.tensor([[0.123, 9.0], [-5.0, 0.2]], requires_grad=True)
    layer(x).sum().backward()
    # Inside: the sum over outputs of the rounded weights, as for a plain Linear. Outside: nothing.
    torch.testing.assert_close(x.grad, torch.tensor([[1.27 - 2.54, 0.0], [0.0, 0.5 + 0.04]]))
    # The weight's gradient is the rounded input, for every weight, the largest of a channel too.
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.12 - 1.0, 1.55 + 0.2]]).repeat(2, 1))


def test_range_is_a_moving_average_that_holds_zero_and_can_be_frozen():
    layer = FakeQuantLinear(nn.Linear(2, 1), momentum=0.9)
    layer(torch.tensor([[1.0, 4.0]]))
    assert (layer.minimum.item(), layer.maximum.item()) == (0.0, 4.0)  # the first sets it; 1 is no lower end
    layer(torch.tensor([[-2.0, 14.0]]))
    assert layer.minimum.item() == pytest.approx(-0.2)  # 0.9 * 0 + 0.1 * -2
    assert layer.maximum.item() == pytest.approx(5.0)  # 0.9 * 4 + 0.1 * 14
    set_observing(layer, False)
    layer(torch.tensor([[-100.0, 100.0]]))
    assert layer.maximum.item() == pytest.approx(5.0)


def test_only_negative_inputs_put_the_zero_point_at_the_top():
    layer = layer_with([[1.0, 1.0]], -2.55, -1.0)
    scale, zero_point = layer.activation_parameters()
    assert (scale.item(), zero_point.item()) == (pytest.approx(0.01), 255)


def test_a_layer_without_a_range_says_so():
    layer = FakeQuantLinear(nn.Linear(2, 2))
    set_observing(layer, False)
    with pytest.raises(RuntimeError, match="no range"):
        layer(torch.ones(1, 2))


def test_channels_of_zeros_stay_finite():
    layer = layer_with([[0.0, 0.0], [1.0, 1.0]], -1.0, 1.0)
    outputs = layer(torch.ones(1, 2))
    outputs.sum().backward()
    assert outputs[0, 0].item() == 0
    assert torch.isfinite(layer.weight.grad).all()


def test_insert_and_remove_leave_no_trace(components):
    model = copy.deepcopy(components["vision"].module.model)
    x = image_inputs(3)
    before = model.state_dict()
    parameters = dict(model.named_parameters())
    expected = model.get_image_features(**x).pooler_output
    names = insert_fake_quant(model)
    assert len(names) == 2 * (2 * 6 + 1) + 1
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert model.get_parameter(name) is parameters[name]
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert not torch.equal(model.get_image_features(**x).pooler_output, expected)
    set_fake_quant(model, False)
    assert torch.equal(model.get_image_features(**x).pooler_output, expected)
    remove_fake_quant(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert torch.equal(model.get_image_features(**x).pooler_output, expected)
    assert not any(isinstance(part, FakeQuantLinear) for part in model.modules())


def test_trained_weights_survive_removal_and_ranges_survive_a_checkpoint():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    insert_fake_quant(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    insert_fake_quant(other)
    other.load_state_dict(model.state_dict(), assign=True)
    set_observing(nn.ModuleList([model, other]), False)
    x = torch.randn(5, 4)
    assert torch.equal(model(x), other(x))
    trained = model[0].weight.detach().clone()
    for each in (model, other):
        remove_fake_quant(each)
        assert type(each[0]) is nn.Linear
        assert torch.equal(each[0].weight, trained)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    insert_fake_quant(model)
    x, target = torch.randn(64, 8), torch.randn(64, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_exclude_and_shared_layers():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "head": nn.Linear(4, 2)})
    assert insert_fake_quant(model, exclude=["head"]) == ["a", "b"]
    assert model["a"] is model["b"]
    assert type(model["head"]) is nn.Linear
    remove_fake_quant(model)
    assert model["a"] is model["b"] is shared


def test_attention_modules_that_read_weights_directly_stay_whole():
    model = nn.ModuleDict({"pool": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)})
    assert insert_fake_quant(model) == ["head"]


@pytest.mark.parametrize(
    ("module", "exclude", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), ["fc9"], "no layer to be rounded is called fc9"),
        (nn.Sequential(nn.Linear(2, 2)), ["0"], "no Linear layer to fake-quantize"),
        (nn.Linear(2, 2), [], "no Linear layer to fake-quantize"),
    ],
)
def test_wrong_insertions_are_refused(module, exclude, message):
    with pytest.raises(ValueError, match=message):
        insert_fake_quant(module, exclude=exclude)


def test_momentum_out_of_range_is_refused():
    with pytest.raises(ValueError, match="momentum"):
        FakeQuantLinear(nn.Linear(2, 2), momentum=1.0)


def test_export_needs_layers_and_ranges():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no fake-quantized layers"), exporting(model):
        pass
    insert_fake_quant(model)
    with pytest.raises(RuntimeError, match="no range"), exporting(model):
        pass
    model(torch.ones(1, 2))  # and it is as usable as before


@pytest.mark.parametrize("name", ["vision", "text"])
def test_qdq_file_answers_as_the_fake_quantized_model(fresh, tmp_path, name):
    component = fresh[name]
    inputs = {
        "vision": [image_inputs(batch) for batch in (4, 1, 5)],
        "text": [text_inputs(*size) for size in ((4, 8), (1, 5), (5, 12))],
    }[name]
    module = component.module
    keys = list(module.state_dict())
    tower = getattr(module.model, f"{name}_model")
    insert_fake_quant(tower)
    others = ["visual_projection", "patch_embedding"] if name == "text" else ["text_projection"]
    others.append("encoder")
    insert_fake_quant(module.model, exclude=others)
    with torch.no_grad():
        module(*inputs[0].values())
    set_observing(module, False)
    observed = list(module.state_dict())
    path = tmp_path / "qdq.onnx"
    export_qdq(component, component.examples, path, tables=False)
    assert list(module.state_dict()) == observed
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = ort.InferenceSession(path, options)
    for each in inputs:
        with torch.no_grad():
            expected = module(*each.values())[0]
        found = torch.tensor(session.run(None, {key: value.numpy() for key, value in each.items()})[0])
        # Not exact: where a float differs in its last place, a number may round to the next level.
        assert torch.cosine_similarity(found, expected).min() > 0.9999
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-3 * expected.abs().max().item())
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    patches = [(192, 64)] if name == "vision" else []  # a product of integers as well, and no convolution
    assert counts["MatMulIntegerToFloat"] + counts["QGemm"] == 13 + len(patches)
    assert "Conv" not in counts
    weights = [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == TensorProto.INT8]
    assert sorted(tuple(w.dims) for w in weights if len(w.dims) == 2) == sorted(
        [(64, 32)] + 8 * [(64, 64)] + 2 * [(64, 128)] + 2 * [(128, 64)] + patches
    )
    remove_fake_quant(module)
    assert list(module.state_dict()) == keys


def test_tables_of_the_qdq_file_are_int8_too(fresh, exported, tmp_path):
    component = fresh["text"]
    insert_fake_quant(component.module, exclude=["visual_projection", "vision_model"])
    with torch.no_grad():
        component.module(*component.examples.values())
    path = tmp_path / "qdq.onnx"
    export_qdq(component, component.examples, path)
    assert path.stat().st_size < 0.45 * exported["text"].stat().st_size
    session = ort.InferenceSession(path)
    set_observing(component.module, False)
    inputs = text_inputs(3, 10)
    with torch.no_grad():
        expected = component.module(*inputs.values())[0]
    found = torch.tensor(session.run(None, {key: value.numpy() for key, value in inputs.items()})[0])
    assert torch.cosine_similarity(found, expected).min() > 0.999


class Tied(nn.Module):
    """Looks rows of a table up, changes them a little, and multiplies them by the table, or by another one."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.middle, self.proj_out = nn.Embedding(600, 32), nn.Linear(32, 32), nn.Linear(32, 600, bias=False)
        if tied:
            self.proj_out.weight = self.table.weight

    def forward(self, input_ids):
        rows = self.table(input_ids)
        return self.proj_out(self.middle(rows)), rows


@pytest.mark.parametrize("bits", [7, 8])
def test_a_tied_table_is_stored_once_in_the_qdq_file(tmp_path, bits):
    ids, sizes = torch.arange(0, 600, 5).reshape(4, 30), {}
    for tied in (False, True):
        module = Tied(tied)
        table = module.table.weight.detach().clone()
        insert_fake_quant(module, reduce_range=bits == 7)
        with torch.no_grad():
            module(ids)
            set_observing(module, False)
        axes = {"input_ids": {0: "batch_size", 1: "length"}, "logits": {0: "batch_size", 1: "length"}}
        axes["rows"] = axes["logits"]
        component = Component("decoder", module, ("input_ids",), ("logits", "rows"), axes, {"input_ids": ids})
        path = tmp_path / "qdq.onnx"
        export_qdq(component, component.examples, path)
        sizes[tied] = path.stat().st_size
        logits, rows = (torch.tensor(one) for one in ort.InferenceSession(path).run(None, {"input_ids": ids[:2].numpy()}))
        step = table.abs().amax(1, keepdim=True) / (63 if tied and bits == 7 else 127)
        drift = (rows - table[ids[:2]]).abs() / step[ids[:2]]
        assert 0.4 < drift.max() < 0.51
        module.table.weight.data[ids[:2]] = rows  # what the file looks up
        if not tied:
            with torch.no_grad():
                torch.testing.assert_close(logits, module(ids[:2])[0], rtol=0, atol=0.02)
    assert sizes[False] - sizes[True] > 600 * 32


def test_the_constants_of_the_qdq_file_have_short_names(fresh, tmp_path):
    component = fresh["text"]
    insert_fake_quant(component.module, exclude=["visual_projection", "vision_model"])
    with torch.no_grad():
        component.module(*component.examples.values())
        component.module.model.text_model.encoder.layers[0].self_attn.q_proj(torch.randn(4, 64))  # ranges of its own
    export_qdq(component, component.examples, tmp_path / "qdq.onnx")
    graph = onnx.load(tmp_path / "qdq.onnx").graph
    held = {tensor.name for tensor in graph.initializer}
    assert len(held) == len(graph.initializer)
    rounded = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert all(set(node.input[1:]) <= held for node in rounded)
    named = [node for node in rounded if node.input[1] == f"{node.input[0]}_scale"]
    assert len(rounded) - len(named) == 1  # the first layer's queries and keys round one tensor in two ways
    found = ort.InferenceSession(tmp_path / "qdq.onnx")
    set_observing(component.module, False)
    inputs = text_inputs(3, 10)
    with torch.no_grad():
        expected = component.module(*inputs.values())[0]
    answer = torch.tensor(found.run(None, {key: value.numpy() for key, value in inputs.items()})[0])
    assert torch.cosine_similarity(answer, expected).min() > 0.999


def test_weights_of_seven_bits_are_rounded_to_63_levels_each_way():
    """Scales 0.63 / 63 = 0.01: 0.126 is 12.6 levels, so 0.13; with 8 bits it would be 0.63 / 127 * 25 = 0.124."""
    linear = torch.nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[0.63, 0.126]])
    layer = FakeQuantLinear(linear, reduce_range=True)
    found = layer(torch.eye(2)).flatten()
    torch.testing.assert_close(found, torch.tensor([0.63, 0.13]), rtol=0, atol=3e-3)
    layer.begin_export()
    assert layer.weight_int8.flatten().tolist() == [63, 13]


def test_patches_are_a_convolution_until_they_round():
    convolution = nn.Conv2d(3, 5, kernel_size=(2, 4), stride=(2, 4))
    layer = FakeQuantPatches(convolution)
    pixels = torch.randn(2, 3, 9, 16, generator=torch.Generator().manual_seed(0))  # a row of pixels is left over
    layer.fake_quant = False
    assert torch.equal(layer(pixels), convolution(pixels))

    layer.fake_quant, layer.observing = True, False
    scale, zero = (value.item() for value in layer.activation_parameters())
    rounded = (torch.round(pixels / scale) + zero).clamp(0, 255).sub(zero) * scale
    steps = convolution.weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True) / 127
    weight = torch.round(convolution.weight.detach() / steps) * steps
    wanted = torch.nn.functional.conv2d(rounded, weight, convolution.bias, stride=(2, 4))
    found = layer(pixels)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    found.sum().backward()
    assert convolution.weight.grad is not None
    assert layer.to_plain() is convolution
    for other in (nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 2, 2, padding=1), nn.Conv2d(4, 4, 2, 2, groups=2), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="no embedding of patches"):
            FakeQuantPatches(other)
