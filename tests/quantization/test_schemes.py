"""Weight-only and half precision files: size, closeness, names; which scheme a component gets; patch embeddings as products."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.half import to_bfloat16, to_float16
from mmcompress.quantization.naming import broken, is_meant, matches
from mmcompress.quantization.patches import patches_as_products
from mmcompress.quantization.schemes import SUFFIXES, scheme_of
from mmcompress.quantization.weight_only import quantize_weights
from mmcompress.runtimes.precision import PRECISIONS, precision_of, split

from .conftest import image_inputs, text_inputs

MAKE = {"vision": image_inputs, "text": lambda batch: text_inputs(batch, 8)}


def run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options).run(None, inputs)[0]


def lowest_cosine(left: np.ndarray, right: np.ndarray) -> float:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / norms).min())


@pytest.mark.parametrize("name", ["vision", "text"])
@pytest.mark.parametrize(("bits", "least"), [(8, 0.999), (4, 0.97)])
def test_weights_in_blocks_are_small_and_close(exported, tmp_path, name, bits, least):
    target = tmp_path / "small.onnx"
    result = quantize_weights(exported[name], target, bits=bits)
    for batch in (1, 3):
        inputs = {key: value.numpy() for key, value in MAKE[name](batch).items()}
        assert least < lowest_cosine(run(target, inputs), run(exported[name], inputs)) < 1
    # 2 layers of q, k, v, out, fc1, fc2, and the projection; the vision tower has its patch embedding too
    assert len(result.quantized) == 13 + (name == "vision")
    assert result.left_float == ()
    kinds = {n.op_type for n in onnx.load(target).graph.node}
    assert "MatMulNBits" in kinds
    assert ("GatherBlockQuantized" in kinds) == (name == "text" and bits == 4)


def test_four_bits_are_rounded_to_the_cut_range_that_costs_least(tmp_path):
    """One layer by hand: blocks of 32 weights have 15 steps from the smallest to the largest, or 0, or over a part of that.

    The part is half to all of it in twentieths, the one of least squared error.
    """
    weight = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "layer/MatMul")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 48])],
        [numpy_helper.from_array(weight, "w")],
    )
    source = tmp_path / "one.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), source)
    quantize_weights(source, tmp_path / "q4.onnx", bits=4, block_size=32)
    model = onnx.load(tmp_path / "q4.onnx")
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    packed, scales, zeros = (held[name] for name in node.input[1:4])
    digits = np.stack([packed & 15, packed >> 4], axis=-1).reshape(48, 2, 32).astype(np.float32)
    zero = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(48, -1)[:, :2].astype(np.float32)
    seen = ((digits - zero[..., None]) * scales.reshape(48, 2, 1)).reshape(48, 64).T
    cut = 0
    for block in range(2):
        for output in range(48):
            values = weight[32 * block : 32 * block + 32, output]
            low, high = min(values.min(), 0), max(values.max(), 0)
            costs = {}
            for share in np.arange(50, 101, 5) / 100:
                step = share * (high - low) / 15
                origin = np.rint(-share * low / step)
                integers = np.clip(np.rint(values / step) + origin, 0, 15)
                costs[share] = float((((integers - origin) * step - values) ** 2).sum())
            found = float(((seen[32 * block : 32 * block + 32, output] - values) ** 2).sum())
            assert found == pytest.approx(min(costs.values()), rel=1e-3)
            cut += found < 0.99 * costs[1.0]
    assert cut > 48


@pytest.mark.parametrize("name", ["vision", "text"])
def test_half_precision_halves_the_file(exported, tmp_path, name):
    inputs = {key: value.numpy() for key, value in MAKE[name](3).items()}
    plain = run(exported[name], inputs)
    for convert, least in ((to_float16, 0.99999), (to_bfloat16, 0.9995)):
        target = tmp_path / f"{convert.__name__}.onnx"
        result = convert(exported[name], target)
        found = run(target, inputs)
        assert found.dtype == np.float32
        assert least < lowest_cosine(found, plain)
        assert not np.array_equal(found, plain)
        held = {t.name: t for t in onnx.load(exported[name]).graph.initializer}
        weights = sum(4 * int(np.prod(t.dims)) for t in held.values() if t.data_type == TensorProto.FLOAT and len(t.dims) > 1)
        assert result.bytes_before - result.bytes_after > 0.4 * weights


def test_layer_norm_and_softmax_stay_float32_in_float16(exported, tmp_path):
    to_float16(exported["vision"], tmp_path / "h.onnx", exclude=["visual_projection"])
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "h.onnx"))
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output, *model.graph.input)}
    kinds |= {t.name: t.data_type for t in model.graph.initializer}
    seen = {(n.op_type, kinds[n.input[0]]) for n in model.graph.node if n.input and n.input[0] in kinds}
    assert ("MatMul", TensorProto.FLOAT16) in seen
    assert all(kind == TensorProto.FLOAT for op, kind in seen if op in ("LayerNormalization", "Softmax", "Gemm"))
    assert {op for op, _ in seen} >= {"LayerNormalization", "Softmax"}


def test_a_weight_beyond_float16_is_refused(exported, tmp_path):
    model = onnx.load(exported["vision"])
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
    tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims, 1e5, np.float32), tensor.name))
    onnx.save(model, tmp_path / "large.onnx")
    with pytest.raises(ValueError, match=r"holds 1e\+05, and float16 ends at 65504; use bfloat16"):
        to_float16(tmp_path / "large.onnx", tmp_path / "h.onnx")


def conv(tmp_path: Path, kernel: tuple[int, int], stride: tuple[int, int], size: tuple[int, int], pads: list[int]) -> Path:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((5, 3, *kernel)).astype(np.float32)
    bias = rng.standard_normal(5).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], "embed/Conv", strides=list(stride), pads=pads)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, *size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, None, None])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    path = tmp_path / "conv.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_patch_embedding_is_a_product(tmp_path):
    path = conv(tmp_path, (2, 4), (2, 4), (6, 8), [0, 0, 0, 0])
    model = onnx.load(path)
    assert patches_as_products(model, tmp_path) == ("embed/MatMul",)
    onnx.save(model, tmp_path / "product.onnx")
    pixels = {"x": np.random.default_rng(2).standard_normal((3, 3, 6, 8)).astype(np.float32)}
    found, wanted = run(tmp_path / "product.onnx", pixels), run(path, pixels)
    assert found.shape == wanted.shape == (3, 5, 3, 2)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert [n.op_type for n in model.graph.node].count("Conv") == 0


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "pads"),
    [
        ((2, 2), (1, 1), (6, 8), [0, 0, 0, 0]),  # overlapping
        ((2, 2), (2, 2), (6, 7), [0, 0, 0, 0]),  # a column is left over
        ((2, 2), (2, 2), (6, 8), [1, 1, 1, 1]),
    ],
)
def test_other_convolutions_are_left_alone(tmp_path, kernel, stride, size, pads):
    model = onnx.load(conv(tmp_path, kernel, stride, size, pads))
    assert patches_as_products(model, tmp_path) == ()
    assert [n.op_type for n in model.graph.node] == ["Conv"]


def test_patterns_may_be_regular_expressions(exported, tmp_path):
    assert matches("encoder.layers.11.mlp.fc1", r"re:layers\.(1|11)\.")
    assert not matches("encoder.layers.2.mlp.fc1", r"re:layers\.(1|11)\.")
    assert is_meant("a.fc1", ["fc1"], [])
    assert not is_meant("a.fc1", ["fc1"], ["a"])
    assert not is_meant("a.fc2", ["fc1"], [])
    assert broken(["fc1", "re:("]) == ["'re:(' is no regular expression: missing ), unterminated subpattern at position 0"]
    result = quantize_weights(exported["vision"], tmp_path / "v.onnx", bits=4, include=[r"re:mlp\.fc[12]$", "gone"])
    assert len(result.quantized) == 4
    assert len(result.left_float) == 10
    assert result.unmatched_exclude == ("gone",)


def test_components_get_schemes_by_tower_or_name():
    assert scheme_of("int8-static", "vision_model", "vision", False) == ("int8-static", "_quantized")
    assert scheme_of("int8-static", "decoder_model_merged", "decoder", True) == ("int8-weight-only", "_quantized")
    assert scheme_of("float16", "decoder_model_merged", "decoder", True) == ("float16", "_fp16")
    wanted = {"vision": "int8-dynamic", "text_model": "int4-weight-only"}
    assert scheme_of(wanted, "vision_model", "vision", False) == ("int8-dynamic", "_quantized")
    assert scheme_of(wanted, "text_model", "text", False) == ("int4-weight-only", "_q4")
    assert scheme_of(wanted, "other", "decoder", True) == ("float32", "")
    assert set(SUFFIXES.values()) == set(PRECISIONS)


def test_the_report_says_what_the_files_hold():
    assert split("vision_model_q4") == ("vision_model", "_q4")
    assert precision_of([Path("a.onnx")]) == "float32"
    assert precision_of([Path("a_quantized.onnx"), Path("b.onnx")]) == "int8"
    assert precision_of([Path("b_q4.onnx"), Path("a_quantized.onnx")]) == "int8 + int4 weights"


def test_prepare_names_the_products_that_were_convolutions(exported, tmp_path):
    assert onnx_graph.prepare(exported["vision"], tmp_path / "p.onnx") == (
        "model.vision_model.embeddings.patch_embedding/MatMul",
    )


def test_importing_the_quantizer_leaves_logging_alone():
    code = "import logging; import mmcompress.quantization.weight_only; r = logging.getLogger(); print(r.level, len(r.handlers))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["30", "0"]
