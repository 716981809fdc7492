"""Embedding tables that are a layer's weight as well (a decoder's, mostly) are stored once.

A float export holds such a table once, but integers for a product and for a lookup lie apart, if each is quantized by itself:
then half of a small decoder is there twice. Here lookups read rows of the very digits that MatMulNBits multiplies by, or of the
very integers that an int8 product does, with standard operators. (GatherBlockQuantized does the former in one, but OpenVINO does
not know its form with packed digits.)

Shapes: V rows of the table, outputs of the layer; D its width, inputs of the layer; J blocks of B inputs; I are those of the ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.blocks import Bits, Grid, fitting, packed, replace_weights, rtn
from mmcompress.quantization.graph_edit import GraphEdit


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
    tables = onnx_graph.table_lookups(model, exclude, include, least=0)  # a small one is there twice, too
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
        found[weight], shared[table] = rtn(values, bits, size), weight
    meant = {name for weight in found for name in readers[weight]}
    replace_weights(model, found, meant)
    for table, weight in shared.items():
        _look_up(model, weight, found[weight], tables[table])
    return tuple(shared), meant


def share_integers(model: onnx.ModelProto, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[str, ...]:
    """Has lookups of float tables (V, D) read the int8 weights (D, V) of layers that were rounded from them, in place.

    Weights are those with a scale for each output, a row of the table. What is looked up is off by at most half a scale, as the
    layer's weight is. `Gather(table, ids)` becomes `Cast(Gather(rows, ids)) * Unsqueeze(Gather(scales, ids))`, with the weight's
    integers as rows (V, D); see `share_transposed`.

    Args:
        model: int8 as QDQ, or as ONNX Runtime's dynamic quantizer writes it.
        include: Patterns of module paths whose lookups may change, all where there are none; see `naming.matches`.
        exclude: Patterns of module paths whose lookups stay.

    Returns:
        The names of the tables, which are no longer there.
    """
    tables = onnx_graph.table_lookups(model, tuple(exclude), tuple(include), least=0)
    edit = GraphEdit(model)
    scales = _scales(edit)
    shared = []
    for table, lookups in tables.items():
        weight = next((name for name, scale in scales.items() if _rounded(edit, table, name, scale)), None)
        if weight is None:
            continue
        rows = edit.add(f"{weight}_rows", edit.array(weight).T)
        last = edit.add(f"{weight}_last_axis", np.array([-1]))
        for node in [edit.makers[lookup.output[0]] for lookup in lookups]:
            ids, output, stem = node.input[1], node.output[0], node.name
            row, number, scale, spread = (f"{output}_{name}" for name in ("row", "row_float", "row_scale", "row_scale_spread"))
            made = [
                helper.make_node("Gather", [rows, ids], [row], stem),
                helper.make_node("Cast", [row], [number], f"{stem}_Cast", to=onnx.TensorProto.FLOAT),
                helper.make_node("Gather", [scales[weight], ids], [scale], f"{stem}_scale"),
                helper.make_node("Unsqueeze", [scale, last], [spread], f"{stem}_Unsqueeze"),
                helper.make_node("Mul", [number, spread], [output], f"{stem}_Mul"),
            ]
            edit.replace([node], made)
        shared.append(table)
    if shared:
        edit.finish()
        share_transposed(model)
    return tuple(shared)


def share_transposed(model: onnx.ModelProto) -> None:
    """Stores int8 weights (D, V) that are a looked-up table (V, D) transposed as a Transpose of that, in place.

    Runtimes fold it when they load the file. (Lookups of columns would need no second copy in memory, but are slower: each number
    of a column lies in another line of the cache.)
    """
    edit = GraphEdit(model)
    integers = {name: t for name, t in edit.weights.items() if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2}
    tables = [node.input[0] for node in edit.nodes if node.op_type == "Gather" and node.input[0] in integers]
    turned = []
    for table in dict.fromkeys(tables):
        weight = next((name for name, tensor in integers.items() if name not in tables and _same(integers[table], tensor)), None)
        if weight is not None and not edit.is_output(weight):
            del edit.weights[weight], integers[weight]
            turned.append(helper.make_node("Transpose", [table], [weight], f"{weight}/Transpose", perm=[1, 0]))
    if turned:
        edit.nodes = [*turned, *edit.nodes]
        edit.finish()


def fold_transposed(edit: GraphEdit) -> None:
    """Has weights for what `share_transposed` left, as runtimes do; `edit` is to be finished."""
    turned = [node for node in edit.nodes if node.op_type == "Transpose" and node.input[0] in edit.weights]
    for node in turned:
        edit.add(node.output[0], np.transpose(edit.array(node.input[0]), edit.attribute(node, "perm")))
        edit.replace([node], [])


def _scales(edit: GraphEdit) -> dict[str, str]:
    """Of int8 weights (D, V) with a scale for each column and zero points of 0, the name of the scales (V,)."""
    found: dict[str, str] = {}
    for node in edit.nodes:
        if node.op_type == "DequantizeLinear" and edit.attribute(node, "axis", 1) == 1:
            weight, scale, zero = (*node.input, "")[:3]
        elif node.op_type == "MatMulInteger":  # named so by ONNX Runtime's quantizer; the scale is in the product after it
            weight, zero = node.input[1], (*node.input, "", "")[3]
            scale = weight.removesuffix("_quantized") + "_scale"
        else:
            continue
        held = [edit.weights.get(name) for name in (weight, scale, zero)]
        if held[0] is None or held[1] is None or (zero and held[2] is None):
            continue
        whole = held[0].data_type == onnx.TensorProto.INT8 and len(held[0].dims) == 2
        if whole and list(held[1].dims) == [held[0].dims[1]] and not (zero and edit.array(zero).any()):
            found[weight] = scale
    return found


def _rounded(edit: GraphEdit, table: str, weight: str, scale: str) -> bool:
    """Whether an int8 weight (D, V) is a table (V, D) transposed and rounded to the nearest."""
    if tuple(edit.weights[table].dims) != tuple(reversed(edit.weights[weight].dims)):
        return False
    units = edit.array(scale)[:, None].astype(np.float32)
    return bool((np.abs(edit.array(weight).T * units - edit.array(table)) <= 0.501 * units).all())


def _same(table: onnx.TensorProto, weight: onnx.TensorProto) -> bool:
    """Whether a weight (D, V) is a table (V, D) transposed."""
    if tuple(table.dims) != tuple(reversed(weight.dims)):
        return False
    return bool(np.array_equal(numpy_helper.to_array(table).T, numpy_helper.to_array(weight)))


def _look_up(
    model: onnx.ModelProto, weight: str, digits: tuple[NDArray[np.uint8], Grid], nodes: Sequence[onnx.NodeProto]
) -> None:
    """Has lookups read a weight's digits and scales (V, J): only the rows that are asked for are converted."""
    for node in nodes:
        steps = _Steps(model, node)
        steps.rows(weight, *digits)
        position = next(i for i, other in enumerate(model.graph.node) if other.output[0] == node.output[0])
        del model.graph.node[position]
        for offset, new in enumerate(steps.made):
            model.graph.node.insert(position + offset, new)


