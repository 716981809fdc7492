"""The ways to place int8 in a graph, as data: which of them is fastest depends on the model, the processor and the runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import onnx

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.fusing import fuse
from mmcompress.quantization.prepared import Prepared
from mmcompress.quantization.ptq import quantize_dynamic_int8, quantize_static_int8
from mmcompress.quantization.ranges import Feeds, Ranges
from mmcompress.quantization.result import QuantizationResult
from mmcompress.quantization.schemes import ArrangementName


@dataclass(frozen=True)
class Arrangement:
    """One way to place int8.

    Attributes:
        ranges: of activations: from calibration, or taken at run time.
        outputs: whether the outputs of layers are quantized too.
        attention: whether the products of queries, keys and values are.
        scores: whether those of queries and keys are, and those with the values are not.
        conv: whether convolutions are.
        per_channel: whether weights have a scale for each output channel.
        signed: whether activations are int8 instead of uint8.
        fused: whether the graph is rewritten in ONNX Runtime's own operators; then no other runtime runs it.
    """

    ranges: Literal["calibration", "run time"] = "calibration"
    outputs: bool = False
    attention: bool = False
    scores: bool = False
    conv: bool = True
    per_channel: bool = True
    signed: bool = False
    fused: bool = False


ARRANGEMENTS: dict[ArrangementName, Arrangement] = {
    "static": Arrangement(),
    "static-fused": Arrangement(fused=True),
    "static-outputs": Arrangement(outputs=True),
    "static-attention": Arrangement(attention=True),
    "static-scores": Arrangement(scores=True),
    "static-scores-per-tensor": Arrangement(scores=True, per_channel=False),
    "static-conv-float": Arrangement(conv=False),
    "static-per-tensor": Arrangement(per_channel=False),
    "static-per-tensor-fused": Arrangement(per_channel=False, fused=True),
    "static-signed": Arrangement(signed=True),
    "dynamic": Arrangement(ranges="run time"),
    "dynamic-fused": Arrangement(ranges="run time", fused=True),
    "dynamic-per-tensor": Arrangement(ranges="run time", per_channel=False),
    "dynamic-per-tensor-fused": Arrangement(ranges="run time", per_channel=False, fused=True),
}
"""By name, as recipes and reports have them."""


def candidates(scheme: str, runtime: str = "onnxruntime") -> tuple[ArrangementName, ...]:
    """The arrangements that a scheme leaves open in a runtime: all, or those that need no data.

    OpenVINO runs no operators of ONNX Runtime's own, and takes attention for one product only where its scores are made of
    signed integers, for which ONNX Runtime has no kernel that is worth it.
    """
    found = [name for name, one in ARRANGEMENTS.items() if scheme == "int8-static" or one.ranges == "run time"]
    own = [name for name in found if ARRANGEMENTS[name].scores] if runtime == "onnxruntime" else []
    fused = [name for name in found if ARRANGEMENTS[name].fused] if runtime != "onnxruntime" else []
    return tuple(name for name in found if name not in (*own, *fused))


def plain(name: ArrangementName) -> ArrangementName:
    """The arrangement that a fused one is made from; of others the name itself."""
    unfused = replace(ARRANGEMENTS[name], fused=False)
    return next(other for other, one in ARRANGEMENTS.items() if one == unfused)


def arrange(
    name: ArrangementName,
    source: Path | Prepared,
    target: Path,
    feeds: Callable[[], Iterable[Feeds] | Ranges],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    reduce_range: bool | None = None,
) -> QuantizationResult:
    """Quantizes a file by one arrangement.

    Args:
        name: One of ``ARRANGEMENTS``.
        source: Float file, as `export_component` writes it; prepared, where several files are made from it.
        target: Where to write.
        feeds: Gives calibration batches, or the ranges found in them; asked only where ranges come from calibration.
        include: Patterns of module paths to quantize, all where there are none; see `naming.matches`.
        exclude: Patterns of module paths to leave float.
        reduce_range: Whether weights take 7 bits; None where this processor needs it.

    Raises:
        ValueError: There is no calibration data, nothing is left to quantize, or the file is too large to be fused.
    """
    chosen = ARRANGEMENTS[name]
    if chosen.fused:
        with TemporaryDirectory(prefix="mmcompress-") as scratch:
            middle = Path(scratch) / "plain.onnx"
            found = arrange(plain(name), source, middle, feeds, include=include, exclude=exclude, reduce_range=reduce_range)
            return fused(middle, target, found)
    if chosen.ranges == "run time":
        return quantize_dynamic_int8(
            source,
            target,
            include=include,
            exclude=exclude,
            per_channel=chosen.per_channel,
            reduce_range=reduce_range,
            split=True,
        )
    return quantize_static_int8(
        source,
        target,
        feeds(),
        outputs=chosen.outputs,
        attention=chosen.attention,
        scores=chosen.scores,
        per_channel=chosen.per_channel,
        signed=chosen.signed,
        quantize_conv=chosen.conv,
        include=include,
        exclude=exclude,
        reduce_range=reduce_range,
        split=True,
    )


def fused(source: Path, target: Path, found: QuantizationResult) -> QuantizationResult:
    """Rewrites an int8 file in fused operators.

    Args:
        found: what is known of ``source``.

    Raises:
        ValueError: The file is too large.
    """
    fuse(source, target)
    counts = onnx_graph.op_counts(onnx.load(target, load_external_data=False))
    return replace(found, bytes_after=onnx_graph.file_bytes(target), op_counts=counts)
