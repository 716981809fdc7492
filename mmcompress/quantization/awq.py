"""AWQ: inputs that are large get finer weights, and ranges are cut where that costs less than a coarse grid.

Lin, Tang, Tang, Yang, Dang, Han 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (arXiv
2306.00978), section 3.2. Inputs are divided by s = mean|x|^alpha, and the weights multiplied by it. Only where a LayerNorm can
take the division up, which is free: elsewhere it would be one more node for each layer. Errors are those of the output on the
calibration data. They need no data, but its second moments: the squared error of weights E is trace(E^T X^T X E).

Shapes: K inputs, N outputs of a layer; J blocks of B inputs.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from mmcompress.quantization.blocks import Bits, Floats, Grid, cut_grid, nearest_grid
from mmcompress.quantization.moments import Moments

ALPHAS = tuple(i / 20 for i in range(20))
"""The exponents that are tried; the paper's grid. 0 leaves everything as it is."""
NORM = "LayerNormalization"


def input_scales(weights: Sequence[Floats], moments: Moments, bits: Bits, block_size: int) -> Floats:
    """The s that serves the layers best that read one tensor, (K,).

    Args:
        weights: (K, N) each.
    """
    size = np.maximum(moments.size / moments.rows, 1e-8)
    together = np.concatenate(weights, axis=1)
    best, least = np.ones(len(size), dtype=np.float32), np.inf
    for alpha in ALPHAS:
        scales = size**alpha
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        scaled = together * scales[:, None]
        grid = nearest_grid(scaled, bits, block_size)
        error = grid.values(grid.digits(scaled)) / scales[:, None] - together
        cost = float(np.vdot(error, moments.product @ error))
        if cost < least:
            best, least = scales, cost
    return best


def clipped_grid(weight: Floats, product: Floats, bits: Bits, block_size: int) -> Grid:
    """The grid whose ranges are cut to where the output's error is least.

    Args:
        weight: (K, N).
        product: X^T X, (K, K); what blocks do to one another is left aside.
    """
    inside = _diagonal_blocks(product, block_size, -(-len(weight) // block_size))
    return cut_grid(weight, bits, block_size, lambda error: np.einsum("jbn,jbn->jn", error, inside @ error))


def awq(weight: Floats, product: Floats, bits: Bits, block_size: int) -> tuple[NDArray[np.uint8], Grid]:
    """Digits (K, N) and grid of a weight whose inputs are scaled already; ``product`` is of the scaled inputs."""
    grid = clipped_grid(weight, product, bits, block_size)
    return grid.digits(weight), grid


def fold_into_norm(model: onnx.ModelProto, tensor: str, scales: Floats, layers: Sequence[onnx.NodeProto]) -> bool:
    """Divides a LayerNorm's output by scales (K,) and multiplies the weights of the layers that read it, in place.

    Returns:
        Whether it was done: not so if the tensor is no LayerNorm's output, or something else reads it, too, or shares weights.
    """
    norm = foldable(model, tensor, layers)
    if norm is None:
        return False
    held = {one.name: one for one in model.graph.initializer}
    for name in norm.input[1:]:
        held[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held[name]) / scales, name))
    for name in {layer.input[1] for layer in layers}:
        held[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held[name]) * scales[:, None], name))
    return True


def foldable(model: onnx.ModelProto, tensor: str, layers: Sequence[onnx.NodeProto]) -> onnx.NodeProto | None:
    """The LayerNorm that gives a tensor which these layers alone read, and whose parameters nothing else reads."""
    norm = next((node for node in model.graph.node if tensor in node.output), None)
    if norm is None or norm.op_type != NORM or tensor in {value.name for value in model.graph.output}:
        return None
    readers = [node for node in model.graph.node for name in node.input if name == tensor]
    shared = {*norm.input[1:], *(layer.input[1] for layer in layers)}
    own = {norm.output[0], *(layer.output[0] for layer in layers)}
    others = [node for node in model.graph.node if node.output[0] not in own]
    held = {one.name for one in model.graph.initializer}
    if len(readers) != len(layers) or any(name in shared for node in others for name in node.input) or not shared <= held:
        return None
    return norm


def _diagonal_blocks(product: Floats, block_size: int, count: int) -> Floats:
    """The (J, B, B) blocks along the diagonal; filled up with zeros."""
    fill = count * block_size - len(product)
    padded = np.pad(product, ((0, fill), (0, fill)))
    spans = [slice(j * block_size, (j + 1) * block_size) for j in range(count)]
    return np.stack([padded[span, span] for span in spans])
