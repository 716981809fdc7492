"""Writes an ONNX file tensor by tensor.

Protobuf's own serialization holds the whole file in memory once more, and an exporter's another time; here it is one tensor.
The bytes are those of a ModelProto like any other: a message is its fields in any order, and each initializer is a field of
the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnx

_BYTES = 2
"""Protobuf's wire type of fields that hold bytes or a message."""


def write_model(model: onnx.ModelProto, tensors: Callable[[], Iterable[onnx.TensorProto]], path: Path) -> None:
    """Writes a model in one file.

    Args:
        model: What to write; initializers of its own are left out.
        tensors: Gives the initializers, the same each time; called twice, as a message begins with its length.
        path: Where to write.
    """
    graph = without(model.graph, "initializer").SerializeToString()
    each = _tag(onnx.GraphProto, "initializer")
    lengths = [tensor.ByteSize() for tensor in tensors()]
    total = len(graph) + sum(len(each) + len(_varint(length)) + length for length in lengths)
    with path.open("wb") as file:
        file.write(without(model, "graph").SerializeToString())
        file.write(_tag(onnx.ModelProto, "graph") + _varint(total) + graph)
        for tensor, length in zip(tensors(), lengths, strict=True):
            file.write(each + _varint(length))
            file.write(tensor.SerializeToString())


def without(message: Any, field: str) -> Any:
    """A copy of a protobuf message that lacks one field, which is not copied on the way."""
    copy = type(message)()
    for descriptor, value in message.ListFields():
        if descriptor.name == field:
            continue
        if hasattr(value, "extend"):
            getattr(copy, descriptor.name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(copy, descriptor.name).CopyFrom(value)
        else:
            setattr(copy, descriptor.name, value)
    return copy


def _tag(message: Any, field: str) -> bytes:
    number = message.DESCRIPTOR.fields_by_name[field].number
    return _varint(number << 3 | _BYTES)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says whether more follow."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)
