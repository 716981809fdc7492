"""Weights of 16 bits: half the size, for runtimes that multiply in half precision (WebGPU), and for disks and networks.

ONNX Runtime's CPU kernels have no products of either type on most processors: it converts float16 back to float32 when it
opens a file. So neither is faster there.
"""

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers import float16

from mmcompress.quantization import onnx_graph
from mmcompress.quantization._logging import quiet
from mmcompress.quantization.naming import is_meant, module_path, unmatched
from mmcompress.quantization.result import QuantizationResult

IN_FLOAT32 = ("LayerNormalization", "Softmax", "SkipLayerNormalization", "SimplifiedLayerNormalization", "ReduceMean", "Pow")
"""What sums over many numbers or is steep stays in float32 whatever the rest is."""
LEAST_WEIGHTS = 1024
"""Smaller tensors stay as they are: a Cast each would cost more than they weigh."""


def to_float16(source: Path, target: Path, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> QuantizationResult:
    """Converts weights and arithmetic to float16; LayerNorm and Softmax, and the file's inputs and outputs stay float32.

    Args:
        source: Float file, as `export_component` writes it.
        target: Where to write.
        include: Patterns of module paths to convert, all where there are none; see `naming.matches`.
        exclude: Patterns of module paths to leave in float32.

    Raises:
        ValueError: A weight is too large for float16.
    """
    model = onnx.load(source)
    names = [node.name for node in model.graph.node]
    apart = [name for name in names if not is_meant(module_path(name), include, exclude)]
    limit = float(np.finfo(np.float16).max)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.isfinite(values := numpy_helper.to_array(tensor)).all():
            largest = float(np.abs(values).max(initial=0))
            # Masks hold the smallest float32 on purpose; the converter takes float16's smallest for it.
            if limit < largest < np.finfo(np.float32).max / 2:
                raise ValueError(f"{source}: {tensor.name} holds {largest:.3g}, and float16 ends at {limit:.0f}; use bfloat16")
    with quiet(float16.__name__):  # it lists every node whose bias is read by a float32 node too
        converted = float16.convert_float_to_float16(
            model, keep_io_types=True, op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *IN_FLOAT32], node_block_list=apart
        )
    _drop_repeated(converted.graph)
    return _save(source, target, converted, apart, (*include, *exclude))


def _drop_repeated(graph: onnx.GraphProto) -> None:
    """Where several float32 nodes read one converted tensor, the converter writes the same Cast for each."""
    seen: set[str] = set()
    for node in list(graph.node):
        if node.name in seen and node.op_type == "Cast":
            graph.node.remove(node)
        seen.add(node.name)


def to_bfloat16(source: Path, target: Path, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> QuantizationResult:
    """Stores weights in bfloat16, which a Cast takes back to float32: the arithmetic is float32's.

    Args:
        source: Float file, as `export_component` writes it.
        target: Where to write.
        include: Patterns of module paths to convert, all where there are none; see `naming.matches`.
        exclude: Patterns of module paths to leave in float32.
    """
    model = onnx.load(source)
    graph = model.graph
    apart = {node.name for node in graph.node if not is_meant(module_path(node.name), include, exclude)}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in set(node.input):
            readers.setdefault(name, []).append(node)
    casts = []
    for position, tensor in enumerate(graph.initializer):
        users = readers.get(tensor.name, [])
        count = int(np.prod(tensor.dims))
        if tensor.data_type != TensorProto.FLOAT or count < LEAST_WEIGHTS or any(node.name in apart for node in users):
            continue
        narrow = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
        name = f"{tensor.name}_bfloat16"
        casts.append(_cast(name, tensor.name))
        packed = helper.make_tensor(name, TensorProto.BFLOAT16, list(tensor.dims), narrow.tobytes(), raw=True)
        graph.initializer[position].CopyFrom(packed)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return _save(source, target, model, sorted(apart), (*include, *exclude))


def _cast(narrow: str, name: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [narrow], [name], f"{name}/Cast", to=TensorProto.FLOAT)


def _save(
    source: Path, target: Path, model: onnx.ModelProto, apart: Sequence[str], patterns: Sequence[str]
) -> QuantizationResult:
    onnx_graph.save(model, target)
    original = onnx.load(source, load_external_data=False)
    layers = [node.name for node in onnx_graph.weighted_nodes(original)]
    left = set(apart)
    return QuantizationResult(
        bytes_before=onnx_graph.file_bytes(source),
        bytes_after=onnx_graph.file_bytes(target),
        quantized=tuple(name for name in layers if name not in left),
        left_float=tuple(name for name in layers if name in left),
        float_products=len(onnx_graph.free_products(original)),
        unmatched_exclude=unmatched([module_path(node.name) for node in original.graph.node], patterns),
        op_counts=onnx_graph.op_counts(model),
    )
