"""Int8 by Intel Neural Compressor's static quantization of an exported torch program, written into our ONNX files.

It observes ranges and chooses scales on the torch program, as X86InductorQuantizer places them: inputs and weights of Linear and
Conv2d layers, and the factors of some products between (in QuickGELU), which we leave float: no ONNX runtime multiplies those in
integers. What it leaves is no file that a runtime loads fast, as weights stay float and are rounded at every call. So ranges,
scales and integers of layers are read out and stand in a file of our placement.

Shapes: O outputs, I inputs of a layer; a convolution's inputs are its colours times the pixels of a patch.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.naming import module_path
from mmcompress.quantization.neural_compressor import EXTRA, FAILURES, BackendError
from mmcompress.quantization.ptq import quantize_static_int8
from mmcompress.quantization.ranges import Range, Ranges
from mmcompress.quantization.result import QuantizationResult
from mmcompress.runtimes.onnx_predict import open_session

OBSERVERS: Mapping[str, Literal["minmax", "kl"]] = {"min-max": "minmax", "entropy": "kl"}
"""Its names of what we call ``calibration``."""
TOLERANCE = 0.02
"""Of outputs, in norm: how far the file may be from the torch program. A float that is a hair off may round the other way, and
constants that the file holds in int8 are floats there."""
PRODUCTS = ("aten.linear.default", "aten.conv2d.default")
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class StaticLayer:
    """One layer's numbers.

    Attributes:
        inputs: what 0 and 255 stand for.
        digits: weights, (O, I).
        scales: of the outputs, (O,).
    """

    inputs: Range
    digits: NDArray[np.int8]
    scales: NDArray[np.float32]


def static_layers(
    module: nn.Module, batches: Sequence[Batch], axes: Sequence[Mapping[int, str]], observer: Literal["minmax", "kl"] = "minmax"
) -> tuple[dict[str, StaticLayer], Tensor]:
    """What Neural Compressor finds for a module.

    Args:
        module: in evaluation mode; stays as it is. Called with the tensors of a batch in their order, and returns a tuple.
        batches: calibration data.
        axes: for each input the axes whose length may change.
        observer: how it takes ranges.

    Returns:
        Layers by their paths in the module, and the first output for the first batch, with no other numbers rounded.

    Raises:
        BackendError: it is not installed, fails, or leaves a form that is not known here.
    """
    try:
        from neural_compressor.torch import quantization
        from neural_compressor.torch.export import export
    except ImportError as e:
        raise BackendError(f"neural-compressor cannot be imported ({e}): pip install '{EXTRA}'") from e
    logging.disable(logging.WARNING)  # it logs several lines a layer
    try:
        with torch.no_grad():
            shapes = tuple(dict.fromkeys(of, torch.export.Dim.AUTO) for of in axes)
            program = export(copy.deepcopy(module), example_inputs=batches[0], dynamic_shapes=shapes)
            prepared = quantization.prepare(model=program, quant_config=quantization.INT8StaticQuantConfig(act_algo=observer))
            for batch in batches:
                prepared(*batch)
            found = quantization.convert(prepared)
            layers = _read(found)
            return layers, found(*batches[0])[0]
    except FAILURES as e:
        said = str(e).strip().splitlines() or [type(e).__name__]
        raise BackendError(f"neural-compressor's static quantization fails: {type(e).__name__}: {said[0][:300]}") from e
    finally:
        logging.disable(logging.NOTSET)


def _read(program: torch.fx.GraphModule) -> dict[str, StaticLayer]:
    """Reads layers out of a converted program, and takes the rounding of everything else out of it, in place."""
    layers: dict[str, StaticLayer] = {}
    nodes: list[Any] = list(program.graph.nodes)
    for node in nodes:
        if node.op != "call_function":
            continue
        if str(node.target) in PRODUCTS:
            inputs, weight = node.args[:2]
            if "dequantize_per_tensor" not in str(inputs.target) or "dequantize_per_channel" not in str(weight.target):
                continue
            path = str(weight.args[0].args[0].target).removesuffix(".weight")
            layers[path] = _layer(program, path, inputs.args, weight.args[0].args)
        elif "quantize_per" not in str(node.target):
            for there in [a for a in node.args if "dequantize_per_tensor" in str(getattr(a, "target", ""))]:
                node.replace_input_with(there, there.args[0].args[0])
    program.graph.eliminate_dead_code()
    program.recompile()
    if not layers:
        raise BackendError("neural-compressor's static quantization quantizes no layer")
    return layers


def _layer(program: nn.Module, path: str, inputs: Sequence[Any], weight: Sequence[Any]) -> StaticLayer:
    """The numbers of a layer, out of the arguments of its (de)quantization.

    They are (value, scale, zero point, least, most, type), and those of weights have the axis of scales before the last three.
    """
    _, scale, zero, least, most, _ = inputs
    plain, scales, zeros, axis, lowest, highest, kind = (_value(program, one) for one in weight)
    unsigned, symmetric = (least, most) == (0, 255), not bool(zeros.any())
    if not (unsigned and symmetric and axis == 0 and kind == torch.int8):
        raise BackendError(f"neural-compressor's static quantization leaves {path} in a form that is not known here")
    digits = torch.ops.quantized_decomposed.quantize_per_channel(plain, scales, zeros, 0, lowest, highest, torch.int8)
    ends = Range(np.float32((0 - zero) * scale), np.float32((255 - zero) * scale))
    return StaticLayer(ends, digits.flatten(1).cpu().numpy(), scales.detach().float().cpu().numpy())


def _value(program: nn.Module, given: Any) -> Any:
    """What a node that only names a tensor of the program stands for; everything else stays as it is."""
    if not isinstance(given, torch.fx.Node):
        return given
    found: Any = program
    for name in str(given.target).split("."):
        found = getattr(found, name)
    return found


def write_static(
    source: Path,
    target: Path,
    layers: Mapping[str, StaticLayer],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> QuantizationResult:
    """Writes a file as `quantize_static_int8` does, with given numbers; layers that are not given stay float.

    Args:
        source: Float file, as `export_component` writes it.
        target: Where to write.
        layers: by the path of the layer's module.
        include: Patterns of module paths to quantize, all where there are none; see `naming.matches`.
        exclude: Patterns of module paths to leave float.

    Raises:
        ValueError: Nothing is left to quantize.
    """
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        onnx_graph.prepare(source, prepared)
        nodes = onnx_graph.weighted_nodes(onnx.load(prepared, load_external_data=False))
    seen = {node.input[0]: layers[path].inputs for node in nodes if (path := module_path(node.name)) in layers}
    others = sorted({path for node in nodes if (path := module_path(node.name)) not in layers})
    left = [*exclude, *(f"re:^{re.escape(path)}$" for path in others)]
    found = quantize_static_int8(source, target, Ranges(seen, 0), include=include, exclude=left, reduce_range=False)
    model = onnx.load(target)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        layer = layers.get(module_path(node.name))
        weight = makers.get(node.input[1]) if node.op_type in onnx_graph.PRODUCT_OPS and layer is not None else None
        if layer is None or weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in held:
            continue
        axis = next((int(a.i) for a in weight.attribute if a.name == "axis"), 1)
        digits = np.ascontiguousarray(layer.digits if axis == 0 else layer.digits.T)
        for name, values in ((weight.input[0], digits), (weight.input[1], layer.scales)):
            held[name].CopyFrom(numpy_helper.from_array(values.reshape(tuple(held[name].dims)), name))
    onnx_graph.save(model, target)
    unmatched = tuple(pattern for pattern in found.unmatched_exclude if pattern in (*include, *exclude))
    return replace(found, unmatched_exclude=unmatched)


def static_by_neural_compressor(
    source: Path,
    target: Path,
    module: nn.Module,
    inputs: Sequence[str],
    axes: Sequence[Mapping[int, str]],
    batches: Sequence[Batch],
    *,
    observer: Literal["minmax", "kl"] = "minmax",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> QuantizationResult:
    """One component's int8 file.

    Args:
        inputs: the names of the module's inputs, in the order of a batch.

    Raises:
        BackendError: see `static_layers`, or the file answers otherwise than the program.
        ValueError: Nothing is left to quantize.
    """
    layers, wanted = static_layers(module, batches, axes, observer)
    result = write_static(source, target, layers, include=include, exclude=exclude)
    if {module_path(name) for name in result.quantized} == set(layers):
        session = open_session(target)
        known = {one.name for one in session.get_inputs()}
        feeds = {name: values.numpy() for name, values in zip(inputs, batches[0], strict=True) if name in known}
        ours = torch.from_numpy(session.run(None, feeds)[0])
        if (off := float((ours - wanted).norm() / wanted.norm())) > TOLERANCE:
            raise BackendError(
                f"neural-compressor's static quantization cannot be held by our files: outputs differ by {off:.3f} of their norm"
            )
    return result
