"""What the quantizers do to a graph besides quantizing it: preparing, counting, and int8 embedding tables.

Shapes: V rows of an embedding table, D its width.
"""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from mmcompress.quantization.graph_edit import GraphEdit, reads
from mmcompress.quantization.naming import is_meant, module_path
from mmcompress.quantization.onnx_export import EXTERNAL_DATA_LIMIT_BYTES, EXTERNAL_DATA_SUFFIX
from mmcompress.quantization.onnx_file import write_model
from mmcompress.quantization.patches import patches_as_products
from mmcompress.quantization.selected_rows import select_rows_early

PRODUCT_OPS = ("MatMul", "Gemm", "Conv")
LAYOUT = ("Reshape", "Transpose")
"""Operators that only move numbers."""
MOVES = (*LAYOUT, "Identity", "Cast", "Squeeze", "Unsqueeze", "QuantizeLinear", "DequantizeLinear")
"""Operators that leave numbers as they are, but for rounding."""
ZERO_POINTS = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
MIN_TABLE_BYTES = 16_384
"""Smaller tables stay float: three more nodes a call for less than 12 kB of disk."""


def file_bytes(path: Path) -> int:
    """Size of an ONNX file together with the external data beside it, in bytes."""
    return sum(part.stat().st_size for part in (path, *_beside(path)))


def is_large(path: Path) -> bool:
    """Whether a file has to keep its weights outside of the protobuf."""
    return file_bytes(path) > EXTERNAL_DATA_LIMIT_BYTES


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes a model, with external data in `<path>_data` when it is too large for one file."""
    # Not ByteSize(): protobuf refuses to measure what is larger than it can hold.
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EXTERNAL_DATA_LIMIT_BYTES:
        data = f"{path.name}{EXTERNAL_DATA_SUFFIX}"
        # onnx appends to a data file that exists.
        (path.parent / data).unlink(missing_ok=True)
        onnx.save_model(model, path, save_as_external_data=True, location=data)
        return
    write_model(model, lambda: model.graph.initializer, path)


def move(source: Path, target: Path) -> None:
    """Moves a file; weights that lie beside it go with it, and their file is renamed after the new name."""
    if _beside(source):
        save(onnx.load(source), target)
        remove(source)
    else:
        shutil.move(source, target)


def remove(path: Path) -> None:
    """Removes a file, and the weights that lie beside it."""
    if path.exists():
        for data in (*_beside(path), path):
            data.unlink()


def _beside(path: Path) -> list[Path]:
    """The files that hold a model's weights outside of it."""
    model = onnx.load(path, load_external_data=False)
    names = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    return [path.parent / name for name in sorted(names)]


def prepare(source: Path, target: Path, *, patches: bool = True, rows: bool = True) -> tuple[str, ...]:
    """Makes a file that ONNX Runtime's quantizers accept: constants folded, stale shapes dropped, weights in `<target>_data`.

    This is the part of `quant_pre_process` that the quantizers need; the whole of it holds the weights four times. Shapes are
    not inferred: the quantizers do that themselves, and the dynamic one turns Gemm into MatMul with a transposed weight, and
    then trips over the weight's old shape.

    Args:
        source: Float file, as `export_component` writes it.
        target: Where to write.
        patches: Whether convolutions over patches become products of matrices.
        rows: Whether rows that nothing reads are left out.

    Returns:
        The names of the products that were convolutions.
    """
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    # Small constants (shapes, axes) stay in the graph, where shape inference looks for their values.
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{target.name}_data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    model = onnx.load(target, load_external_data=False)
    del model.graph.value_info[:]
    made = patches_as_products(model, target.parent) if patches else ()
    if rows:
        select_rows_early(model)
    # Else the quantizers advise to do what was just done.
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    onnx.save_model(model, target)
    return made


def weight_names(model: onnx.ModelProto) -> set[str]:
    """Names of the initializers."""
    return {tensor.name for tensor in model.graph.initializer}


def weighted_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """MatMul, Gemm and Conv nodes with a constant second operand: layers, as opposed to attention's products."""
    weights = weight_names(model)
    return [node for node in model.graph.node if node.op_type in PRODUCT_OPS and node.input[1] in weights]


def free_products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """MatMul nodes of two activations: attention's products."""
    constants = weight_names(model)
    constants.update([n.output[0] for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in constants])
    dequantized = [n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    constants.update(dequantized)
    return [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] not in constants]


def weighing_products(model: onnx.ModelProto) -> set[str]:
    """Names of the products of two activations of which one is what a softmax gave: attention's with its values."""
    makers = {name: node for node in model.graph.node for name in node.output}

    def softmax(name: str) -> bool:
        node = makers.get(name)
        while node is not None and node.op_type in MOVES:
            node = makers.get(node.input[0])
        return node is not None and node.op_type == "Softmax"

    return {node.name for node in free_products(model) if any(softmax(name) for name in node.input)}


