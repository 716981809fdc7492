"""Bias correction: what quantization changes in the mean output of a layer is taken back in its bias.

M. Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019, section 4.2, with means from
calibration data. A layer is linear, so its mean output changes by ``mean(X) W - mean(q(X)) q(W)``: means of inputs are all that
has to be kept. Each layer is corrected for inputs as the float model has them.

Shapes: K inputs, N outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.quantization.linear import Floats, edited, linears, rounded_input, rounded_weight
from mmcompress.quantization.naming import is_meant, module_path
from mmcompress.quantization.ranges import PERCENTILE, ranges_of_prepared
from mmcompress.quantization.schemes import Calibration
from mmcompress.quantization.watching import Feeds, watch


@dataclass(frozen=True)
class Corrected:
    """What was done to one layer.

    Attributes:
        layer: its module path.
        shift: root mean square over the outputs of what was added to the bias.
        spread: the same of the bias before.
    """

    layer: str
    shift: float
    spread: float

    def as_data(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


@dataclass
class _Means:
    plain: Floats
    rounded: Floats
    rows: int = 0


def correct_biases(
    source: Path,
    target: Path,
    feeds: Callable[[], Iterable[Feeds]],
    *,
    calibration: Calibration = "min-max",
    percentile: float = PERCENTILE,
    narrow: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[Corrected, ...]:
    """Writes a float graph whose biases make up for what int8 is going to do to the means of layers' outputs.

    It is made for inputs and weights in int8, uint8 activations, and a scale for each output channel. Layers without a bias of
    their own are left as they are.

    Args:
        source: Float file, as `export_component` writes it.
        target: Where to write; may be the source.
        feeds: Gives calibration batches; asked twice, for ranges and for means.
        calibration: How ranges are going to be chosen.
        percentile: Of the values, under ``percentile``.
        narrow: Whether weights are going to have 7 bits.
        include: Patterns of the layers that are going to be quantized, all where there are none.
        exclude: Patterns of layers that stay in float.

    Raises:
        ValueError: There is no calibration data, or it is not finite.
    """
    done = []
    with edited(source, target) as (edit, prepared):
        layers = [one for one in linears(edit) if one.bias and is_meant(module_path(one.node.name), include, exclude)]
        names = list(dict.fromkeys(layer.given for layer in layers))
        limits = ranges_of_prepared(prepared, feeds(), calibration, percentile).limits(names=names)
        means: dict[str, _Means] = {}
        for seen in watch(prepared, names, feeds()) if names else ():
            for name, values in seen.items():
                rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
                own = means.setdefault(name, _Means(np.zeros(rows.shape[1]), np.zeros(rows.shape[1])))
                own.plain += rows.sum(axis=0)
                own.rounded += rounded_input(rows, float(limits[name].low), float(limits[name].high)).sum(axis=0)
                own.rows += len(rows)
        for layer in layers:
            own = means[layer.given]
            matrix = layer.matrix(edit).astype(np.float64)
            shift = (own.plain @ matrix - own.rounded @ rounded_weight(matrix, narrow)) / max(own.rows, 1)  # (N,)
            bias = edit.array(layer.bias)
            layer.put_bias(edit, bias + shift)
            done.append(Corrected(module_path(layer.node.name), _size(shift), _size(bias)))
    return tuple(done)


def _size(values: Floats) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))
