"""What `quantize` does under its weight-only schemes, by our own rounding or by Neural Compressor's, and by that one's int8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmcompress.errors import RecipeError
from mmcompress.quantization.schemes import Calibration

if TYPE_CHECKING:
    import numpy as np

    from mmcompress.families.base import Component
    from mmcompress.quantization.result import QuantizationResult

Algorithm = Literal["rtn", "gptq", "awq", "autoround", "autotune"]
Backend = Literal["mmcompress", "neural-compressor"]
OURS: tuple[Algorithm, ...] = ("rtn", "gptq", "awq")
Feeds = Callable[[], Iterable[Mapping[str, "np.ndarray"]]]


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    Attributes:
        block_size: None for what suits the bits.
        least: for ``autotune`` the mean cosine of outputs that is enough.
        include: patterns of layers to quantize.
        exclude: patterns of layers to leave in float.
    """

    bits: Literal[4, 8]
    block_size: int | None
    algorithm: Algorithm
    backend: Backend
    least: float
    include: Sequence[str]
    exclude: Sequence[str]


def quantized_weights(how: Rounding, source: Path, target: Path, part: Component, feeds: Feeds) -> QuantizationResult:
    """One component's file with weights in blocks.

    Args:
        source: the float file.
        target: where to write.
        feeds: gives calibration batches.

    Raises:
        RecipeError: the backend cannot do it.
    """
    from mmcompress.quantization.blocks import DEFAULT_SIZES
    from mmcompress.quantization.weight_only import quantize_weights

    quantize = partial(
        quantize_weights, source, target, bits=how.bits, block_size=how.block_size, include=how.include, exclude=how.exclude
    )
    if how.backend == "mmcompress":
        if how.algorithm not in ("rtn", "gptq", "awq"):
            raise RecipeError(f"quantize: algorithm: {how.algorithm} needs `backend: neural-compressor`")
        return quantize(algorithm=how.algorithm, calibration=feeds)
    import torch

    from mmcompress.quantization.neural_compressor import BackendError, round_weights

    batches = [tuple(torch.from_numpy(batch[name]) for name in part.inputs) for batch in feeds()]
    size = how.block_size or DEFAULT_SIZES[how.bits]
    try:
        rounded = round_weights(part.module, batches, how.bits, size, how.algorithm, how.least)
    except BackendError as e:
        raise RecipeError(f"quantize: {part.name}: {e}") from e
    return quantize(rounded=rounded)


def static_by_backend(
    source: Path,
    target: Path,
    part: Component,
    feeds: Feeds,
    calibration: Calibration,
    patterns: tuple[Sequence[str], Sequence[str]],
) -> QuantizationResult:
    """One component's int8 file by Neural Compressor's static quantization.

    Args:
        source: the float file.
        target: where to write.
        feeds: gives calibration batches.
        patterns: of layers to include and to exclude.

    Raises:
        RecipeError: the backend cannot do it.
    """
    import torch

    from mmcompress.quantization.neural_compressor import BackendError
    from mmcompress.quantization.neural_static import OBSERVERS, static_by_neural_compressor

    batches = [tuple(torch.from_numpy(batch[name]) for name in part.inputs) for batch in feeds()]
    axes = [part.dynamic_axes.get(name, {}) for name in part.inputs]
    include, exclude = patterns
    try:
        return static_by_neural_compressor(
            source,
            target,
            part.module,
            part.inputs,
            axes,
            batches,
            observer=OBSERVERS[calibration],
            include=include,
            exclude=exclude,
        )
    except BackendError as e:
        raise RecipeError(f"quantize: {part.name}: {e}") from e


def backend_mistakes(algorithm: Algorithm, static: bool = False) -> list[str]:
    """What is wrong with Neural Compressor's algorithm on this machine, from a trial, a sentence each.

    Args:
        static: whether its static int8 quantization is wanted, too.
    """
    from mmcompress.quantization.neural_compressor import STATIC, probe  # needs torch

    tried = {f"algorithm: {algorithm}": probe(algorithm)} | ({"scheme: int8-static": probe(STATIC)} if static else {})
    return [
        f"{asked} with backend neural-compressor does not work here: {wrong}"
        for asked, wrong in tried.items()
        if wrong is not None
    ]
