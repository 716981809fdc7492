"""Rows that nothing reads are not computed.

A dual encoder's embedding is made of one token: CLIP takes the class token of the last block's output in the vision tower, the
end of the text in the text tower. Behind the last attention every row is computed by itself, so the choice can come before the
output projection and the feed-forward layers instead of after them; all other rows of these layers were computed for nothing.
The numbers are the same.

Shapes: B examples, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, shape_inference

from mmcompress.quantization.graph_edit import GraphEdit

ALONE = ("LayerNormalization", "Sigmoid", "Tanh", "Erf", "Gelu", "Relu", "Clip", "Identity", "Cast")
"""Operators that give each row by itself whatever their other inputs are, as long as those are weights."""
TOGETHER = ("Add", "Mul", "Sub", "Div", "Pow")
"""Operators of two values; both are by row, or one is the same for all rows."""
SPREAD = ("Gather", "Expand", "Constant", "ConstantOfShape", "Unsqueeze", "Where", "Range")
"""What makes values that may be shared by examples, such as embeddings of positions: those are left alone."""


def select_rows_early(model: onnx.ModelProto) -> int:
    """Moves choices of one row for each example up to the last attention, in place.

    Args:
        model: weights may lie outside of it.

    Returns:
        How many layers (products with a weight) now get a row for each example instead of S.
    """
    edit = GraphEdit(model)
    layers = 0
    choices = [node for node in edit.nodes if node.op_type in ("Gather", "GatherND") and _takes_a_row(edit, node)]
    shapes = _shapes(model) if choices else {}
    for choice in choices:
        if _is_rows(shapes, choice.input[0]):
            layers += _move_up(edit, choice, shapes)
    if layers:
        edit.finish()
    return layers


def _shapes(model: onnx.ModelProto) -> Mapping[str, tuple[int, ...]]:
    """What is known of the shapes of values; 0 for a length that is not."""
    inferred = shape_inference.infer_shapes(model)
    return {
        value.name: tuple(int(one.dim_value) for one in value.type.tensor_type.shape.dim)
        for value in inferred.graph.value_info
        if value.type.tensor_type.HasField("shape")
    }


def _is_rows(shapes: Mapping[str, tuple[int, ...]], name: str) -> bool:
    """Whether a value is known to be (B, S, D), and not the same for all examples."""
    shape = shapes.get(name, ())
    return len(shape) == 3 and shape[0] != 1


def _takes_a_row(edit: GraphEdit, node: onnx.NodeProto) -> bool:
    """Whether a node takes (B, D) out of what may be (B, S, D)."""
    if node.input[0] in edit.weights:
        return False
    if node.op_type == "Gather":
        index = edit.weights.get(node.input[1])
        return index is not None and not index.dims and edit.attribute(node, "axis", 0) == 1
    # (B, 2) of the example and the place in it, put together from two columns.
    pairs = edit.maker(node.input[1], "Concat")
    columns = [edit.maker(name, "Unsqueeze") for name in pairs.input] if pairs is not None else []
    return len(columns) == 2 and None not in columns and edit.attribute(node, "batch_dims", 0) == 0


def _by_row(edit: GraphEdit, node: onnx.NodeProto) -> list[int] | None:
    """Which inputs of a node hold rows, if each of its rows is computed from theirs alone."""
    shared = [name in edit.weights and len(edit.weights[name].dims) <= 1 for name in node.input]
    if node.op_type == "MatMul" and node.input[1] in edit.weights and len(edit.weights[node.input[1]].dims) == 2:
        return [0]
    if node.op_type in ALONE and all(shared[1:]):
        return [0] if edit.attribute(node, "axis", -1) == -1 else None
    if node.op_type in TOGETHER:
        rows = [i for i, alike in enumerate(shared) if not alike]
        known = all(node.input[i] not in edit.weights and edit.maker(node.input[i], *SPREAD) is None for i in rows)
        return rows if rows and known and all(node.input[i] in edit.makers for i in rows) else None
    return None


def _move_up(edit: GraphEdit, choice: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Moves one choice in front of everything that only it reads; the number of layers that it passed."""
    region: dict[int, onnx.NodeProto] = {}
    place = next(i for i, node in enumerate(edit.nodes) if node is choice)
    for node in reversed(edit.nodes[:place]):
        readers = [reader for name in node.output for reader in edit.readers.get(name, [])]
        inside = all(id(reader) in region or (reader is choice and reader.input[0] in node.output) for reader in readers)
        rows = _by_row(edit, node) if readers and inside and not edit.is_output(node.output[0]) else None
        if rows and all(_is_rows(shapes, node.input[i]) for i in rows):
            region[id(node)] = node
    layers = sum(1 for node in region.values() if node.op_type == "MatMul")
    if not layers:
        return 0
    made = {name for node in region.values() for name in node.output}
    stem, axis = choice.name, edit.add(f"{choice.name}.token_axis", np.asarray([1], dtype=np.int64))
    new: list[onnx.NodeProto] = []
    chosen: dict[str, str] = {}
    for node in reversed(region.values()):  # in the order of the graph
        own = edit.copy(node)
        for i in _by_row(edit, node) or []:
            name = node.input[i]
            if name not in made and name not in chosen:
                chosen[name] = f"{name}.chosen"
                picked = f"{name}.chosen.flat"
                new.append(helper.make_node(choice.op_type, [name, choice.input[1]], [picked], f"{stem}/{len(chosen)}"))
                new[-1].attribute.extend(choice.attribute)
                # One token is kept as an axis, so that what follows is what it was, for a sequence of one.
                new.append(helper.make_node("Unsqueeze", [picked, axis], [chosen[name]], f"{stem}/{len(chosen)}/Unsqueeze"))
            own.input[i] = chosen.get(name, name)
        new.append(own)
    new.append(helper.make_node("Squeeze", [choice.input[0], axis], [choice.output[0]], f"{stem}/Squeeze"))
    edit.replace([*region.values(), choice], new)
    return layers
