"""ONNX Runtime's dynamic quantizer with the weights done at once.

Like the one for QDQ (see `qdq`) it rounds a weight with a scale for each output channel in a loop over channels, most of the
time that it takes. Here all channels are rounded together; the tensors are those that the quantizer alone would have made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX, QuantizationMode, add_infer_metadata

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.qdq import channel_scales, quantized

OPS = ("MatMul", "Gemm")


def write_dynamic(prepared: Path, target: Path, excluded: Sequence[str], *, per_channel: bool, reduce_range: bool) -> None:
    """Quantizes the products of a file that `onnx_graph.prepare` made; weights are int8, inputs are rounded at every call.

    Args:
        prepared: the file.
        target: where to write.
        excluded: names of the nodes that stay in float.
        per_channel: whether weights have a scale for each output channel.
        reduce_range: whether weights take 7 bits.
    """
    model = onnx.load(prepared)
    add_infer_metadata(model)  # the quantizer infers shapes anyway, after it has rewritten the graph
    options = {"MatMulConstBOnly": True}
    mode, weight, activation = QuantizationMode.IntegerOps, QuantType.QInt8, QuantType.QUInt8
    ops, large = list(OPS), onnx_graph.is_large(prepared)
    made = _Quantizer(model, per_channel, reduce_range, mode, False, weight, activation, None, [], list(excluded), ops, options)
    made.quantize_model()
    made.model.save_model_to_file(str(target), large)


class _Quantizer(ONNXQuantizer):
    """Rounds all channels of a weight together."""

    model: ONNXModel

    def quantize_weight_per_channel_impl(
        self, weight_name: str, weight_qType: Any, channel_axis: int, reduce_range: bool = True, keep_float_weight: bool = False
    ) -> tuple[str, str, str]:
        """As the library's, for symmetric int8; adds the integers, scales and zero points, and gives their names."""
        tensor = self.model.get_initializer(weight_name)
        if keep_float_weight or tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2 or 0 in tensor.dims:
            found = super().quantize_weight_per_channel_impl(
                weight_name, weight_qType, channel_axis, reduce_range, keep_float_weight
            )
            return found[0], found[1], found[2]
        values, axis = numpy_helper.to_array(tensor), channel_axis % len(tensor.dims)
        scales = channel_scales(values, axis, self.reduce_range and reduce_range)
        zeros = helper.make_tensor(f"{weight_name}_zero_point", weight_qType, scales.shape, bytes(scales.size), raw=True)
        integers = quantized(values, scales, numpy_helper.to_array(zeros), axis)
        made = numpy_helper.from_array(integers, f"{weight_name}{TENSOR_NAME_QUANT_SUFFIX}")
        self.model.initializer_extend([numpy_helper.from_array(scales, f"{weight_name}_scale"), zeros, made])
        return made.name, zeros.name, f"{weight_name}_scale"
