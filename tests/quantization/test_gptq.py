"""GPTQ and AWQ: a case by hand, dense references, what is written, and that both beat rounding to the nearest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmcompress.quantization import awq, blocks
from mmcompress.quantization.blocks import Grid, fitting, nearest_grid, packed, replace_weights, rtn
from mmcompress.quantization.gptq import DAMPING, gptq
from mmcompress.quantization.moments import Moments, stream
from mmcompress.quantization.weight_only import quantize_weights

from .conftest import image_inputs, text_inputs

RNG = np.random.default_rng(0)


def test_an_error_is_made_up_for_by_the_input_that_comes_with_it():
    """By hand. Two inputs are nearly the same, so that the sum of their weights is what counts; the third spans the grid 0 to 15.

    To the nearest, 0.4 and 0.4 become 0 and 0. GPTQ rounds one to 0, which leaves nearly 0.8 to the other, and that becomes 1:
    the sum of 0.8 is missed by 0.2 instead of 0.8.
    """
    weight = np.array([[0.4], [0.4], [15.0]], dtype=np.float32)
    x = RNG.standard_normal((1000, 3))
    x[:, 1] = x[:, 0] + 0.05 * x[:, 1]
    digits, grid = gptq(weight, (x.T @ x).astype(np.float32), 4, 32)
    np.testing.assert_array_equal(grid.scales, [[1]])
    np.testing.assert_array_equal(grid.zeros, [[0]])
    assert sorted(digits[:2, 0]) == [0, 1]
    assert digits[2, 0] == 15
    np.testing.assert_array_equal(grid.digits(weight)[:, 0], [0, 0, 15])


def naive(weight: np.ndarray, moments: np.ndarray, grid: Grid) -> np.ndarray:
    """Optimal brain quantization in a fixed order, from its definition: the free weights that remain are solved for each time.

    With the first weights fixed at what they were rounded to, the best others minimise the output error: a linear system.
    """
    order = np.argsort(-np.diag(moments), kind="stable")
    damped = moments + DAMPING * np.diag(moments).mean() * np.eye(len(moments))
    current, seen = weight.astype(np.float64), np.zeros(weight.shape)
    for position, k in enumerate(order):
        scales, zeros = grid.row(k)
        seen[k] = np.clip(np.rint(current[k] / scales) + zeros, 0, 2**grid.bits - 1)
        rest, fixed = order[position + 1 :], order[: position + 1]
        error = (seen[fixed] - np.stack([grid.row(i)[1] for i in fixed])) * np.stack([grid.row(i)[0] for i in fixed])
        gone = weight[fixed] - error
        if len(rest):
            current[rest] = weight[rest] + np.linalg.solve(damped[np.ix_(rest, rest)], damped[np.ix_(rest, fixed)] @ gone)
    return seen


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, 32), (4, 64)])
def test_gptq_is_optimal_brain_quantization(bits, size):
    """A hundred and fifty inputs are more than one lazy block, and no multiple of a block."""
    weight = RNG.standard_normal((150, 7)).astype(np.float32)
    x = RNG.standard_normal((400, 150)) @ (np.eye(150) + 0.2 * RNG.standard_normal((150, 150)))
    moments = x.T @ x
    digits, grid = gptq(weight, moments, bits, size)
    wanted = naive(weight, moments, grid)
    assert (digits == wanted).mean() > 0.995  # ties of the last bit apart
    nearest = grid.values(grid.digits(weight))

    def cost(values: np.ndarray) -> float:
        return float(np.linalg.norm(x @ (values - weight)))

    assert cost(grid.values(digits)) < 0.8 * cost(nearest)
    assert cost(grid.values(digits)) == pytest.approx(cost(grid.values(wanted.astype(np.uint8))), rel=0.02)


def test_inputs_that_are_always_zero_are_rounded_to_the_nearest():
    weight = RNG.standard_normal((40, 3)).astype(np.float32)
    x = RNG.standard_normal((50, 40))
    x[:, 5] = 0
    digits, grid = gptq(weight, x.T @ x, 4, 32)
    np.testing.assert_array_equal(digits[5], grid.digits(weight)[5])
    digits, grid = gptq(weight, np.zeros((40, 40)), 8, 32)
    np.testing.assert_array_equal(digits, grid.digits(weight))


def layer(weights: dict[str, np.ndarray], norm: bool) -> onnx.ModelProto:
    """x, a LayerNorm if asked for, and a MatMul for each weight."""
    inputs = next(iter(weights.values())).shape[0]
    nodes = [helper.make_node("MatMul", ["h", name], [f"y{name}"], f"{name}/MatMul") for name in weights]
    held = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    if norm:
        nodes.insert(0, helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["h"], "norm/LayerNormalization"))
        held += [numpy_helper.from_array(np.full(inputs, v, np.float32), n) for n, v in (("gamma", 1.5), ("beta", 0.2))]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x" if norm else "h", TensorProto.FLOAT, ["n", "s", inputs])],
        [helper.make_tensor_value_info(f"y{n}", TensorProto.FLOAT, ["n", "s", v.shape[1]]) for n, v in weights.items()],
        held,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto | Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model if isinstance(model, Path) else model.SerializeToString(), options).run(None, inputs)


@pytest.mark.parametrize(("bits", "inputs", "size"), [(4, 96, 32), (4, 70, 32), (8, 96, 64), (8, 50, 32)])
def test_digits_are_written_as_onnx_runtime_reads_them(bits, inputs, size):
    weight = RNG.standard_normal((inputs, 5)).astype(np.float32)
    model, grid = layer({"w": weight}, norm=False), nearest_grid(weight, bits, size)
    replace_weights(model, {"w": (grid.digits(weight), grid)}, {"w/MatMul"})
    for node in model.graph.node:  # float products, to compare closely
        next(a for a in node.attribute if a.name == "accuracy_level").i = 0
    x = RNG.standard_normal((2, 3, inputs)).astype(np.float32)
    found = run(model, {"h": x})[0]
    np.testing.assert_allclose(found, x @ grid.values(grid.digits(weight)).astype(np.float32), atol=1e-4)
    assert np.abs(found - x @ weight).max() > 1e-3
    assert {k: v.dtype for k, v in packed(grid.digits(weight), grid).items()}["scales"] == np.float32


@pytest.mark.parametrize("bits", [8, 4])
def test_large_weights_are_rounded_a_few_outputs_at_a_time_to_the_same(monkeypatch, bits):
    weight = np.random.default_rng(0).normal(size=(40, 13)).astype(np.float32)
    at_once, grid = rtn(weight, bits, 32)
    monkeypatch.setattr(blocks, "AT_ONCE", 100)  # two outputs of 40 inputs
    in_parts, other = rtn(weight, bits, 32)
    np.testing.assert_array_equal(in_parts, at_once)
    np.testing.assert_array_equal(other.scales, grid.scales)
    np.testing.assert_array_equal(other.zeros, grid.zeros)


def test_layers_take_the_block_size_that_takes_less_space():
    assert fitting(192, 128, 4) == 64
    assert fitting(256, 128, 4) == 128
    assert fitting(150, 64, 4) == 32
    assert fitting(3072, 32, 4) == 32
    assert fitting(100, 128, 8) == 128  # 128 bytes and 4 of scales; four blocks of 32 are as many and 16


def test_moments_count_real_tokens_and_need_one_tensor_in_memory_only():
    weights = {"w": RNG.standard_normal((6, 4)).astype(np.float32)}
    model = layer(weights, norm=True)
    model.graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["n", "s"]))
    batches = [RNG.standard_normal((b, 5, 6)).astype(np.float32) for b in (3, 2)]
    masks = [np.array([[1, 1, 1, 0, 0]] * len(batch)) for batch in batches]
    reads: list[int] = []

    def feeds():
        reads.append(1)
        return ({"x": x, "attention_mask": m, "other": m} for x, m in zip(batches, masks, strict=True))

    found = dict(stream(model, {"x": 6, "h": 6}, feeds, most_bytes=100))
    assert len(reads) == 2  # one tensor at a time: the data twice
    real = np.concatenate([batch[:, :3].reshape(-1, 6) for batch in batches]).astype(np.float64)
    normed = (real - real.mean(1, keepdims=True)) / np.sqrt(real.var(1, keepdims=True) + 1e-5) * 1.5 + 0.2
    for name, rows in (("x", real), ("h", normed)):
        assert found[name].rows == 15
        np.testing.assert_allclose(found[name].product, rows.T @ rows, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[name].size, np.abs(rows).sum(0), rtol=1e-5)
    assert len(dict(stream(model, {"x": 6, "h": 6}, feeds))) == 2
    assert len(reads) == 3
    with pytest.raises(ValueError, match=r"lacks \['attention_mask'\]; it has \['x'\]"):
        list(stream(model, {"x": 6}, lambda: [{"x": batches[0]}]))
    with pytest.raises(ValueError, match="there is none"):
        list(stream(model, {"x": 6}, list))


def moments_of(x: np.ndarray) -> Moments:
    found = Moments.empty(x.shape[1])
    found.add(x.astype(np.float32))
    return found


def test_awq_protects_the_input_that_is_large():
    """Two inputs in 64 are thirty times as large as the others: their weights are made larger, so that they are finer."""
    weight = RNG.standard_normal((64, 32)).astype(np.float32)
    x = RNG.standard_normal((200, 64)).astype(np.float32)
    x[:, [3, 40]] *= 30
    scales = awq.input_scales([weight[:, :16], weight[:, 16:]], moments_of(x), 4, 32)
    assert scales[[3, 40]].min() > 2 * np.delete(scales, [3, 40]).max()

    def cost(s: np.ndarray) -> float:
        grid = nearest_grid(weight * s[:, None], 4, 32)
        return float(np.linalg.norm((x / s) @ grid.values(grid.digits(weight * s[:, None])) - x @ weight))

    # The reference is the search over all exponents on the data itself, not on its moments.
    size = np.abs(x).mean(0)
    powers = [size**alpha for alpha in awq.ALPHAS]
    costs = [cost(p / np.sqrt(p.max() * p.min())) for p in powers]
    assert cost(scales) == pytest.approx(min(costs), rel=1e-3)
    assert cost(scales) < 0.7 * costs[0]


def test_awq_cuts_a_range_where_that_pays():
    """By hand: the others lie from -2 to 0, so that half of the range holds them, once the input of the -4 is always 0."""
    weight, product = np.linspace(-2, 0, 32, dtype=np.float32)[:, None].copy(), np.eye(32, dtype=np.float32)
    weight[0], product[0, 0] = -4.0, 0
    grid = awq.clipped_grid(weight, product, 4, 32)
    np.testing.assert_allclose(grid.scales, [[2 / 15]], rtol=1e-6)
    np.testing.assert_array_equal(grid.zeros, [[15]])
    product[0, 0] = 1
    np.testing.assert_allclose(awq.clipped_grid(weight, product, 4, 32).scales, [[4 / 15]], rtol=1e-6)


def test_a_layer_norm_takes_scales_up_and_outputs_stay():
    weights = {name: RNG.standard_normal((64, 8)).astype(np.float32) for name in ("q", "k")}
    model = layer(weights, norm=True)
    x = {"x": RNG.standard_normal((2, 3, 64)).astype(np.float32)}
    before, scales = run(model, x), RNG.uniform(0.5, 2, 64).astype(np.float32)
    nodes = list(model.graph.node)[1:]
    assert awq.foldable(model, "h", nodes[:1]) is None  # the other layer would see the scaled output
    assert awq.foldable(model, "x", nodes) is None
    assert awq.fold_into_norm(model, "h", scales, nodes)
    assert not np.array_equal(numpy_helper.to_array(model.graph.initializer[0]), weights["q"])
    for ours, theirs in zip(run(model, x), before, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
@pytest.mark.parametrize(("name", "make"), [("vision", image_inputs), ("text", lambda batch: text_inputs(batch, 8))])
def test_files_are_as_small_and_closer(exported, tmp_path, algorithm, name, make):
    feeds = [{key: value.numpy() for key, value in make(batch).items()} for batch in (6, 7)]
    wanted = run(exported[name], feeds[0])[0]
    errors, sizes = {}, {}
    for kind in ("rtn", algorithm):
        target = tmp_path / f"{kind}.onnx"
        result = quantize_weights(exported[name], target, bits=4, algorithm=kind, calibration=lambda: feeds)
        assert result.left_float == ()
        errors[kind], sizes[kind] = np.linalg.norm(run(target, feeds[0])[0] - wanted), result.bytes_after
    assert 0 < errors[algorithm] < 0.95 * errors["rtn"]
    assert sizes[algorithm] == pytest.approx(sizes["rtn"], rel=0.02)


def test_without_data_there_is_no_gptq(exported, tmp_path):
    with pytest.raises(ValueError, match="gptq needs calibration data"):
        quantize_weights(exported["vision"], tmp_path / "x.onnx", bits=4, algorithm="gptq")
