"""Runs a float graph on calibration data and shows what flows through it, a few examples at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

Feeds = Mapping[str, NDArray[Any]]
"""One batch: an array for each of the graph's inputs."""
Arrays = dict[str, NDArray[Any]]

MASK = "attention_mask"
CHUNK_BYTES = 64_000_000
"""Of watched tensors that are in memory at a time, where one example has no more."""


def checked(feeds: Iterable[Feeds], inputs: tuple[str, ...]) -> Iterator[Arrays]:
    """Calibration batches one at a time, with a word on what is wrong with them.

    Raises:
        ValueError: there is none, or one lacks an input.
    """
    found = False
    for batch in feeds:
        found = True
        missing = [name for name in inputs if name not in batch]
        if missing:
            raise ValueError(f"calibration batch lacks {missing}; it has {sorted(batch)}")
        yield {name: np.asarray(batch[name]) for name in inputs}
    if not found:
        raise ValueError("static quantization needs calibration data, and there is none")


def pieces(feeds: Iterable[Arrays], count: int) -> Iterator[Arrays]:
    """Batches cut into at most so many examples, where all inputs have the batch as their first axis."""
    for batch in feeds:
        total = _rows(batch)
        if not total:
            yield batch
        for start in range(0, total, count):
            yield {name: values[start : start + count] for name, values in batch.items()}


def open_watched(model: onnx.ModelProto, prepared: Path) -> Any:
    """A session of a graph that was given more outputs; its weights lie beside `prepared`."""
    watched = prepared.with_name("watched.onnx")
    onnx.save_model(model, watched)
    options = ort.SessionOptions()
    # What fuses operators does away with tensors that are to be seen.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # The arena would keep the most of every size that was ever asked for.
    options.enable_cpu_mem_arena = False
    # The order of the file. The default one runs all that lies between inputs and outputs before what else was asked for.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.log_severity_level = 3
    return ort.InferenceSession(str(watched), options, providers=["CPUExecutionProvider"])


def watch(prepared: Path, names: Sequence[str], feeds: Iterable[Feeds]) -> Iterator[Arrays]:
    """The values of float tensors, for a few examples at a time.

    Padding is left out: where there is an ``attention_mask`` (B, S), tensors of (B, S, K) come as rows (R, K). Batches are cut
    where all inputs have the batch as their first axis, so that memory depends on the model alone.

    Args:
        prepared: as `onnx_graph.prepare` makes it.
        names: of the tensors.
        feeds: read once, one at a time.

    Raises:
        ValueError: There is no calibration data, a batch lacks an input, or a tensor holds what is no finite number.
    """
    model = onnx.load(prepared, load_external_data=False)
    inputs = tuple(value.name for value in model.graph.input)
    known = {value.name for value in model.graph.output}
    made = [name for name in names if name not in inputs]
    # An input that is an output as well comes back as memory that is freed (microsoft/onnxruntime#21922).
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made if name not in known)
    session = open_watched(model, prepared)
    rows = 1
    for batch in checked(feeds, inputs):
        start, total = 0, _rows(batch)
        while start < max(total, 1):
            begin, stop = start, start + rows
            part = {name: values[start:stop] for name, values in batch.items()} if total else batch
            start = stop if total else 1  # what cannot be cut is run as it is, once
            found = dict(zip(made, session.run(made, part) if made else (), strict=True)) | {
                n: part[n] for n in names if n in part
            }
            for name, values in found.items():
                if not np.isfinite(values).all():
                    raise ValueError(f"{name}: is not finite on calibration data in float32; it cannot be quantized")
            own = sum(values.nbytes for values in found.values()) / max(min(stop, total) - begin, 1)
            rows = max(1, int(CHUNK_BYTES / max(own, 1)))
            yield {name: _unpadded(values, part.get(MASK)) for name, values in found.items()}


def _unpadded(values: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[Any]:
    """Rows (R, K) of tokens that count, of (B, S, K) where there is a mask (B, S); else all as they are."""
    if mask is None or values.ndim != 3 or values.shape[:2] != mask.shape:
        return values
    rows: NDArray[Any] = values[mask.astype(bool)]
    return rows


def _rows(batch: Arrays) -> int:
    """The length of the axis that all arrays begin with; 0 where they differ in it."""
    sizes = {len(values) if values.ndim else 0 for values in batch.values()}
    return sizes.pop() if len(sizes) == 1 else 0
