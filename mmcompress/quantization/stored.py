"""Constants that are read as floats and stored in int8: kernels of convolutions that stay float, and large tables of positions.

A speech encoder has both: its two convolutions over time have no integer kernel that is worth it, and its positions are added,
not looked up. Each call writes the floats out again, which is little beside what is computed with them.

Shapes: O output channels of a kernel; ... the axes of a table, its last two being R rows and D their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mmcompress.quantization.graph_edit import GraphEdit
from mmcompress.quantization.naming import is_meant, module_path
from mmcompress.quantization.onnx_graph import MIN_TABLE_BYTES

MIN_SHARE = 0.01
"""Added constants below this share of a file's float weights stay float: nothing would be seen of it."""


def store_constants(
    model: onnx.ModelProto, include: Sequence[str] = (), exclude: Sequence[str] = (), *, float_bytes: int, kernels: bool = True
) -> tuple[str, ...]:
    """Stores float kernels (O, ...) with one scale an output channel and added tables with one a row, in place.

    They are rounded to the nearest, with scale = max|row| / 127: an error of at most 1/254 of a row's largest number.

    Args:
        model: Changed in place.
        include: Patterns of module paths to store so, all where there are none; see `naming.matches`.
        exclude: Patterns of module paths to leave float.
        float_bytes: Size of the float file.
        kernels: Whether to store kernels of convolutions so.

    Returns:
        The names of the constants.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    axes: dict[str, int | None] = {}
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        meant = is_meant(module_path(node.name), include, exclude) and (kernels or node.op_type != "Conv")
        for place, name in enumerate(node.input):
            if name in weights:
                axis = _axis(node, place, weights[name], float_bytes) if meant else None
                axes[name] = axis if axes.get(name, axis) == axis else None
    found = {name: axis for name, axis in axes.items() if axis is not None and name not in outputs}
    added = [_replace(model, weights[name], axis) for name, axis in found.items()]
    for node in reversed(added):
        model.graph.node.insert(0, node)
    return tuple(found)


def fold_lookups(model: onnx.ModelProto) -> int:
    """Puts rows that are always the same ones in the place of their lookup, in place; returns how many lookups that were.

    A speech encoder looks all of its positions up, in order: its table can then be stored like any other that is added.
    """
    edit = GraphEdit(model)
    fixed = [
        node
        for node in edit.nodes
        if node.op_type == "Gather" and all(name in edit.weights for name in node.input) and not edit.is_output(node.output[0])
    ]
    for node in fixed:
        table, ids = (edit.array(name) for name in node.input)
        edit.add(node.output[0], np.take(table, ids, axis=edit.attribute(node, "axis", 0)))
        edit.replace([node], [])
    if fixed:
        edit.finish()
    return len(fixed)


def _axis(node: onnx.NodeProto, place: int, tensor: onnx.TensorProto, float_bytes: int) -> int | None:
    """The axis of a constant's scales, or None where it stays as it is."""
    size = 4 * int(np.prod(tensor.dims))
    if tensor.data_type != onnx.TensorProto.FLOAT or size < MIN_TABLE_BYTES:
        return None
    if node.op_type == "Conv" and place == 1:
        return 0
    if node.op_type == "Add" and len(tensor.dims) > 1 and size >= MIN_SHARE * float_bytes:
        return _rows(tuple(tensor.dims))
    return None


def _rows(shape: tuple[int, ...]) -> int | None:
    """The axis of rows (R, D), where all axes before it are of length 1."""
    return len(shape) - 2 if all(length == 1 for length in shape[:-2]) and shape[-2] > 1 else None


def _replace(model: onnx.ModelProto, tensor: onnx.TensorProto, axis: int) -> onnx.NodeProto:
    """Puts integers and scales in the place of floats; the node that makes floats of them, under the constant's name."""
    values: NDArray[np.float32] = numpy_helper.to_array(tensor)
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values).max(axis=others, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    rounded = np.clip(np.rint(values / scales), -127, 127).astype(np.int8)
    name = tensor.name
    model.graph.initializer.remove(tensor)
    model.graph.initializer.append(numpy_helper.from_array(rounded, f"{name}_int8"))
    model.graph.initializer.append(numpy_helper.from_array(scales.reshape(-1), f"{name}_scale"))
    return helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [name], f"{name}/DequantizeLinear", axis=axis)