def spare_float_readers(model: onnx.ModelProto, integer: set[str]) -> None:
    """Gives what stays float the values before rounding, in place.

    ONNX Runtime's quantizer hands a rounded tensor to everything that reads it: to a layer that was to stay in float, and to the
    residual additions of post-norm transformers.

    Args:
        integer: names of the nodes that multiply integers. What they make stays rounded for all, else their kernels could not
            give integers.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.name in integer or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for place, name in enumerate(node.input):
            back = makers.get(name)
            there = makers.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
            if there is None or there.op_type != "QuantizeLinear":
                continue
            maker = makers.get(there.input[0])
            if maker is None or maker.name not in integer:
                node.input[place] = there.input[0]


def quantize_before_moves(model: onnx.ModelProto, products: set[str]) -> None:
    """Puts the rounding of products' inputs before what only moves them about, in place.

    The numbers stay the same where one scale is of all of them. What moves are then integers, and OpenVINO takes products and
    softmax of attention for one only where they stand so.

    Args:
        products: names of the nodes.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    count = Counter(name for node in model.graph.node for name in node.input)
    count.update(value.name for value in model.graph.output)

    def mover(name: str) -> onnx.NodeProto | None:
        """What moved a value that nothing else reads."""
        node = makers.get(name)
        return node if node is not None and node.op_type in LAYOUT and count[name] == 1 else None

    for product in [node for node in model.graph.node if node.name in products]:
        for place, name in enumerate(product.input):
            back = makers.get(name)
            there = makers.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
            last = mover(there.input[0]) if there is not None and there.op_type == "QuantizeLinear" else None
            if there is None or last is None or count[name] > 1:
                continue
            first = last
            while (before := mover(first.input[0])) is not None:
                first = before
            there.input[0], first.input[0], product.input[place] = first.input[0], name, last.output[0]
    GraphEdit(model).finish()  # sorts the nodes


def op_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Number of nodes of each operator, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def quantize_tables(model: onnx.ModelProto, exclude: tuple[str, ...] = (), include: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Stores embedding tables in int8 with one scale a row, in place.

    `Gather(table, ids)` becomes `Cast(Gather(int8 table, ids)) * Gather(scales, ids)`, with scale = max|row| / 127.
    Only the rows looked up are converted, so it costs no time. (A DequantizeLinear in front of the Gather, which is
    what ONNX Runtime's own quantizer makes, converts all V x D numbers at every call.)

    Args:
        model: Changed in place. Tables of [V, D] float32, looked up along axis 0 by something computed.
        exclude: Patterns of module paths to leave float, see `naming.matches`.
        include: Patterns of module paths to store as integers, all where there are none.

    Returns:
        The names of the tables that were replaced.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    tables = table_lookups(model, exclude, include)
    for name, nodes in tables.items():
        _replace_table(model, weights[name], nodes)
    return tuple(tables)


def share_zero_points(model: onnx.ModelProto) -> int:
    """Keeps equal vectors of 8-bit integers once, in place; returns how many were left out.

    ONNX Runtime's quantizer gives each layer zero points of its own, a byte for each output, and all of them are 0.
    """
    firsts: dict[tuple[int, bytes], str] = {}
    outputs = {value.name for value in model.graph.output}
    inner = {name for node in model.graph.node for name in set(reads(node)) - set(node.input)}  # in branches
    instead: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.data_type in ZERO_POINTS and len(tensor.dims) == 1 and tensor.name not in outputs | inner:
            first = firsts.setdefault((tensor.data_type, numpy_helper.to_array(tensor).tobytes()), tensor.name)
            if first != tensor.name:
                instead[tensor.name] = first
    if instead:
        for node in model.graph.node:
            node.input[:] = [instead.get(name, name) for name in node.input]
        kept = [tensor for tensor in model.graph.initializer if tensor.name not in instead]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
    return len(instead)


def table_lookups(
    model: onnx.ModelProto, exclude: tuple[str, ...] = (), include: tuple[str, ...] = (), least: int | None = None
) -> dict[str, list[onnx.NodeProto]]:
    """The embedding tables that may be stored as integers, each with the nodes that look it up and nothing else reads it.

    Args:
        least: bytes of a table; `MIN_TABLE_BYTES` where it is left out.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    lookups: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in weights:
            lookups.setdefault(node.input[0], []).append(node)
    found = {}
    for name, nodes in lookups.items():
        elsewhere = any(name in node.input for node in model.graph.node if node.op_type != "Gather")
        constant = any(node.input[1] in weights for node in nodes)
        meant = all(is_meant(module_path(node.name), include, exclude) for node in nodes)
        plain = not (elsewhere or constant or any(_axis(node) for node in nodes))
        if plain and meant and _is_table(weights[name], MIN_TABLE_BYTES if least is None else least):
            found[name] = nodes
    return found


def _axis(node: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 0)


def _is_table(tensor: onnx.TensorProto, least: int) -> bool:
    count = int(np.prod(tensor.dims))
    return tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2 and 4 * count >= least


def _replace_table(model: onnx.ModelProto, tensor: onnx.TensorProto, nodes: list[onnx.NodeProto]) -> None:
    name = tensor.name
    table = numpy_helper.to_array(tensor)
    largest = np.abs(table).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)  # [V, 1]
    rounded = np.clip(np.rint(table / scales), -127, 127).astype(np.int8)
    model.graph.initializer.remove(tensor)
    # Quantizers call what they make of a layer's weight or of a tensor `..._int8`, `..._scale`: these names are others.
    numbers, units = f"{name}_rows", f"{name}_row_scales"
    model.graph.initializer.append(numpy_helper.from_array(rounded, numbers))
    model.graph.initializer.append(numpy_helper.from_array(scales, units))
    for node in nodes:
        position = next(i for i, other in enumerate(model.graph.node) if other.name == node.name)
        output, ids, stem = node.output[0], node.input[1], node.name
        model.graph.node.remove(node)
        added = [
            helper.make_node("Gather", [numbers, ids], [f"{output}_row"], name=stem),
            helper.make_node("Cast", [f"{output}_row"], [f"{output}_row_float"], f"{stem}_Cast", to=onnx.TensorProto.FLOAT),
            helper.make_node("Gather", [units, ids], [f"{output}_row_scale"], name=f"{stem}_scale"),
            helper.make_node("Mul", [f"{output}_row_float", f"{output}_row_scale"], [output], name=f"{stem}_Mul"),
        ]
        for offset, new in enumerate(added):
            model.graph.node.insert(position + offset, new)
