"""Projections that a model merges into one are taken apart again, in files that are int8 already.

BLIP's vision tower makes queries, keys and values by one layer of three times the width, folds its output (B, S, N) into
(B, S, P, H, D), and takes out one of the P after the other. That copies every number once more, and runtimes know attention by
three layers. So each part becomes a layer of its own. The integers and scales are the same, and so are the answers.

Shapes: B examples, S tokens, N = P * H * D outputs in P parts of H heads of width D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from mmcompress.quantization.graph_edit import GraphEdit

ALIKE = ("Add", "Mul", "Cast", "QuantizeLinear", "DequantizeLinear")
"""Operators that treat each output channel by itself."""
CHANNELS = {"MatMul": (1,), "MatMulInteger": (1, 3)}
"""Of products, the inputs that have output channels, in their last axis."""
AXIS = 2
"""The one of the folded output that parts lie along."""


@dataclass
class _Chain:
    """What makes the output of a merged layer.

    Attributes:
        width: N.
        nodes: all that is there for this output alone, each after those that it reads.
        wide: for each of them, by name, the inputs that have N channels, or that each part is to have its own of.
        product: name of the one that multiplies.
    """

    width: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    wide: dict[str, list[int]] = field(default_factory=dict)
    product: str = ""


def split_merged(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Takes merged layers apart, in place.

    Returns:
        For the name of each product that was taken apart the names of its parts.
    """
    edit, found = GraphEdit(model), {}
    for reshape in [node for node in edit.nodes if node.op_type == "Reshape"]:
        shape = _shape(edit, reshape)
        takers = _takers(edit, reshape, shape[AXIS]) if shape else None
        chain = _Chain(int(np.prod(shape[AXIS:]))) if takers else None
        if takers and chain and _follow(edit, reshape.input[0], chain) and chain.product:
            found[chain.product] = _take_apart(edit, reshape, shape, takers, chain)
    if found:
        edit.finish()
    return found


def _shape(edit: GraphEdit, reshape: onnx.NodeProto) -> list[int]:
    """(B, S, P, H, D) that a value is folded into, if it is constant; else nothing."""
    if reshape.input[1] not in edit.weights:
        return []
    shape = [int(one) for one in edit.array(reshape.input[1])]
    return shape if len(shape) == 5 and shape[AXIS] > 1 and min(shape[AXIS:]) > 0 else []


def _takers(edit: GraphEdit, reshape: onnx.NodeProto, parts: int) -> Mapping[int, onnx.NodeProto] | None:
    """The node that takes out each part, by the part's place, if nothing else reads what was folded."""
    found: dict[int, onnx.NodeProto] = {}
    readers = edit.readers.get(reshape.output[0], [])
    for node in readers:
        index = edit.weights.get(node.input[1]) if node.op_type == "Gather" else None
        if index is None or index.dims or edit.attribute(node, "axis", 0) != AXIS:
            return None
        found[int(edit.array(index.name)) % parts] = node
    return found if len(found) == len(readers) and not edit.is_output(reshape.output[0]) else None


def _follow(edit: GraphEdit, name: str, chain: _Chain) -> bool:
    """Collects what makes a value of N channels; whether all of it is known and made for this alone."""
    if name in edit.weights:
        dims = edit.weights[name].dims
        return 1 <= len(dims) <= 2 and dims[-1] == chain.width
    node = edit.makers.get(name)
    if node is None or len(edit.readers[name]) != 1 or edit.is_output(name) or not node.name or node.name in chain.wide:
        return False
    if _is_one(edit, name):  # a product's scale: what several read, or is made alike, ONNX Runtime does not take into a kernel
        chain.wide[node.name] = [place for place, one in enumerate(node.input) if one in edit.weights]
        chain.nodes.append(node)
        return True
    if node.op_type in CHANNELS:
        rounded = node.op_type == "MatMulInteger" or edit.maker(node.input[1], "DequantizeLinear") is not None
        if chain.product or not rounded:
            return False
        chain.product = node.name
        wide = [place for place in CHANNELS[node.op_type] if place < len(node.input)]
    elif node.op_type in ALIKE:
        wide = list(range(len(node.input)))
    else:
        return False
    wide = [place for place in wide if not _is_one(edit, node.input[place]) or edit.maker(node.input[place], "Mul") is not None]
    turned = node.op_type == "DequantizeLinear" and len(wide) > 1 and edit.attribute(node, "axis", 1) not in (1, -1)
    if turned or not all(_follow(edit, node.input[place], chain) for place in wide):
        return False
    chain.wide[node.name] = wide
    chain.nodes.append(node)
    return True


def _is_one(edit: GraphEdit, name: str) -> bool:
    """Whether a value is one number for all channels."""
    if name in edit.weights:
        return int(np.prod(edit.weights[name].dims)) == 1
    node = edit.maker(name, "DynamicQuantizeLinear", "Mul")
    return node is not None and (node.op_type != "Mul" or all(_is_one(edit, one) for one in node.input))


def _take_apart(
    edit: GraphEdit, reshape: onnx.NodeProto, shape: list[int], takers: Mapping[int, onnx.NodeProto], chain: _Chain
) -> tuple[str, ...]:
    """Puts a chain for each part in the place of one for all; the names of the products."""
    size = chain.width // shape[AXIS]
    folded = edit.add(f"{reshape.name}.part", np.asarray(shape[:AXIS] + shape[AXIS + 1 :], dtype=np.int64))
    new: list[onnx.NodeProto] = []
    made = {name for node in chain.nodes for name in node.output}

    def part(name: str, place: int) -> str:
        own = f"{name}.part_{place}_of_{shape[AXIS]}"
        if name not in made and own not in edit.weights:
            values = edit.array(name)
            values = np.full(size, values.reshape(())) if values.size == 1 else values[..., place * size : (place + 1) * size]
            edit.add(own, values)
        return own

    for place, taker in sorted(takers.items()):
        for node in chain.nodes:
            own = edit.copy(node)
            own.name, own.output[0] = _name(node, place), part(node.output[0], place)
            for i in chain.wide[node.name]:
                own.input[i] = part(node.input[i], place)
            new.append(own)
        own = edit.copy(reshape)
        own.name, own.output[0] = _name(reshape, place), taker.output[0]
        own.input[:] = [part(reshape.input[0], place), folded]
        new.append(own)
    edit.replace([*chain.nodes, reshape, *takers.values()], new)
    product = next(node for node in chain.nodes if node.name == chain.product)
    return tuple(_name(product, place) for place in sorted(takers))


def _name(node: onnx.NodeProto, place: int) -> str:
    return f"{node.name}_part_{place}"
