"""Ranges of activations from calibration data: one pass over the data, for every placement of int8.

The float graph is run once with a few numbers more among its outputs. What is kept of a tensor is its smallest and its largest
value, or a histogram, so memory does not grow with the number of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.clipping import by_entropy, by_mse, by_percentile
from mmcompress.quantization.graph_edit import GraphEdit
from mmcompress.quantization.histogram import Histogram
from mmcompress.quantization.schemes import Calibration
from mmcompress.quantization.watching import Feeds as Feeds
from mmcompress.quantization.watching import checked, open_watched, pieces, watch

PERCENTILE = 99.99
"""Of the values of a tensor that a range holds under ``percentile``."""

Rule = Callable[[Histogram, bool], tuple[float, float]]
"""A range out of a histogram; the flag says whether it is to have 0 in the middle."""


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
        histograms: of each tensor, where ranges are not to hold everything that was seen.
        rule: how a range comes from a histogram.
    """

    seen: Mapping[str, Range]
    rows: int
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    rule: Rule | None = None
    _made: dict[tuple[str, bool], Range] = field(default_factory=dict)

    def limits(self, signed: bool = False, names: Iterable[str] | None = None) -> Mapping[str, Range]:
        """The range of each tensor.

        Args:
            signed: whether the integers are int8 with zero in the middle, instead of uint8.
            names: of the tensors; all where None. Those that were not seen are left out.
        """
        return {name: self._limit(name, signed) for name in (self.seen if names is None else names) if name in self.seen}

    def _limit(self, name: str, signed: bool) -> Range:
        if self.rule is None:
            return self.seen[name]
        if (name, signed) not in self._made:
            low, high = self.rule(self.histograms[name], signed)
            self._made[name, signed] = Range(np.float32(low), np.float32(high))
        return self._made[name, signed]

    def for_onnxruntime(self, signed: bool = False, names: Iterable[str] | None = None, symmetric: Collection[str] = ()) -> Any:
        """The same as the ``TensorsData`` that ONNX Runtime's quantizers take; those in ``symmetric`` as for signed integers."""
        limits = {**self.limits(signed, names), **self.limits(True, symmetric)}
        data = {n: TensorData(lowest=np.asarray(one.low), highest=np.asarray(one.high)) for n, one in limits.items()}
        return TensorsData(CalibrationMethod.MinMax, data)


def collect_ranges(
    source: Path, feeds: Iterable[Feeds], calibration: Calibration = "min-max", percentile: float = PERCENTILE
) -> Ranges:
    """Ranges of all tensors that any placement of int8 may quantize, from one pass over calibration data.

    Args:
        source: Float file, as `export_component` writes it.
        feeds: Batches; read once, one at a time.
        calibration: How a range comes from the values of a tensor.
        percentile: Of the values, under ``percentile``.

    Raises:
        ValueError: There is no calibration data, a batch lacks an input, or a tensor holds what is no finite number.
    """
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        onnx_graph.prepare(source, prepared)
        return ranges_of_prepared(prepared, feeds, calibration, percentile)


def ranges_of_prepared(
    prepared: Path, feeds: Iterable[Feeds], calibration: Calibration = "min-max", percentile: float = PERCENTILE
) -> Ranges:
    """The same for a file that `onnx_graph.prepare` has made."""
    if calibration == "min-max":
        return _extremes(prepared, feeds)
    rules: dict[str, Rule] = {"percentile": partial(_percentile, percentile), "entropy": by_entropy, "mse": by_mse}
    tensors = activations(onnx.load(prepared, load_external_data=False))
    histograms = {name: Histogram() for name in tensors}
    rows = 0

    def counted() -> Iterable[Feeds]:
        nonlocal rows
        for batch in feeds:
            rows += len(next(iter(batch.values()), ()))
            yield batch

    for found in watch(prepared, tensors, counted()):
        for name, values in found.items():
            histograms[name].add(values)
    filled = {name: one for name, one in histograms.items() if len(one.counts)}
    return Ranges({name: Range(one.low, one.high) for name, one in filled.items()}, rows, filled, rules[calibration])


def _percentile(percentile: float, histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    return by_percentile(histogram, percentile, symmetric)


def _extremes(prepared: Path, feeds: Iterable[Feeds]) -> Ranges:
    """Ranges that hold everything; the graph itself reduces tensors to their extremes."""
    model = onnx.load(prepared, load_external_data=False)
    inputs = tuple(value.name for value in model.graph.input)
    tensors = activations(model)
    _reduce(model, tensors)
    session = open_watched(model, prepared)
    wanted = [f"{name}{end}" for name in tensors for end in (_LEAST, _MOST)]
    low = np.full(len(tensors), np.inf, dtype=np.float32)
    high = np.full(len(tensors), -np.inf, dtype=np.float32)
    rows = 0
    for batch in pieces(checked(feeds, inputs), AT_ONCE):
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


def _reduce(model: onnx.ModelProto, tensors: Iterable[str]) -> None:
    """Adds the extremes of tensors to a graph, in place, each right behind what makes the tensor: then it need not be kept."""
    graph, left = model.graph, set(tensors)
    nodes: list[onnx.NodeProto] = []

    def seen(names: Iterable[str]) -> None:
        for name in names:
            if name in left:
                left.remove(name)
                for kind, end in (("ReduceMin", _LEAST), ("ReduceMax", _MOST)):
                    # Without keepdims ONNX Runtime refuses tensors without elements.
                    nodes.append(helper.make_node(kind, [name], [f"{name}{end}"], f"{name}{end}", keepdims=1))
                    graph.output.append(helper.make_tensor_value_info(f"{name}{end}", TensorProto.FLOAT, None))

    seen(value.name for value in graph.input)
    for node in graph.node:
        nodes.append(GraphEdit.copy(node))
        seen(node.output)
    del graph.node[:]
    graph.node.extend(nodes)


AT_ONCE = 16
"""Examples that the float graph is run on at a time."""
_LEAST, _MOST = "/calibration_min", "/calibration_max"


def activations(model: onnx.ModelProto, nodes: Iterable[str] | None = None) -> tuple[str, ...]:
    """Names of the tensors that a placement of int8 may quantize: what products and convolutions read and write, but weights.

    Args:
        nodes: names of the products and convolutions; all where None.
    """
    meant = None if nodes is None else set(nodes)
    weights = onnx_graph.weight_names(model)
    names = [
        name
        for node in model.graph.node
        if node.op_type in onnx_graph.PRODUCT_OPS and (meant is None or node.name in meant)
        for name in (*node.input[:2], node.output[0])
        if name not in weights
    ]
    return tuple(dict.fromkeys(names))
