"""A graph's nodes as a list that can be rewritten, with an index of who makes and who reads each value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


class GraphEdit:
    """Edits of one graph; `finish` writes them back."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = [self.copy(node) for node in model.graph.node]
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._outputs = {value.name for value in model.graph.output}
        self._index()

    @staticmethod
    def copy(node: onnx.NodeProto) -> onnx.NodeProto:
        """A node of its own."""
        new = onnx.NodeProto()
        new.CopyFrom(node)
        return new

    def _index(self) -> None:
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in reads(node):
                self.readers.setdefault(name, []).append(node)

    def only_reader(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The one node that reads a value which is no output, if it is of these kinds."""
        readers = self.readers.get(name, [])
        if len(readers) != 1 or name in self._outputs or readers[0].op_type not in kinds:
            return None
        return readers[0]

    def is_output(self, name: str) -> bool:
        """Whether a value is one of the graph's outputs."""
        return name in self._outputs

    def maker(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The node that makes a value, if it is of these kinds."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type in kinds else None

    def array(self, name: str) -> NDArray[Any]:
        """A weight's numbers."""
        found: NDArray[Any] = numpy_helper.to_array(self.weights[name])
        return found

    def attribute(self, node: onnx.NodeProto, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)

    def add(self, name: str, values: NDArray[Any]) -> str:
        """A new weight."""
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)
        return name

    def replace(self, old: Iterable[onnx.NodeProto], new: Sequence[onnx.NodeProto]) -> None:
        """Puts nodes in the place of others, where the last of those stood."""
        gone = {id(node) for node in old}
        last = max(i for i, node in enumerate(self.nodes) if id(node) in gone)
        kept = [node for node in self.nodes[: last + 1] if id(node) not in gone]
        self.nodes = [*kept, *new, *self.nodes[last + 1 :]]
        self._index()

    def finish(self) -> None:
        """Sorts the nodes so that each comes after those it reads, and drops weights that none does."""
        known = {value.name for value in self.model.graph.input} | set(self.weights) | {""}
        left, ordered = self.nodes, []
        while left:
            waiting = []
            for node in left:
                if all(name in known for name in reads(node)):
                    ordered.append(node)
                    known.update(node.output)
                else:
                    waiting.append(node)
            if len(waiting) == len(left):
                raise ValueError(f"the graph has a circle through {waiting[0].name}")
            left = waiting
        used = {name for node in ordered for name in reads(node)} | self._outputs
        graph = self.model.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(ordered)
        graph.initializer.extend(tensor for name, tensor in self.weights.items() if name in used)


def reads(node: onnx.NodeProto) -> list[str]:
    """The values that a node reads, those of the graph around it in its branches too."""
    names = list(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            made = {name for inner in attribute.g.node for name in inner.output}
            names += [name for inner in attribute.g.node for name in reads(inner) if name not in made]
    return names
