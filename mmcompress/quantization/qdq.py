"""ONNX Runtime's QDQ quantizer with the weights done at once, and one of them in memory at a time.

It quantizes a weight with a scale for each output channel in a loop over channels, twice: for an image tower of base size that is
84,000 turns in Python and most of the time. Here the scales of all channels are computed together and given to it, it leaves the
weights in float with a QuantizeLinear behind each, and that is folded here, again all channels together.

As it needs to know no more of such a weight than how many channels there are, it is given a tensor of that many channels without
a number in them. The numbers stay in the file beside the graph until they are rounded. The tensors are those that the quantizer
alone would have made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata, get_qmin_qmax_for_qType

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.onnx_file import write_model


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
    symmetric: Collection[str] = (),
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
        symmetric: activations that are int8 with zero in the middle, whatever the others are.
    """
    model = _inferred(prepared)
    wanted = set(nodes)
    _own_floats(model, wanted)
    chosen = [node for node in model.graph.node if node.name in wanted]
    given, folder = dict(options), prepared.parent
    scales = _channel_scales(model, chosen, reduce_range, folder) if per_channel else {}
    if scales:
        given["AddQDQPairToWeight"] = True
    signed = {name: [{"quant_type": QuantType.QInt8, "symmetric": True}] for name in symmetric}
    given["TensorQuantOverrides"] = scales | signed
    read = {name for node in chosen for name in node.input}
    weights: dict[str, onnx.TensorProto] = {}
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            weights[tensor.name] = _copy(tensor)
            _empty(tensor, scales[tensor.name][0]["axis"])
        elif tensor.name in read:
            _load(tensor, folder)
    ops = list(dict.fromkeys(node.op_type for node in chosen))
    quantizer = QDQQuantizer(model, per_channel, reduce_range, QuantType.QInt8, activation, ranges, list(nodes), [], ops, given)
    quantizer.quantize_model()
    done = quantizer.model
    if scales:
        _fold(done.model, weights, folder)
        done.clean_initializers()
    if onnx_graph.is_large(prepared):
        for tensor in done.model.graph.initializer:
            _load(tensor, folder)
        done.save_model_to_file(str(target), True)
        return
    done.topological_sort()
    write_model(done.model, lambda: (_loaded(tensor, folder) for tensor in done.model.graph.initializer), target)


def _own_floats(model: onnx.ModelProto, wanted: set[str]) -> None:
    """Gives nodes that stay in float a copy of a weight that they share with one that does not, in place.

    The quantizer hands the rounded weight to everything that reads it.
    """
    graph = model.graph
    shared = {node.input[1] for node in graph.node if node.name in wanted}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in shared]:
        others = [node for node in graph.node if node.name not in wanted and tensor.name in node.input]
        if others:
            own = graph.initializer.add()
            own.CopyFrom(tensor)
            own.name = f"{tensor.name}_float"
            for node in others:
                node.input[:] = [own.name if name == tensor.name else name for name in node.input]


def _inferred(prepared: Path) -> onnx.ModelProto:
    """A file with the shapes of its values, its weights where they are."""
    path = prepared.with_name(f"{prepared.stem}-inferred.onnx")
    onnx.shape_inference.infer_shapes_path(str(prepared), str(path))
    model = onnx.load(path, load_external_data=False)
    path.unlink()
    add_infer_metadata(model)  # else the quantizer does the same once more
    return model


def _copy(tensor: onnx.TensorProto) -> onnx.TensorProto:
    found = onnx.TensorProto()
    found.CopyFrom(tensor)
    return found


def _loaded(tensor: onnx.TensorProto, folder: Path) -> onnx.TensorProto:
    """A tensor with its numbers: itself, or a copy where they lie in a file of the folder."""
    if not uses_external_data(tensor):
        return tensor
    found = _copy(tensor)
    _load(found, folder)
    return found


def _load(tensor: onnx.TensorProto, folder: Path) -> None:
    """Reads a tensor's numbers into it, if they lie in a file of the folder."""
    if uses_external_data(tensor):
        load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _empty(tensor: onnx.TensorProto, axis: int) -> None:
    """Leaves a tensor as many places along an axis as it has, and no numbers."""
    count = tensor.dims[axis]
    for place in range(len(tensor.dims)):
        tensor.dims[place] = count if place == axis else 0
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = b""


def _axis(node: onnx.NodeProto) -> int:
    """The axis of a weight's output channels, as ONNX Runtime's operators have it."""
    transposed = any(a.name == "transB" and helper.get_attribute_value(a) for a in node.attribute)
    return 0 if node.op_type == "Conv" or (node.op_type == "Gemm" and transposed) else 1


def _channel_scales(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], reduce_range: bool, folder: Path) -> dict[str, Any]:
    """Symmetric scales of all channels of all weights, as overrides of the quantizer."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    axes: dict[str, set[int]] = {}
    for node in nodes:
        if node.input[1] in weights:
            axes.setdefault(node.input[1], set()).add(_axis(node))
    found: dict[str, Any] = {}
    for name, own in axes.items():
        shape, kind = weights[name].dims, weights[name].data_type
        if len(own) != 1 or len(shape) < 2 or kind != onnx.TensorProto.FLOAT or 0 in shape:
            continue  # the quantizer's own way
        values = numpy_helper.to_array(_loaded(weights[name], folder))
        axis = own.pop()
        scales = channel_scales(values, axis, reduce_range)
        found[name] = [{"scale": scale, "zero_point": 0, "axis": axis} for scale in scales]
        found[name][0]["quant_type"] = QuantType.QInt8
    return found


def channel_scales(values: NDArray[np.float32], axis: int, reduce_range: bool) -> NDArray[np.float32]:
    """The symmetric int8 scale of each place along an axis of a weight: its largest number is 127 of it, or 64 in 7 bits."""
    low, high = get_qmin_qmax_for_qType(QuantType.QInt8.tensor_type, reduce_range, symmetric=True)
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.maximum(np.abs(values.min(others)), np.abs(values.max(others))).astype(np.float64)
    scales = (2 * largest) / (np.float64(high) - np.float64(low))
    return np.where(scales < np.finfo(np.float32).tiny, 1.0, scales).astype(np.float32)


def _fold(model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto], folder: Path) -> None:
    """Turns float weights with a QuantizeLinear behind them into integers, in place.

    Args:
        weights: by name, those whose numbers the model does not hold.
        folder: where the file lies that does.
    """
    graph = model.graph
    known = {tensor.name: tensor for tensor in graph.initializer}
    places = {tensor.name: i for i, tensor in enumerate(graph.initializer)}
    made: dict[int, onnx.TensorProto] = {}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in known:
            kept.append(node)
            continue
        weight = weights.get(node.input[0], known[node.input[0]])
        values = numpy_helper.to_array(_loaded(weight, folder))
        scale, zero = (numpy_helper.to_array(known[name]) for name in node.input[1:])
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
