"""One graph in which each layer is int8 or float by a switch: what any choice of layers does is one call, without a new file.

It is made from an int8 file in QDQ form. A layer becomes an ``If``: one branch has the file's rounded input and weight, the other
the float ones. Integers are multiplied as the floats that they stand for, which is what integer kernels compute but for the order
of additions.

Shapes: L layers that can be switched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.graph_edit import GraphEdit
from mmcompress.quantization.naming import module_path
from mmcompress.quantization.tied import fold_transposed
from mmcompress.quantization.watching import Arrays, Feeds
from mmcompress.runtimes.decoding import PAST
from mmcompress.runtimes.onnx_predict import open_session

SWITCHES = "int8_layers"


class Switchboard:
    """A component whose layers are int8 or float as each call says.

    Attributes:
        layers: module paths of the layers that can be switched, in the graph's order.
    """

    def __init__(self, source: Path, quantized: Path) -> None:
        """Makes the graph.

        Args:
            source: Float file that ``quantized`` was made from.
            quantized: File that `quantize_static_int8` wrote.

        Raises:
            ValueError: No layer of it can be switched.
        """
        with TemporaryDirectory(prefix="mmcompress-") as scratch:
            folder = Path(scratch)
            onnx_graph.prepare(source, folder / "prepared.onnx")
            model = onnx.load(folder / "prepared.onnx")
            nodes = {node.name: node for node in model.graph.node}
            weights = {tensor.name: tensor for tensor in model.graph.initializer}
            edit = GraphEdit(onnx.load(quantized))
            fold_transposed(edit)
            found = [one for node in list(edit.nodes) if (one := _switched(edit, node, nodes, weights)) is not None]
            if not found:
                raise ValueError(f"{quantized}: has no layer that can be switched between int8 and float")
            self.layers = tuple(dict.fromkeys(found))
            self._wire(edit)
            edit.finish()
            onnx_graph.save(edit.model, folder / "switched.onnx")
            self._session = open_session(folder / "switched.onnx")
        self._inputs = tuple(one.name for one in self._session.get_inputs() if one.name != SWITCHES)
        self._outputs = [one.name for one in self._session.get_outputs()]

    def _wire(self, edit: GraphEdit) -> None:
        """The input of switches, and for each layer the one that is its own."""
        kind = helper.make_tensor_value_info(SWITCHES, TensorProto.BOOL, [len(self.layers)])
        edit.model.graph.input.append(kind)
        gathers = []
        for place, layer in enumerate(self.layers):
            index = edit.add(f"{SWITCHES}/{place}", np.array(place, dtype=np.int64))
            gathers.append(helper.make_node("Gather", [SWITCHES, index], [f"{SWITCHES}/{layer}"], f"{SWITCHES}/{place}/Gather"))
        edit.nodes = [*gathers, *edit.nodes]

    def __call__(self, inputs: Feeds, int8: Collection[str]) -> Arrays:
        """All outputs by name.

        Args:
            inputs: those that the graph does not read are ignored.
            int8: the layers that are int8; the others are float.
        """
        chosen = set(int8)
        given: dict[str, NDArray[Any]] = {name: np.ascontiguousarray(inputs[name]) for name in self._inputs}
        given[SWITCHES] = np.array([layer in chosen for layer in self.layers])
        return dict(zip(self._outputs, self._session.run(self._outputs, given), strict=True))

    def cache(self) -> Mapping[str, tuple[int, int]]:
        """As `Predict.cache` has it."""
        inputs = self._session.get_inputs()
        return {one.name: (int(one.shape[1]), int(one.shape[3])) for one in inputs if one.name.startswith(PAST)}

    def distances(self, feeds: Iterable[Feeds]) -> dict[str, float]:
        """For each layer how far the first output moves if it alone is int8: 1 less the mean cosine of rows to the float ones.

        Args:
            feeds: a few calibration batches, held in memory.
        """
        batches = list(feeds)
        wanted = [self._rows(batch, ()) for batch in batches]
        found = {}
        for layer in self.layers:
            cosines = [_cosines(self._rows(batch, (layer,)), rows) for batch, rows in zip(batches, wanted, strict=True)]
            found[layer] = float(1 - np.concatenate(cosines).mean())
        return found

    def _rows(self, batch: Feeds, int8: Collection[str]) -> NDArray[np.float64]:
        first = self(batch, int8)[self._outputs[0]]
        return first.reshape(-1, first.shape[-1]).astype(np.float64)


def _switched(
    edit: GraphEdit,
    node: onnx.NodeProto,
    nodes: Mapping[str, onnx.NodeProto],
    weights: Mapping[str, onnx.TensorProto],
) -> str | None:
    """Puts an ``If`` in the place of an int8 layer; its module path, or None where it is none."""
    if node.op_type not in ("MatMul", "Gemm") or node.name not in nodes:
        return None
    back, weight = edit.maker(node.input[0], "DequantizeLinear"), edit.maker(node.input[1], "DequantizeLinear")
    there = edit.maker(back.input[0], "QuantizeLinear") if back is not None else None
    plain = nodes[node.name].input[1]
    if there is None or weight is None or weight.input[0] not in edit.weights or plain not in weights:
        return None
    layer = module_path(node.name)
    rounded = edit.add(f"{node.name}/rounded", _dequantized(edit, weight))
    whole = edit.add(f"{node.name}/float", numpy_helper.to_array(weights[plain]))
    branches = {}
    for name, inputs in (("then_branch", [node.input[0], rounded]), ("else_branch", [there.input[0], whole])):
        own = edit.copy(node)
        own.name, own.output[0] = f"{node.name}/{name}", f"{node.output[0]}/{name}"
        own.input[0], own.input[1] = inputs
        out = helper.make_tensor_value_info(own.output[0], TensorProto.FLOAT, None)
        branches[name] = helper.make_graph([own], f"{node.name}/{name}", [], [out])
    new = helper.make_node("If", [f"{SWITCHES}/{layer}"], [node.output[0]], f"{node.name}/If", **branches)
    edit.replace([node], [new])
    return layer


def _dequantized(edit: GraphEdit, node: onnx.NodeProto) -> NDArray[np.float32]:
    values = edit.array(node.input[0]).astype(np.float32)
    scale = edit.array(node.input[1])
    shape = [1] * values.ndim
    if scale.ndim:
        shape[edit.attribute(node, "axis", 1)] = -1
    zero = edit.array(node.input[2]).astype(np.float32) if len(node.input) > 2 else np.zeros_like(scale)
    found: NDArray[np.float32] = (values - zero.reshape(shape)) * scale.reshape(shape)
    return found


def _cosines(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    found: NDArray[np.float64] = np.where(norms > 1e-12, (ours * theirs).sum(-1) / np.maximum(norms, 1e-12), 1.0)
    return found