class _Steps:
    """The nodes that a lookup becomes.

    Attributes:
        made: so far, in order.
    """

    def __init__(self, model: onnx.ModelProto, node: onnx.NodeProto) -> None:
        self.model, self.ids, self.output, self.stem = model, node.input[1], node.output[0], node.name
        self.made: list[onnx.NodeProto] = []

    def rows(self, weight: str, digits: NDArray[np.uint8], grid: Grid) -> None:
        """(I, D), what the digits stand for."""
        names = {name: f"{weight}_{name}" for name in packed(digits, grid)}
        blocks, size = grid.scales.shape[0], grid.block_size
        if grid.bits == 8:
            numbers = self.float(self.add("Gather", [names["Q8"], self.ids], "digits"), "digits")
            zero = self.constant("zero", np.float32(128))
        else:
            numbers = self.halves(names["Q4"], "digits", [blocks, size])
            zeros = self.halves(names["zero_points"], "zeros", [blocks + blocks % 2])
            if blocks % 2:
                bounds = [
                    self.constant(f"zeros_{end}", np.array([at])) for end, at in (("from", 0), ("to", blocks), ("axis", -1))
                ]
                zeros = self.add("Slice", [zeros, *bounds], "zeros_there")
            zero = self.add("Unsqueeze", [zeros, self.constant("last", np.array([-1]))], "zeros_spread")
        centred = self.add("Sub", [numbers, zero], "centred")
        scales = self.add("Gather", [names["scales"], self.ids], "scales")
        spread = self.add("Unsqueeze", [scales, self.constant("last", np.array([-1]))], "spread")
        self.reshaped(self.add("Mul", [centred, spread], "blocks"), "rows", [len(digits)], self.output)

    def halves(self, packed_: str, name: str, shape: list[int]) -> str:
        """(I, *shape): of every byte of the rows that are looked up first the lower half, then the upper one."""
        both = self.float(self.add("Gather", [packed_, self.ids], f"{name}_bytes"), f"{name}_bytes")
        sixteen = self.constant("sixteen", np.float32(16))
        upper = self.add("Floor", [self.add("Div", [both, sixteen], f"{name}_shifted")], f"{name}_upper")
        lower = self.add("Sub", [both, self.add("Mul", [upper, sixteen], f"{name}_above")], f"{name}_lower")
        last = self.constant("last", np.array([-1]))
        sides = [self.add("Unsqueeze", [half, last], f"{half.removeprefix(self.output + '_')}_half") for half in (lower, upper)]
        return self.reshaped(self.add("Concat", sides, f"{name}_pairs", axis=-1), name, shape)

    def reshaped(self, given: str, name: str, shape: list[int], output: str | None = None) -> str:
        """(I, *shape)."""
        there = self.add("Shape", [self.ids], f"{name}_ids_shape")
        whole = self.add("Concat", [there, self.constant(f"{name}_own_shape", np.array(shape))], f"{name}_shape", axis=0)
        return self.add("Reshape", [given, whole], name, output)

    def float(self, given: str, name: str) -> str:
        """The same in float32."""
        return self.add("Cast", [given], f"{name}_cast", to=onnx.TensorProto.FLOAT)

    def constant(self, name: str, value: Any) -> str:
        """An initializer, once."""
        name = f"{self.output}_{name}"
        if all(tensor.name != name for tensor in self.model.graph.initializer):
            self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op: str, given: list[str], name: str, output: str | None = None, **attributes: int) -> str:
        """A node; returns its output's name."""
        output = output or f"{self.output}_{name}"
        self.made.append(helper.make_node(op, given, [output], f"{self.stem}_{name}", **attributes))
        return output
