"""Ranges of activations from calibration data: one pass over the data, for every placement of int8.

The float graph is run once with a few numbers more among its outputs; what is kept of an example is the smallest and the largest
value of each tensor, so memory does not grow with the number of examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

from mmcompress.quantization import onnx_graph

Feeds = Mapping[str, NDArray[Any]]
"""One batch: an array for each of the graph's inputs."""


class Range(NamedTuple):
    """The values that integers are to stand for, both float32."""

    low: np.float32
    high: np.float32


@dataclass(frozen=True)
class Ranges:
    """What calibration found.

    Attributes:
        seen: smallest and largest value of each tensor.
        rows: examples that were read.
    """

    seen: Mapping[str, Range]
    rows: int

    def limits(self, signed: bool = False) -> Mapping[str, Range]:
        """The range of each tensor.

        Args:
            signed: whether the integers are int8 with zero in the middle, instead of uint8.
        """
        return self.seen

    def for_onnxruntime(self, signed: bool = False) -> Any:
        """The same as the ``TensorsData`` that ONNX Runtime's quantizers take."""
        limits = self.limits(signed)
        data = {n: TensorData(lowest=np.asarray(one.low), highest=np.asarray(one.high)) for n, one in limits.items()}
        return TensorsData(CalibrationMethod.MinMax, data)


def collect_ranges(source: Path, feeds: Iterable[Feeds]) -> Ranges:
    """Ranges of all tensors that any placement of int8 may quantize, from one pass over calibration data.

    Args:
        source: Float file, as `export_component` writes it.
        feeds: Batches; read once, one at a time.

    Raises:
        ValueError: There is no calibration data, a batch lacks an input, or a tensor holds what is no finite number.
    """
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        onnx_graph.prepare(source, prepared)
        return ranges_of_prepared(prepared, feeds)


def ranges_of_prepared(prepared: Path, feeds: Iterable[Feeds]) -> Ranges:
    """The same for a file that `onnx_graph.prepare` has made."""
    model = onnx.load(prepared, load_external_data=False)
    inputs = tuple(value.name for value in model.graph.input)
    tensors = activations(model)
    session = _session_with_extremes(model, tensors, prepared)
    wanted = [f"{name}{end}" for name in tensors for end in (_LEAST, _MOST)]
    low = np.full(len(tensors), np.inf, dtype=np.float32)
    high = np.full(len(tensors), -np.inf, dtype=np.float32)
    rows = 0
    for batch in checked(feeds, inputs):
        rows += len(batch[inputs[0]])
        found = session.run(wanted, batch)
        for place, name in enumerate(tensors):
            least, most = found[2 * place], found[2 * place + 1]
            if not least.size:  # a decoder's cache is empty at first
                continue
            if not (np.isfinite(least).all() and np.isfinite(most).all()):
                raise ValueError(f"{name}: is not finite on calibration data in float32; it cannot be quantized")
            low[place], high[place] = min(low[place], least.min()), max(high[place], most.max())
    return Ranges({n: Range(a, b) for n, a, b in zip(tensors, low, high, strict=True) if a <= b}, rows)


def activations(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the tensors that a placement of int8 may quantize: what products and convolutions read and write, but weights."""
    weights = onnx_graph.weight_names(model)
    names = [
        name
        for node in model.graph.node
        if node.op_type in onnx_graph.PRODUCT_OPS
        for name in (*node.input[:2], node.output[0])
        if name not in weights
    ]
    return tuple(dict.fromkeys(names))


def checked(feeds: Iterable[Feeds], inputs: tuple[str, ...]) -> Iterator[dict[str, NDArray[Any]]]:
    """Calibration batches one at a time, with a word on what is wrong with them.

    Raises:
        ValueError: there is none, or one lacks an input.
    """
    any_ = False
    for batch in feeds:
        any_ = True
        missing = [name for name in inputs if name not in batch]
        if missing:
            raise ValueError(f"calibration batch lacks {missing}; it has {sorted(batch)}")
        yield {name: np.asarray(batch[name]) for name in inputs}
    if not any_:
        raise ValueError("static quantization needs calibration data, and there is none")


_LEAST, _MOST = "/calibration_min", "/calibration_max"


def _session_with_extremes(model: onnx.ModelProto, tensors: tuple[str, ...], prepared: Path) -> Any:
    """A session that gives the smallest and the largest value of tensors, too."""
    graph = model.graph
    for name in tensors:
        for kind, end in (("ReduceMin", _LEAST), ("ReduceMax", _MOST)):
            # Without keepdims ONNX Runtime refuses tensors without elements.
            graph.node.append(helper.make_node(kind, [name], [f"{name}{end}"], f"{name}{end}", keepdims=1))
            graph.output.append(helper.make_tensor_value_info(f"{name}{end}", TensorProto.FLOAT, None))
    watched = prepared.with_name("watched.onnx")  # beside it, as its weights are
    onnx.save_model(model, watched)
    options = ort.SessionOptions()
    # What fuses operators does away with tensors that are to be seen.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(str(watched), options, providers=["CPUExecutionProvider"])
