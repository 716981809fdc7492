"""Second moments of the inputs of layers, from calibration data, in memory that does not grow with the data.

Shapes: R rows (tokens of all examples), K inputs of a layer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.blocks import Floats

MOST_BYTES = 1_000_000_000
"""Of moments that are held at a time; where the layers' are more, the calibration data is read again for the next ones."""
MASK = "attention_mask"

Feeds = Mapping[str, NDArray[Any]]


@dataclass
class Moments:
    """What is known of one layer's inputs.

    Attributes:
        product: X^T X, (K, K), float32.
        size: sum of |X| over the rows, (K,).
        rows: R.
    """

    product: Floats
    size: Floats
    rows: int = 0

    @classmethod
    def empty(cls, inputs: int) -> "Moments":
        """Of no rows."""
        return cls(np.zeros((inputs, inputs), dtype=np.float32), np.zeros(inputs, dtype=np.float64))

    def add(self, rows: Floats) -> None:
        """Takes rows (R, K) in."""
        self.product += rows.T @ rows
        self.size += np.abs(rows).sum(axis=0, dtype=np.float64)
        self.rows += len(rows)


def stream(
    model: onnx.ModelProto, wanted: Mapping[str, int], feeds: Callable[[], Iterable[Feeds]], most_bytes: int = MOST_BYTES
) -> Iterator[tuple[str, Moments]]:
    """The moments of tensors, one after the other.

    Padding is left out: where a batch has an ``attention_mask`` (B, S), tensors of (B, S, K) count by it.

    Args:
        model: float; stays as it is.
        wanted: the last axis of each tensor whose moments are wanted, by its name.
        feeds: gives the calibration batches, each time anew.
        most_bytes: of moments that are held at a time; those of one tensor at least.

    Raises:
        ValueError: there is no calibration data, or a batch lacks an input of the graph.
    """
    group: dict[str, int] = {}
    for name, inputs in wanted.items():
        if group and 4 * sum(k * k for k in (*group.values(), inputs)) > most_bytes:
            yield from _pass(model, group, feeds)
            group = {}
        group[name] = inputs
    if group:
        yield from _pass(model, group, feeds)


def _pass(
    model: onnx.ModelProto, group: Mapping[str, int], feeds: Callable[[], Iterable[Feeds]]
) -> Iterator[tuple[str, Moments]]:
    found = {name: Moments.empty(inputs) for name, inputs in group.items()}
    graph_inputs = {value.name for value in model.graph.input}
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        session = _watching(model, list(group), Path(scratch) / "watched.onnx")
        inside = [name for name in group if name not in graph_inputs]
        for batch in feeds():
            if missing := sorted(graph_inputs - set(batch)):
                raise ValueError(f"calibration batch lacks {missing}; it has {sorted(batch)}")
            given = {name: np.asarray(values) for name, values in batch.items() if name in graph_inputs}
            seen = dict(zip(inside, session.run(inside, given), strict=True)) if inside else {}
            for name, moments in found.items():
                moments.add(_rows(seen.get(name, given.get(name)), given.get(MASK)))
    if not next(iter(found.values())).rows:
        raise ValueError("GPTQ and AWQ need calibration data, and there is none")
    while found:
        name = next(iter(found))
        yield name, found.pop(name)


def _watching(model: onnx.ModelProto, tensors: Sequence[str], path: Path) -> ort.InferenceSession:
    """A session whose outputs are these tensors; in them, ONNX Runtime may fuse nothing away."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    have = {value.name for value in (*model.graph.input, *model.graph.output)}
    new = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors if name not in have)
    watched.graph.output.extend(new)
    onnx_graph.save(watched, path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _rows(values: Any, mask: NDArray[Any] | None) -> Floats:
    found: Floats = np.asarray(values)
    if mask is not None and found.ndim == 3 and found.shape[:2] == mask.shape:
        found = found[mask.astype(bool)]
    return found.reshape(-1, found.shape[-1])
