"""Post-training int8 quantization of ONNX files, dynamic and static.

Weights are int8, symmetric, one scale an output channel; activations are uint8, asymmetric, one scale a tensor. On
x86 with VNNI that is the only mix with fast kernels in ONNX Runtime. LayerNorm, Softmax and the products inside of
attention stay float.

x86 without VNNI adds two products of uint8 and int8 in 16 bits, which overflow: there weights must be of 7 bits
(`reduce_range`). Without it the embeddings of a SigLIP of base size with random weights lose a tenth of their cosine to
the float ones there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType

from mmcompress.environment import int8_saturates
from mmcompress.quantization import onnx_graph
from mmcompress.quantization.dynamic import OPS, write_dynamic
from mmcompress.quantization.merged import split_merged
from mmcompress.quantization.naming import is_meant, module_path, unmatched
from mmcompress.quantization.prepared import Prepared, prepared
from mmcompress.quantization.qdq import write_qdq
from mmcompress.quantization.ranges import Ranges, activations, ranges_of_prepared
from mmcompress.quantization.result import QuantizationResult
from mmcompress.quantization.stored import store_constants
from mmcompress.quantization.tied import share_integers
from mmcompress.quantization.watching import Feeds as Feeds


def quantize_dynamic_int8(
    source: Path | Prepared,
    target: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    per_channel: bool = True,
    reduce_range: bool | None = None,
    split: bool = False,
) -> QuantizationResult:
    """Int8 with activation ranges taken anew at every call: no calibration data, but ranges cost time.

    The range is of the whole batch, so an answer depends a little on what else is in its batch. Embedding tables are
    stored in int8, one scale a row, and so are kernels of convolutions; see `stored`.

    Args:
        source: Float file, as `export_component` writes it; prepared, where several files are made from it.
        target: Where to write.
        include: Patterns of module paths to quantize, all where there are none; see `naming.matches`.
        exclude: Patterns of module paths to leave float.
        per_channel: Whether weights have a scale for each output channel, or one for all.
        reduce_range: Whether weights take 7 bits; None where this processor needs it (x86 without VNNI).
        split: Whether a layer that makes queries, keys and values at once becomes three; see `merged`.

    Raises:
        ValueError: Nothing is left to quantize.
    """
    with prepared(source) as given:
        plan = _Plan.of(given.file(), given, OPS, include, exclude)
        if plan.chosen:
            narrow = int8_saturates() if reduce_range is None else reduce_range
            write_dynamic(given.file(), target, plan.excluded, per_channel=per_channel, reduce_range=narrow)
        else:
            onnx_graph.save(onnx.load(given.file()), target)
        return _finish(given, target, plan, split=split)


def quantize_static_int8(
    source: Path | Prepared,
    target: Path,
    calibration: Iterable[Feeds] | Ranges,
    *,
    outputs: bool = False,
    attention: bool = False,
    scores: bool = False,
    per_channel: bool = True,
    signed: bool = False,
    quantize_conv: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    reduce_range: bool | None = None,
    split: bool = False,
) -> QuantizationResult:
    """Int8 with activation ranges from calibration data, written as QDQ.

    Only inputs and weights of linear layers are quantized, so that ONNX Runtime multiplies integers and gives floats
    in one kernel (MatMulIntegerToFloat). Embedding tables are stored in int8, one scale a row.

    Args:
        source: Float file, as `export_component` writes it; prepared, where several files are made from it.
        target: Where to write.
        calibration: Batches, read once, one at a time; or what `collect_ranges` found in them, where several files are made.
        outputs: Whether to quantize the outputs of layers too. Slower on ONNX Runtime and less exact; for runtimes
            that want it.
        attention: Whether to quantize the products of two activations too, where ONNX Runtime quantizes their outputs as well.
        scores: Whether to quantize those of queries and keys, both as symmetric int8, and not those of what a softmax gives: what
            OpenVINO wants.
        per_channel: Whether weights have a scale for each output channel, or one for all.
        signed: Whether activations are int8, symmetric, instead of uint8.
        quantize_conv: Whether to quantize convolutions too. Those over patches become products of matrices; the others are
            quantized with their outputs, as only then there is an integer kernel for them. Turn it off where quality suffers.
        include: Patterns of module paths to quantize, all where there are none; see `naming.matches`.
        exclude: Patterns of module paths to leave float.
        reduce_range: Whether weights take 7 bits; None where this processor needs it (x86 without VNNI).
        split: Whether a layer that makes queries, keys and values at once becomes three; see `merged`.

    Raises:
        ValueError: There is no calibration data, a batch lacks an input, or nothing is left to quantize.
    """
    ops = (*OPS, "Conv") if quantize_conv else OPS
    with prepared(source) as given:
        file = given.file(patches=quantize_conv)
        plan = _Plan.of(file, given, ops, include, exclude)
        if not plan.chosen:
            onnx_graph.save(onnx.load(file), target)
            return _finish(given, target, plan, split=False)
        ranges = calibration if isinstance(calibration, Ranges) else ranges_of_prepared(file, calibration)
        own = plan.scores if scores else []
        nodes = [*plan.chosen, *(plan.products if attention else own)]
        graph = onnx.load(file, load_external_data=False)
        symmetric = activations(graph, own) if own else ()
        write_qdq(
            file,
            target,
            nodes,
            ranges.for_onnxruntime(signed, activations(graph, nodes), symmetric),
            symmetric=symmetric,
            per_channel=per_channel,
            reduce_range=int8_saturates() if reduce_range is None else reduce_range,
            activation=QuantType.QInt8 if signed else QuantType.QUInt8,
            options={
                "OpTypesToExcludeOutputQuantization": [] if outputs else ["MatMul", "Gemm"],
                "ActivationSymmetric": signed,
            },
        )
        return _finish(given, target, plan, nodes, own, kernels=quantize_conv, split=split)


@dataclass(frozen=True)
class _Plan:
    """Which nodes of a prepared file are to be quantized."""

    chosen: list[str]
    others: list[str]
    products: list[str]
    scores: list[str]
    excluded: list[str]
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    @classmethod
    def of(cls, file: Path, given: Prepared, ops: tuple[str, ...], include: Sequence[str], exclude: Sequence[str]) -> "_Plan":
        model = onnx.load(file, load_external_data=False)
        layers = onnx_graph.weighted_nodes(model)
        if not layers:  # nothing but tables (a component that only looks tokens up)
            return cls([], [], [], [], [], tuple(include), tuple(exclude))
        chosen = [node.name for node in layers if node.op_type in ops and is_meant(module_path(node.name), include, exclude)]
        if not chosen:
            raise ValueError(f"{given.source}: no {' or '.join(ops)} with a weight is left to quantize")
        others = [node.name for node in layers if node.name not in chosen]
        products = [node.name for node in onnx_graph.free_products(model)]
        weighing = onnx_graph.weighing_products(model)
        scores = [name for name in products if name not in weighing]
        return cls(chosen, others, products, scores, others + products, tuple(include), tuple(exclude))


def _finish(
    given: Prepared,
    target: Path,
    plan: _Plan,
    integer: Sequence[str] = (),
    early: Sequence[str] = (),
    *,
    kernels: bool = True,
    split: bool,
) -> QuantizationResult:
    """Shrinks the constants of a quantized file, and counts what is in it.

    Args:
        integer: names of the nodes that multiply integers.
        early: those of them whose inputs are rounded before they are moved about.
        kernels: whether those of convolutions that stay float are among the constants.
        split: whether merged layers are taken apart.
    """
    model = onnx.load(target)
    parts = split_merged(model) if split else {}
    if integer:
        integer = [*integer, *(name for names in parts.values() for name in names)]
        onnx_graph.spare_float_readers(model, set(integer))
    if early:
        onnx_graph.quantize_before_moves(model, set(early))
    before = {node.name for node in model.graph.node if node.op_type == "Gather"}
    names = [*plan.chosen, *plan.others, *before]
    replaced = share_integers(model, plan.include, plan.exclude)
    replaced += onnx_graph.quantize_tables(model, plan.exclude, plan.include)
    replaced += store_constants(model, plan.include, plan.exclude, float_bytes=given.float_bytes, kernels=kernels)
    onnx_graph.share_zero_points(model)
    del model.graph.value_info[:]  # runtimes infer them, and know better after what was done here
    onnx_graph.save(model, target)
    Path(f"{target}.data").unlink(missing_ok=True)  # ONNX Runtime's own name for the weights of large models
    # The dynamic quantizer renames the Gemm nodes that it turns into MatMul.
    float_names = {node.name.removesuffix("_MatMul") for node in onnx_graph.weighted_nodes(model)}
    return QuantizationResult(
        bytes_before=given.float_bytes,
        bytes_after=onnx_graph.file_bytes(target),
        quantized=tuple(name for name in plan.chosen if name not in float_names),
        left_float=tuple(name for name in (*plan.chosen, *plan.others) if name in float_names),
        float_products=len(onnx_graph.free_products(model)),
        tables=replaced,
        unmatched_exclude=unmatched([module_path(name) for name in names], (*plan.include, *plan.exclude)),
        op_counts=onnx_graph.op_counts(model),
    )
