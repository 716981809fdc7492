"""Embedding tables that are a layer's weight as well (a decoder's, mostly) are stored once.

A float export holds such a table once, but integers for MatMulNBits and for a lookup lie apart, if each is quantized by itself:
then half of a small decoder is there twice. ONNX Runtime's GatherBlockQuantized reads rows of the very digits that MatMulNBits
multiplies by.

Shapes: V rows of the table, outputs of the layer; D its width, inputs of the layer; J blocks.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.blocks import Bits, Grid, fitting, nearest_grid, packed, replace_weights


def share_tied(
    model: onnx.ModelProto, layers: set[str], bits: Bits, block_size: int, patterns: tuple[Sequence[str], Sequence[str]]
) -> tuple[tuple[str, ...], set[str]]:
    """Quantizes tables together with the layers whose weight they are, in place. They are rounded to the nearest.

    Args:
        layers: the names of the MatMul nodes that may be quantized.
        patterns: of module paths to include and to exclude.

    Returns:
        The names of the tables, and of the MatMul nodes that were replaced.
    """
    include, exclude = (tuple(one) for one in patterns)
    tables = onnx_graph.table_lookups(model, exclude, include)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        if node.name in layers:
            readers.setdefault(node.input[1], set()).add(node.name)
    found: dict[str, tuple[NDArray[np.uint8], Grid]] = {}
    shared: dict[str, str] = {}
    for table in tables:
        width = int(held[table].dims[1])
        size = fitting(width, block_size, bits)
        weight = next((name for name in readers if _same(held[table], held[name])), None)
        if weight is None or weight in found or width % size:  # a lookup would have the last block's filling in its rows
            continue
        values = numpy_helper.to_array(held[weight])
        grid = nearest_grid(values, bits, size)
        found[weight], shared[table] = (grid.digits(values), grid), weight
    meant = {name for weight in found for name in readers[weight]}
    replace_weights(model, found, meant)
    for table, weight in shared.items():
        _look_up(model, weight, found[weight], tables[table])
    return tuple(shared), meant


def _same(table: onnx.TensorProto, weight: onnx.TensorProto) -> bool:
    """Whether a weight (D, V) is a table (V, D) transposed."""
    if tuple(table.dims) != tuple(reversed(weight.dims)):
        return False
    return bool(np.array_equal(numpy_helper.to_array(table).T, numpy_helper.to_array(weight)))


def _look_up(
    model: onnx.ModelProto, weight: str, digits: tuple[NDArray[np.uint8], Grid], nodes: Sequence[onnx.NodeProto]
) -> None:
    """Has lookups read the digits of a weight; what MatMulNBits holds as (V, J, bytes) they want as (V, J * bytes)."""
    names = list(packed(*digits))
    rows = f"{weight}_{names[0]}_rows"
    shape = numpy_helper.from_array(np.array([digits[0].shape[1], -1]), f"{rows}_shape")
    model.graph.initializer.append(shape)
    attributes: Mapping[str, int] = {
        "bits": digits[1].bits, "block_size": digits[1].block_size, "gather_axis": 0, "quantize_axis": 1
    }  # fmt: skip
    model.graph.node.insert(0, helper.make_node("Reshape", [f"{weight}_{names[0]}", shape.name], [rows], f"{rows}_Reshape"))
    rest = [f"{weight}_{name}" for name in names[1:]]
    for node in nodes:
        inputs, outputs, name = [rows, node.input[1], *rest], list(node.output), node.name
        node.CopyFrom(helper.make_node("GatherBlockQuantized", inputs, outputs, name, domain="com.microsoft", **attributes))
