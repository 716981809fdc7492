"""Int8 graphs in ONNX Runtime's own fused operators: what stands between an int8 file and the arithmetic limit.

In a QDQ file ONNX Runtime finds MatMulIntegerToFloat by itself, but adds biases in nodes of their own, transposes queries, keys
and values, and hands zero points of weights to kernels that then sum rows for nothing. Here biases go into the products, three
projections and the attention behind them become one QAttention, and zero points that are all 0 go.

The files are for ONNX Runtime (and what is built on it, such as transformers.js) alone: other runtimes do not know these
operators. The numbers are those of the QDQ file's kernels.

Shapes: K inputs, N outputs of a layer; B examples, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.graph_edit import GraphEdit
from mmcompress.quantization.tied import share_transposed

MICROSOFT = "com.microsoft"
MASKED = -1e4
"""Scores of what is masked are at most this, so that nothing of it is left after Softmax."""
BIAS_INPUT = {"MatMulIntegerToFloat": 6, "DynamicQuantizeMatMul": 4}
ZERO_POINT_INPUT = {"MatMulIntegerToFloat": 5, "DynamicQuantizeMatMul": 3, "QAttention": 7}


@dataclass(frozen=True)
class Fused:
    """How often each fusion was found.

    Attributes:
        biases: additions that went into a product.
        attentions: attention blocks that became one node.
        zero_points: weights whose zero points were all 0.
    """

    biases: int
    attentions: int
    zero_points: int


def fuse(source: Path, target: Path) -> Fused:
    """Rewrites an int8 file, static (QDQ) or dynamic, in fused operators.

    Raises:
        ValueError: the file's weights lie beside it (it is larger than protobuf allows).
    """
    if onnx_graph.is_large(source):
        raise ValueError(f"{source}: files with their weights beside them are not fused")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(target)
    # Not ORT_ENABLE_ALL: what comes after this level fits this machine alone.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    model = onnx.load(target)
    edit = GraphEdit(model)
    found = Fused(_biases(edit), _attentions(edit), _zero_points(edit))
    edit.finish()
    share_transposed(model)
    used = {node.domain for node in model.graph.node}
    versions = [one for one in model.opset_import if one.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(versions)
    onnx_graph.save(model, target)
    return found


def _biases(edit: GraphEdit) -> int:
    count = 0
    for node in list(edit.nodes):
        place = BIAS_INPUT.get(node.op_type)
        if place is None or len(node.input) > place:
            continue
        addition = edit.only_reader(node.output[0], "Add")
        others = [name for name in addition.input if name != node.output[0]] if addition is not None else []
        if addition is None or len(others) != 1 or others[0] not in edit.weights or len(edit.weights[others[0]].dims) != 1:
            continue
        new = edit.copy(node)
        new.input.extend([""] * (place - len(new.input)) + others)
        new.output[0] = addition.output[0]
        edit.replace([node, addition], [new])
        count += 1
    return count


@dataclass(frozen=True)
class _Block:
    """The nodes of one attention block.

    Attributes:
        projections: MatMulIntegerToFloat of queries, keys and values, all of one input.
        inner: everything from them to the last Reshape.
        output: what the block gives, (B, S, N), in float or already quantized.
        quantizer: QuantizeLinear that ONNX Runtime moved into the block, or None.
        heads: how many.
        mask: what is True where a token may be looked at, (B, 1, S, S) or what can be spread to it; empty where all may.
        filter: the score of what is masked.
    """

    projections: list[onnx.NodeProto]
    inner: list[onnx.NodeProto]
    output: str
    quantizer: onnx.NodeProto | None
    heads: int
    mask: str = ""
    filter: float = MASKED


def _attentions(edit: GraphEdit) -> int:
    count = 0
    masks: dict[str, str] = {}
    for softmax in [node for node in edit.nodes if node.op_type == "Softmax"]:
        block = _block(edit, softmax)
        if block is None:
            continue
        first = block.projections[0]
        width = [edit.weights[one.input[1]].dims[1] for one in block.projections]

        def joined(place: int, name: str, block: _Block = block, width: list[int] = width) -> str:
            # A projection without bias gets one of zeros: Whisper's keys have none.
            parts = [
                np.broadcast_to(edit.array(p.input[place]), (w,)) if place < len(p.input) else np.zeros(w, np.float32)
                for p, w in zip(block.projections, width, strict=True)
            ]
            return edit.add(f"{softmax.name}.{name}", np.concatenate(parts))  # noqa: B023  (called within the round)

        weight = np.concatenate([edit.array(one.input[1]) for one in block.projections], axis=1)
        inputs = [first.input[0], edit.add(f"{softmax.name}.weight", weight), joined(6, "bias"), first.input[2]]
        inputs += [joined(3, "scale"), "", first.input[4], joined(5, "zero_point")]
        new: list[onnx.NodeProto] = []
        if block.mask:
            if block.mask not in masks:
                masks[block.mask], new = _integer_mask(edit, block.mask, first.input[0])
            inputs[5] = masks[block.mask]
        output = block.output if block.quantizer is None else f"{block.output}.float"
        name = softmax.name.replace("Softmax", "QAttention")
        given = {"num_heads": block.heads, **({"mask_filter_value": block.filter} if block.mask else {})}
        new.append(helper.make_node("QAttention", inputs, [output], name, domain=MICROSOFT, **given))
        if block.quantizer is not None:
            quantizer = edit.copy(block.quantizer)
            quantizer.input[0], quantizer.output[0] = output, block.output
            new.append(quantizer)
        edit.replace([*block.projections, *block.inner], new)
        count += 1
    return count


def _integer_mask(edit: GraphEdit, mask: str, rows: str) -> tuple[str, list[onnx.NodeProto]]:
    """A mask as QAttention takes it, (B, S, S) in int32, and the nodes that make it; ``rows`` is of (B, S, K)."""
    stem = f"{mask}.attention"

    def number(label: str, values: list[int]) -> str:
        return edit.add(f"{stem}.{label}", np.asarray(values, dtype=np.int64))

    nodes = [
        helper.make_node("Shape", [rows], [f"{stem}.shape"], f"{stem}/Shape"),
        helper.make_node("Gather", [f"{stem}.shape", number("first", [0])], [f"{stem}.b"], f"{stem}/Gather_1"),
        helper.make_node("Gather", [f"{stem}.shape", number("twice", [1, 1])], [f"{stem}.ss"], f"{stem}/Gather_2"),
        helper.make_node("Concat", [f"{stem}.b", number("one", [1]), f"{stem}.ss"], [f"{stem}.b1ss"], f"{stem}/Concat", axis=0),
        helper.make_node("Expand", [mask, f"{stem}.b1ss"], [f"{stem}.whole"], f"{stem}/Expand"),
        helper.make_node("Squeeze", [f"{stem}.whole", number("axis", [1])], [f"{stem}.flat"], f"{stem}/Squeeze"),
        helper.make_node("Cast", [f"{stem}.flat"], [f"{stem}.integers"], f"{stem}/Cast", to=onnx.TensorProto.INT32),
    ]
    return f"{stem}.integers", nodes


def _masked(edit: GraphEdit, addition: onnx.NodeProto | None) -> tuple[str, float, str] | None:
    """Of Add(scores, Where(mask, 0, very little)): mask, the very little, and the scores."""
    if addition is None:
        return None
    for scores, other in (tuple(addition.input), tuple(reversed(addition.input))):
        chosen = edit.maker(other, "Where")
        if chosen is None or any(name not in edit.weights for name in chosen.input[1:]):
            continue
        zero, little = (edit.array(name) for name in chosen.input[1:])
        if zero.size == little.size == 1 and not zero.any() and float(little.reshape(())) <= MASKED:
            return chosen.input[0], float(little.reshape(())), scores
    return None


def _unscaled(edit: GraphEdit, name: str) -> tuple[str, float, onnx.NodeProto | None]:
    """What a value is a multiple of, the number that it is multiplied with, and the node that does it, if one does."""
    node = edit.maker(name, "Mul")
    for value, factor in () if node is None else (tuple(node.input), tuple(reversed(node.input))):
        if factor in edit.weights and edit.array(factor).size == 1:
            return value, float(edit.array(factor).reshape(())), node
    return name, 1.0, None


def _head_size(edit: GraphEdit, shape: str, width: int) -> int:
    """The last of the four numbers that N = ``width`` is folded into, which must be constant; 0 where it is not."""
    if shape in edit.weights:
        size = int(edit.array(shape)[-1]) if edit.weights[shape].dims == [4] else 0
    else:
        parts = edit.maker(shape, "Concat")
        last = parts.input[-1] if parts is not None and len(parts.input) == 4 else ""
        size = int(edit.array(last).reshape(-1)[-1]) if last in edit.weights else 0
    return size if size > 0 and width % size == 0 else 0


def _block(edit: GraphEdit, softmax: onnx.NodeProto) -> _Block | None:
    """The block around a Softmax, if it is scaled by the root of the head's size as QAttention is, with or without a mask."""
    addition = edit.maker(softmax.input[0], "Add")
    masked = _masked(edit, addition)
    mask, little, scored = masked if masked is not None else ("", MASKED, softmax.input[0])
    scores = edit.maker(scored, "FusedMatMul", "MatMul")
    values = edit.only_reader(softmax.output[0], "MatMul")
    if scores is None or values is None or edit.attribute(softmax, "axis", -1) not in (-1, 3):
        return None
    turns = [edit.maker(name, "Transpose") for name in (*scores.input, values.input[1])]
    shapes = [edit.maker(turn.input[0], "Reshape") for turn in turns if turn is not None]
    made = [_unscaled(edit, shape.input[0]) for shape in shapes if shape is not None]
    projections = [edit.maker(name, "MatMulIntegerToFloat") for name, _, _ in made]
    alpha = edit.attribute(scores, "alpha", 1.0) * float(np.prod([factor for _, factor, _ in made[:2]]))
    quantizer = edit.only_reader(values.output[0], "QuantizeLinear")
    back = edit.only_reader((quantizer or values).output[0], "Transpose")
    flat = edit.only_reader(back.output[0], "Reshape") if back is not None else None
    if back is None or flat is None or len(projections) != 3 or made[2][2] is not None:
        return None
    complete = [one for one in projections if one is not None and len(one.input) > ZERO_POINT_INPUT["MatMulIntegerToFloat"]]
    if len(complete) != 3 or len({(one.input[0], one.input[2], one.input[4]) for one in complete}) != 1:
        return None
    orders = [list(edit.attribute(turn, "perm")) for turn in (*turns, back) if turn is not None]
    if orders != [[0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3], [0, 2, 1, 3]]:
        return None
    widths = {edit.weights[one.input[1]].dims[1] for one in complete}
    sizes = {_head_size(edit, shape.input[1], max(widths)) for shape in shapes if shape is not None}
    size = sizes.pop()
    if sizes or len(widths) != 1 or not size or not np.isclose(alpha, size**-0.5, rtol=1e-5):
        return None
    inner = [softmax, scores, values, back, flat, *(n for n in (*turns, *shapes, quantizer) if n is not None)]
    inner += [node for _, _, node in made if node is not None]
    inner += [addition] if masked is not None and addition is not None else []
    used_once = all(len(edit.readers.get(n.output[0], [])) == 1 for n in (*complete, *inner) if n is not flat)
    if not used_once:
        return None
    return _Block(complete, inner, flat.output[0], quantizer, widths.pop() // size, mask, little)


def _zero_points(edit: GraphEdit) -> int:
    count = 0
    for node in edit.nodes:
        place = ZERO_POINT_INPUT.get(node.op_type, 0)
        name = node.input[place] if 0 < place < len(node.input) else ""
        if name in edit.weights and not edit.array(name).any():
            node.input[place] = ""
            while not node.input[-1]:
                del node.input[-1]
            count += 1
    return count
