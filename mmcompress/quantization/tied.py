"""Embedding tables that are a layer's weight as well (a decoder's, mostly) are stored once.

A float export holds such a table once, but integers for MatMulNBits and for a lookup lie apart, if each is quantized by itself:
then half of a small decoder is there twice. Here lookups read rows of the very digits that MatMulNBits multiplies by, with
standard operators. (GatherBlockQuantized does the same in one, but OpenVINO does not know its form with packed digits; and that
is why digits of 4 bits, two in a byte, are not shared.)

Shapes: V rows of the table, outputs of the layer; D its width, inputs of the layer; J blocks of B inputs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.blocks import Grid, fitting, nearest_grid, packed, replace_weights


def share_tied(
    model: onnx.ModelProto, layers: set[str], block_size: int, patterns: tuple[Sequence[str], Sequence[str]]
) -> tuple[tuple[str, ...], set[str]]:
    """Quantizes tables together with the layers whose weight they are to 8 bits, in place. They are rounded to the nearest.

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
        size = fitting(width, block_size, 8)
        weight = next((name for name in readers if _same(held[table], held[name])), None)
        if weight is None or weight in found or width % size:  # a lookup would have the last block's filling in its rows
            continue
        values = numpy_helper.to_array(held[weight])
        grid = nearest_grid(values, 8, size)
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
    """Has lookups read a weight's digits (V, J, B) and scales (V, J): only the rows that are asked for are converted."""
    numbers, scales = (f"{weight}_{name}" for name in packed(*digits))
    constants = {"zero": np.float32(128), "last": np.array([-1]), "width": np.array([digits[0].shape[0]])}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), f"{numbers}_{k}") for k, v in constants.items())
    zero, last, width = (f"{numbers}_{name}" for name in constants)
    for node in nodes:
        ids, output, stem = node.input[1], node.output[0], node.name
        steps: list[tuple[str, list[str], str, Mapping[str, int]]] = [
            ("Gather", [numbers, ids], "digits", {}),
            ("Cast", [f"{output}_digits"], "cast", {"to": onnx.TensorProto.FLOAT}),
            ("Sub", [f"{output}_cast", zero], "centred", {}),
            ("Gather", [scales, ids], "scales", {}),
            ("Unsqueeze", [f"{output}_scales", last], "spread", {}),
            ("Mul", [f"{output}_centred", f"{output}_spread"], "blocks", {}),
            ("Shape", [ids], "ids_shape", {}),
            ("Concat", [f"{output}_ids_shape", width], "shape", {"axis": 0}),
        ]
        made = [helper.make_node(op, given, [f"{output}_{end}"], f"{stem}_{end}", **more) for op, given, end, more in steps]
        made.append(helper.make_node("Reshape", [f"{output}_blocks", f"{output}_shape"], [output], f"{stem}_rows"))
        position = next(i for i, other in enumerate(model.graph.node) if other.output[0] == output)
        del model.graph.node[position]
        for offset, new in enumerate(made):
            model.graph.node.insert(position + offset, new)
