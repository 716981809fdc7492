"""Weights of 8 or 4 bits in blocks, activations in float: what pays for decoders, which read all weights for every token.

ONNX Runtime's MatMulNBits multiplies by such weights without writing them out in float, and GatherBlockQuantized looks up
rows of tables of 4 bits. Its quantizer makes the latter. Its rounding of weights does not cut ranges, which at 4 bits costs
more than it need; ours does, see `blocks.rtn`.

Shapes: K inputs, N outputs of a layer; blocks run along K.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mmcompress.quantization import awq, onnx_graph
from mmcompress.quantization._logging import quiet, root_kept
from mmcompress.quantization.blocks import DEFAULT_SIZES, Bits, Grid, fitting, replace_weights, rtn
from mmcompress.quantization.gptq import gptq
from mmcompress.quantization.moments import stream
from mmcompress.quantization.naming import is_meant, module_path, unmatched
from mmcompress.quantization.result import QuantizationResult
from mmcompress.quantization.stored import store_constants
from mmcompress.quantization.tied import share_tied

with root_kept():
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

Digits = Mapping[str, tuple[NDArray[np.uint8], Grid]]
"""The digits (K, N) of weights and what they stand for, by the weight's name."""
Feeds = Callable[[], Iterable[Mapping[str, NDArray[Any]]]]
"""Gives the calibration batches, each time anew."""


def quantize_weights(
    source: Path,
    target: Path,
    *,
    bits: Bits,
    block_size: int | None = None,
    algorithm: Literal["rtn", "gptq", "awq"] = "rtn",
    calibration: Feeds | None = None,
    rounded: Digits | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> QuantizationResult:
    """Stores the weights of layers and embedding tables as integers.

    Weights of 8 bits are symmetric, those of 4 bits have a zero point for each block. Tables have one scale a row at 8 bits, and
    a scale for each block at 4; they are rounded to the nearest. The patch embedding takes 8 bits in any case, to the nearest: it
    is the one layer that sees raw pixels, and a few hundredths of the file. A table that is a layer's weight as well is stored
    once, with a zero point for each block at 4 bits, rounded to the nearest; see `tied`.

    Args:
        source: Float file, as `export_component` writes it.
        target: Where to write.
        bits: Of each weight.
        block_size: Weights that share a scale, along K: 32, 64, 128 or 256; None for 64 at 4 bits and 256 at 8. Layers whose
            inputs it does not divide take a smaller one, where that takes less space.
        algorithm: rtn rounds to the nearest and needs no data, see `blocks.rtn`; see `gptq.gptq` and `awq.awq` for the others.
        calibration: Batches for those.
        rounded: What another algorithm has found, by the path of the layer's module; layers that are not in it are rounded by
            ``algorithm``.
        include: Patterns of module paths to quantize, all where there are none; see `naming.matches`.
        exclude: Patterns of module paths to leave float.

    Raises:
        ValueError: Nothing is left to quantize, or there is no calibration data where the algorithm needs it.
    """
    block_size = block_size or DEFAULT_SIZES[bits]
    if algorithm != "rtn" and calibration is None:
        raise ValueError(f"{algorithm} needs calibration data")
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        patches = set(onnx_graph.prepare(source, prepared))
        model = onnx.load(prepared)
    gemms_to_products(model)
    layers = [node for node in onnx_graph.weighted_nodes(model) if node.op_type in ("MatMul", "Gemm", "Conv")]
    names = [node.name for node in layers]  # the nodes themselves are replaced
    flat = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products = [node for node in layers if node.op_type == "MatMul" and node.input[1] in flat]
    chosen = {node.name for node in products if is_meant(module_path(node.name), include, exclude)}
    if layers and not chosen:
        raise ValueError(f"{source}: no MatMul with a weight is left to quantize")
    lookups = {node.name: module_path(node.name) for node in model.graph.node if node.op_type == "Gather"}
    tied, own = share_tied(model, chosen - patches, bits, block_size, (include, exclude))
    chosen -= own
    if rounded is not None:
        chosen -= _take(model, chosen, rounded)
    if algorithm != "rtn" and calibration is not None and (meant := chosen - (patches if bits == 4 else set())):
        replace_weights(model, by_moments(model, meant, bits, block_size, algorithm, calibration), meant)
        chosen -= meant
    tables = (*tied, *_quantize_tables(model, bits, block_size, tuple(include), tuple(exclude)))
    _round_to_nearest(model, chosen & patches, 8, block_size)
    _round_to_nearest(model, chosen - patches, bits, block_size)
    _drop_unused(model)
    tables += store_constants(model, include, exclude, float_bytes=onnx_graph.file_bytes(source))
    onnx_graph.save(model, target)
    floats = {node.name for node in onnx_graph.weighted_nodes(model)}
    paths = [*(module_path(name) for name in names), *lookups.values()]
    return QuantizationResult(
        bytes_before=onnx_graph.file_bytes(source),
        bytes_after=onnx_graph.file_bytes(target),
        quantized=tuple(name for name in names if name not in floats),
        left_float=tuple(name for name in names if name in floats),
        float_products=len(onnx_graph.free_products(model)),
        tables=tables,
        unmatched_exclude=unmatched(paths, (*include, *exclude)),
        op_counts=onnx_graph.op_counts(model),
    )


def _take(model: onnx.ModelProto, chosen: set[str], rounded: Digits) -> set[str]:
    """Puts given digits in the place of weights, in place; returns the names of the nodes that got them."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found: dict[str, tuple[NDArray[np.uint8], Grid]] = {}
    meant = set()
    for node in model.graph.node:
        given = rounded.get(module_path(node.name))
        if node.name in chosen and given is not None and given[0].shape == shapes[node.input[1]]:
            found[node.input[1]] = given
            meant.add(node.name)
    replace_weights(model, found, meant)
    return meant


def by_moments(
    model: onnx.ModelProto, meant: set[str], bits: Bits, block_size: int, algorithm: Literal["gptq", "awq"], feeds: Feeds
) -> Digits:
    """Rounds the weights of MatMul nodes by what their inputs are on calibration data.

    The inputs are those of the float model. AWQ changes LayerNorms and weights of ``model`` so that its outputs stay; GPTQ
    leaves it as it is.

    Args:
        meant: the names of the nodes.
    """
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    waiting: dict[str, set[str]] = {}  # a weight that several nodes share waits for the inputs of all of them
    for node in model.graph.node:
        if node.name in meant:
            readers.setdefault(node.input[0], []).append(node)
            waiting.setdefault(node.input[1], set()).add(node.input[0])
    products: dict[str, NDArray[Any]] = {}
    found: dict[str, tuple[NDArray[np.uint8], Grid]] = {}
    wanted = {tensor: int(held[nodes[0].input[1]].dims[0]) for tensor, nodes in readers.items()}
    for tensor, moments in stream(model, wanted, feeds):
        product, layers = moments.product, readers[tensor]
        size = fitting(len(product), block_size, bits)
        if algorithm == "awq" and awq.foldable(model, tensor, layers) is not None:
            weights = [numpy_helper.to_array(held[layer.input[1]]) for layer in layers]
            scales = awq.input_scales(weights, moments, bits, size)
            awq.fold_into_norm(model, tensor, scales, layers)
            product = product / np.outer(scales, scales)
        for name in {layer.input[1] for layer in layers}:
            products[name] = products[name] + product if name in products else product
            waiting[name].discard(tensor)
            if not waiting[name]:
                rounded = gptq if algorithm == "gptq" else awq.awq
                found[name] = rounded(numpy_helper.to_array(held[name]), products.pop(name), bits, size)
    return found


def gemms_to_products(model: onnx.ModelProto) -> None:
    """Turns Gemm nodes with a constant weight into MatMul and Add, in place; factors other than 1 stay as they are."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type != "Gemm" or node.input[1] not in weights:
            continue
        found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if found.get("transA", 0) or found.get("alpha", 1.0) != 1.0 or found.get("beta", 1.0) != 1.0:
            continue
        weight, stem = numpy_helper.to_array(weights[node.input[1]]), node.name.removesuffix("/Gemm")
        name = f"{node.input[1]}_product"
        if found.get("transB", 0):
            weight = weight.T
        if name not in weights:
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight), name))
            weights[name] = model.graph.initializer[-1]
        biased = len(node.input) > 2 and bool(node.input[2])
        output = f"{node.output[0]}_product" if biased else node.output[0]
        added = [helper.make_node("MatMul", [node.input[0], name], [output], f"{stem}/MatMul")]
        if biased:
            added.append(helper.make_node("Add", [output, node.input[2]], [node.output[0]], f"{stem}/Add"))
        position = next(i for i, other in enumerate(model.graph.node) if other.name == node.name)
        model.graph.node.remove(node)
        for offset, new in enumerate(added):
            model.graph.node.insert(position + offset, new)
    _drop_unused(model)


