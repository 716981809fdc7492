"""The linear layers of a float graph, and what 8 bits do to them, in numpy.

Shapes: R rows (tokens of all examples), K inputs, N outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.graph_edit import GraphEdit

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Linear:
    """A product with a constant weight.

    Attributes:
        node: MatMul or Gemm.
        given: name of its input.
        weight: name of its weight.
        turned: whether the weight is (N, K) instead of (K, N).
        bias: name of what is added to its output, (N,); empty where there is none.
    """

    node: onnx.NodeProto
    given: str
    weight: str
    turned: bool
    bias: str

    def matrix(self, edit: GraphEdit) -> Floats:
        """The weight as (K, N)."""
        values = edit.array(self.weight)
        return values.T if self.turned else values

    def put_bias(self, edit: GraphEdit, values: Floats) -> None:
        """Sets the bias, (N,)."""
        node = self.node if self.node.op_type == "Gemm" else edit.only_reader(self.node.output[0], "Add")
        if node is None or not self.bias:
            raise ValueError(f"{self.node.name}: has no bias")
        set_input(edit, node, list(node.input).index(self.bias), values)

    def put(self, edit: GraphEdit, matrix: Floats) -> None:
        """Sets the weight from (K, N)."""
        set_weight(edit, self.weight, matrix.T if self.turned else matrix)


def linears(edit: GraphEdit) -> list[Linear]:
    """The linear layers of a graph in its order; those whose weight is read elsewhere as well are left out."""
    found = []
    for node in edit.nodes:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in edit.weights or node.input[0] in edit.weights:
            continue
        weight = edit.weights[node.input[1]]
        plain = all(edit.attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta")) and not edit.attribute(
            node, "transA", 0
        )
        if len(weight.dims) != 2 or not plain or len(edit.readers[node.input[1]]) != 1:
            continue
        bias = (node.input[2] if len(node.input) > 2 else "") if node.op_type == "Gemm" else _added(edit, node)
        if bias and (bias not in edit.weights or len(edit.weights[bias].dims) != 1):
            bias = ""
        found.append(Linear(node, node.input[0], node.input[1], bool(edit.attribute(node, "transB", 0)), bias))
    return found


def _added(edit: GraphEdit, node: onnx.NodeProto) -> str:
    addition = edit.only_reader(node.output[0], "Add")
    others = [name for name in addition.input if name != node.output[0]] if addition is not None else []
    return others[0] if len(others) == 1 else ""


def set_weight(edit: GraphEdit, name: str, values: Floats) -> None:
    """Replaces a weight's numbers by others of the same shape."""
    edit.add(name, np.asarray(values, dtype=np.float32))


def set_input(edit: GraphEdit, node: onnx.NodeProto, place: int, values: Floats) -> None:
    """Replaces the numbers of one weight that a node reads; other nodes that read the same one keep it as it is."""
    name = node.input[place]
    if len(edit.readers[name]) > 1:  # equal weights are one in the file
        edit.readers[name] = [one for one in edit.readers[name] if one is not node]
        name = f"{node.name}.{place}"
        edit.readers[name] = [node]
        node.input[place] = name
    set_weight(edit, name, values)


@contextmanager
def edited(source: Path, target: Path) -> Iterator[tuple[GraphEdit, Path]]:
    """A float graph to be changed, and the prepared file with its weights as they are; written to ``target`` when done."""
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        onnx_graph.prepare(source, prepared, patches=False, rows=False)
        edit = GraphEdit(onnx.load(prepared))
        yield edit, prepared
        edit.finish()
        onnx_graph.save(edit.model, target)


def rounded_weight(weight: Floats, narrow: bool = False) -> Floats:
    """(K, N) as int8 makes it: symmetric, one scale for each output; in 7 bits where ``narrow``."""
    most = 64 if narrow else 127
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest > 0, largest / most, 1.0)
    found: Floats = np.clip(np.rint(weight / scale), -most, most) * scale
    return found


def rounded_input(values: Floats, low: float, high: float, signed: bool = False) -> Floats:
    """Values as uint8 (or symmetric int8) makes them, with one scale and 0 among the integers."""
    if signed:
        scale = max(abs(low), abs(high)) / 127 or 1.0
        found: Floats = np.clip(np.rint(values / scale), -127, 127) * scale
        return found
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    zero = np.rint(-low / scale)
    found = np.clip(np.rint(values / scale) + zero, 0, 255) - zero
    found *= scale
    return found
