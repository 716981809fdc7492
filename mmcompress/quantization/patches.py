"""Patch embeddings as matrix products.

A convolution whose kernel is as large as its stride reads every pixel once. So it is a product of the patches, laid out as rows,
with the kernels, laid out as columns; integer products and block-wise weights have kernels for that, convolutions have few.

Shapes: B pictures, C colours, H x W pixels, P x Q the kernel, N patches, D channels out.
"""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


def patches_as_products(model: onnx.ModelProto, folder: Path) -> tuple[str, ...]:
    """Turns convolutions over patches into MatMul nodes, in place.

    Only those of two dimensions without padding, dilation and groups, over a picture of known size that patches fill.

    Args:
        model: Changed in place.
        folder: Where weights lie that are not in the model itself.

    Returns:
        Names of the MatMul nodes made: those of the convolutions with ``MatMul`` for ``Conv``.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    sizes = {value.name: _picture(value) for value in model.graph.input}
    made = []
    for node in list(model.graph.node):
        size = sizes.get(node.input[0]) if node.op_type == "Conv" else None
        if size is None or node.input[1] not in weights or not _is_patches(node, list(weights[node.input[1]].dims), size):
            continue
        kernels = numpy_helper.to_array(weights[node.input[1]], str(folder))
        made.append(_replace(model, node, kernels, size))
    return tuple(made)


def _picture(value: onnx.ValueInfoProto) -> tuple[int, int, int] | None:
    """C, H and W of a graph's input, or None where it is no picture or they are open."""
    dims = value.type.tensor_type.shape.dim
    if len(dims) != 4 or not all(axis.dim_value for axis in dims[1:]):
        return None
    return dims[1].dim_value, dims[2].dim_value, dims[3].dim_value


def _is_patches(node: onnx.NodeProto, kernel: list[int], size: tuple[int, int, int]) -> bool:
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if len(kernel) != 4 or found.get("group", 1) != 1 or any(found.get("pads", ())):
        return False
    if found.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or any(d != 1 for d in found.get("dilations", ())):
        return False
    square = list(found.get("strides", (1, 1))) == kernel[2:]
    return square and size[0] == kernel[1] and not any(a % b for a, b in zip(size[1:], kernel[2:], strict=True))


def _replace(model: onnx.ModelProto, node: onnx.NodeProto, kernels: NDArray[np.float32], size: tuple[int, int, int]) -> str:
    """(B, C, H, W) is cut into rows (B, N, C * P * Q), multiplied, and turned back into (B, D, H / P, W / Q)."""
    graph, stem = model.graph, node.name.removesuffix("/Conv")
    name, (width, colours, high, wide) = node.input[1], kernels.shape
    rows, columns = size[1] // high, size[2] // wide

    def constant(name: str, values: list[int]) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype=np.int64), f"{node.name}.{name}"))
        return f"{node.name}.{name}"

    def step(kind: str, inputs: list[str], label: str, output: str = "", **attributes: list[int]) -> str:
        output = output or f"{node.name}.{label}.output"
        added.append(helper.make_node(kind, inputs, [output], f"{stem}/{label}", **attributes))
        return output

    added: list[onnx.NodeProto] = []
    weight = np.ascontiguousarray(kernels.reshape(width, -1).T)
    graph.initializer.append(numpy_helper.from_array(weight, f"{name}_columns"))
    cut = step("Reshape", [node.input[0], constant("cut", [0, colours, rows, high, columns, wide])], "Reshape_cut")
    turned = step("Transpose", [cut], "Transpose_cut", perm=[0, 2, 4, 1, 3, 5])
    flat = step("Reshape", [turned, constant("flat", [0, rows * columns, colours * high * wide])], "Reshape_flat")
    product = step("MatMul", [flat, f"{name}_columns"], "MatMul")
    if len(node.input) > 2:
        product = step("Add", [product, node.input[2]], "Add_bias")
    back = step("Transpose", [product], "Transpose_back", perm=[0, 2, 1])
    step("Reshape", [back, constant("back", [0, 0, rows, columns])], "Reshape_back", node.output[0])
    position = next(i for i, other in enumerate(graph.node) if other.name == node.name)
    graph.node.remove(node)
    for offset, new in enumerate(added):
        graph.node.insert(position + offset, new)
    if not any(name in other.input for other in graph.node):
        graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == name))
    return f"{stem}/MatMul"