def _quantize_tables(
    model: onnx.ModelProto, bits: int, block_size: int, include: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[str, ...]:
    if bits == 8:
        return onnx_graph.quantize_tables(model, exclude, include)
    tables = onnx_graph.table_lookups(model, exclude, include)
    # Blocks lie along a row; rows that are no multiple of a block keep their float table.
    width = {tensor.name: tensor.dims[1] for tensor in model.graph.initializer if tensor.name in tables}
    fitting = {name: nodes for name, nodes in tables.items() if width[name] % block_size == 0}
    meant = {node.name for nodes in fitting.values() for node in nodes}
    if meant:
        config = nbits.DefaultWeightOnlyQuantConfig(
            block_size=block_size, is_symmetric=True, bits=4, op_types_to_quantize=("Gather",), quant_axes=(("Gather", 1),)
        )
        _process(model, config, [node.name for node in model.graph.node if node.name not in meant])
    return tuple(fitting)


def _round_to_nearest(model: onnx.ModelProto, meant: set[str], bits: Bits, block_size: int) -> None:
    """Rounds the weights of MatMul nodes, in place."""
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for name in dict.fromkeys(node.input[1] for node in model.graph.node if node.name in meant):
        weight = numpy_helper.to_array(held[name])
        found[name] = rtn(weight, bits, fitting(len(weight), block_size, bits))
    replace_weights(model, found, meant)


def _process(model: onnx.ModelProto, config: nbits.WeightOnlyQuantConfig, excluded: list[str]) -> None:
    with quiet(nbits.__name__):  # two lines for every node, and a warning that int4 needs the opset that it then sets
        quantizer = nbits.MatMulNBitsQuantizer(model, nodes_to_exclude=excluded, algo_config=config)
        quantizer.process()
    if quantizer.model.model is not model:
        model.CopyFrom(quantizer.model.model)


def _drop_unused(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    if len(kept) < len(model.graph.initializer):
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
