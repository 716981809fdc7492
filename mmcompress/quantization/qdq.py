"""ONNX Runtime's QDQ quantizer with the weights done at once.

It quantizes a weight with a scale for each output channel in a loop over channels, twice: for an image tower of base size that is
84,000 turns in Python and most of the time. Here the scales of all channels are computed together and given to it, it leaves the
weights in float with a QuantizeLinear behind each, and that is folded here, again all channels together. The files are the same,
byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import get_qmin_qmax_for_qType, load_model_with_shape_infer

from mmcompress.quantization import onnx_graph


def write_qdq(
    prepared: Path,
    target: Path,
    nodes: Sequence[str],
    ranges: Any,
    *,
    per_channel: bool,
    reduce_range: bool,
    activation: QuantType,
    options: Mapping[str, Any],
) -> None:
    """Quantizes nodes of a file that `onnx_graph.prepare` made; weights are int8.

    Args:
        prepared: the file.
        target: where to write.
        nodes: names of those to quantize.
        ranges: ``TensorsData`` of what they read and write.
        per_channel: whether weights have a scale for each output channel.
        reduce_range: whether weights take 7 bits.
        activation: type of activations.
        options: ``extra_options`` of ONNX Runtime's quantizers.
    """
    model = load_model_with_shape_infer(prepared)
    wanted = set(nodes)
    chosen = [node for node in model.graph.node if node.name in wanted]
    given = dict(options)
    scales = _channel_scales(model, chosen, reduce_range) if per_channel else {}
    if scales:
        given |= {"AddQDQPairToWeight": True, "TensorQuantOverrides": scales}
    ops = list(dict.fromkeys(node.op_type for node in chosen))
    quantizer = QDQQuantizer(model, per_channel, reduce_range, QuantType.QInt8, activation, ranges, list(nodes), [], ops, given)
    quantizer.quantize_model()
    if scales:
        _fold(quantizer.model.model)
        quantizer.model.clean_initializers()
    quantizer.model.save_model_to_file(str(target), onnx_graph.is_large(prepared))


def _axis(node: onnx.NodeProto) -> int:
    """The axis of a weight's output channels, as ONNX Runtime's operators have it."""
    transposed = any(a.name == "transB" and helper.get_attribute_value(a) for a in node.attribute)
    return 0 if node.op_type == "Conv" or (node.op_type == "Gemm" and transposed) else 1


def _channel_scales(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], reduce_range: bool) -> dict[str, Any]:
    """Symmetric scales of all channels of all weights, as overrides of the quantizer: ``compute_scale_zp`` for many at once."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    axes: dict[str, set[int]] = {}
    for node in nodes:
        if node.input[1] in weights:
            axes.setdefault(node.input[1], set()).add(_axis(node))
    low, high = get_qmin_qmax_for_qType(QuantType.QInt8.tensor_type, reduce_range, symmetric=True)
    found: dict[str, Any] = {}
    for name, own in axes.items():
        values = numpy_helper.to_array(weights[name])
        if len(own) != 1 or values.ndim < 2 or values.dtype != np.float32 or not values.size:
            continue  # the quantizer's own way
        axis = own.pop()
        others = tuple(i for i in range(values.ndim) if i != axis)
        largest = np.maximum(np.abs(values.min(others)), np.abs(values.max(others))).astype(np.float64)
        scales = (2 * largest) / (np.float64(high) - np.float64(low))
        scales = np.where(scales < np.finfo(np.float32).tiny, 1.0, scales).astype(np.float32)
        found[name] = [{"scale": scale, "zero_point": 0, "axis": axis} for scale in scales]
        found[name][0]["quant_type"] = QuantType.QInt8
    return found


def _fold(model: onnx.ModelProto) -> None:
    """Turns float weights with a QuantizeLinear behind them into integers, in place."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    places = {tensor.name: i for i, tensor in enumerate(graph.initializer)}
    made: dict[int, onnx.TensorProto] = {}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in weights:
            kept.append(node)
            continue
        values, scale, zero = (numpy_helper.to_array(weights[name]) for name in node.input)
        axis = next((int(a.i) for a in node.attribute if a.name == "axis"), 1)
        name = f"{node.input[0]}_quantized"
        places_of = [places[one] for one in node.input[1:]]
        made[max(places_of)] = numpy_helper.from_array(quantized(values, scale, zero, axis), name)
        renamed[node.output[0]] = name
    for node in kept:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend(kept)
    ordered = []
    for i, tensor in enumerate(graph.initializer):
        ordered.append(tensor)
        if i in made:
            ordered.append(made[i])
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in ordered if tensor.name not in renamed]
    del graph.initializer[:]
    graph.initializer.extend(copies)


def quantized(values: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.int8], axis: int) -> NDArray[np.int8]:
    """round(values / scale) + zero in int8, with one scale for all or one for each place along an axis; ties to even."""
    shape = [1] * values.ndim
    if scale.ndim:
        shape[axis] = -1
    found = values / scale.reshape(shape)
    np.rint(found, out=found)
    found += zero.reshape(shape)
    np.clip(found, -128, 127, out=found)
    return found.astype(np.int8)
