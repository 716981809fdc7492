"""SmoothQuant: the difficulty of quantizing inputs is moved into weights, and the scales into the LayerNorm before.

G. Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, 2023: with
``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` the product ``(X / s)(s W)`` is ``X W``, and X / s has one scale for all channels
without a few large ones taking it all. X is the output of a LayerNorm here, whose gains and offsets are divided by s, so that the
graph stays as it is. That also helps the image towers of CLIP, a few of whose channels are many times larger than the rest.

Shapes: R rows, K channels, N outputs of all layers that read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from mmcompress.quantization.graph_edit import GraphEdit
from mmcompress.quantization.linear import Floats, Linear, edited, linears, rounded_input, rounded_weight, set_input
from mmcompress.quantization.naming import is_meant, module_path
from mmcompress.quantization.watching import Feeds, watch

Smooth = Literal["auto"] | float

ALPHAS = tuple(i / 10 for i in range(11))
ROWS = 512
"""Rows of each LayerNorm's output that exponents are compared on."""
OUTLIER = 10.0
"""A channel is an outlier from this many times the median channel's largest value on."""
LISTED = 16
LEAST_GAIN = 0.98
"""Scales are folded where they bring the error of the layers' outputs below this share of what it was."""


@dataclass(frozen=True)
class Smoothed:
    """One LayerNorm and the layers that read it.

    Attributes:
        norm: its module path.
        layers: module paths of the layers.
        alpha: the exponent that was taken; None where nothing was changed.
        error_before: squared error of the layers' outputs in 8 bits over the outputs' squares, without scales.
        error_after: the same with them.
        outliers: channels with large values, and how many times the median channel's largest value theirs is.
    """

    norm: str
    layers: tuple[str, ...]
    alpha: float | None
    error_before: float
    error_after: float
    outliers: tuple[tuple[int, float], ...]

    def as_data(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


@dataclass
class _Group:
    norm: onnx.NodeProto
    layers: list[Linear]
    low: Floats
    high: Floats
    rows: Floats
    keys: Floats

    def add(self, values: Floats, draw: np.random.Generator) -> None:
        """Takes rows (R, K) in: extremes of all, and a random sample in which each row has the same chance."""
        values = values.reshape(-1, values.shape[-1])
        self.low, self.high = np.minimum(self.low, values.min(axis=0)), np.maximum(self.high, values.max(axis=0))
        keys = draw.random(len(values))
        kept = np.argsort(keys)[:ROWS]
        rows, keys = np.concatenate([self.rows, values[kept]]), np.concatenate([self.keys, keys[kept]])
        best = np.argsort(keys)[:ROWS]
        self.rows, self.keys = rows[best], keys[best]


def smooth(
    source: Path,
    target: Path,
    feeds: Iterable[Feeds],
    alpha: Smooth = "auto",
    *,
    narrow: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[Smoothed, ...]:
    """Writes a float graph with the same outputs whose inputs of layers are easier to quantize.

    Args:
        source: Float file, as `export_component` writes it.
        target: Where to write; may be the source.
        feeds: Calibration batches; read once, one at a time.
        alpha: The exponent, 0 to 1; ``auto`` takes for each LayerNorm the one with the least error of the layers' outputs on a
            sample of the calibration data, or none where that is no better.
        narrow: Whether weights are going to have 7 bits.
        include: Patterns of the layers that are going to be quantized, all where there are none.
        exclude: Patterns of layers that stay in float; a LayerNorm with none that is quantized is left alone.

    Raises:
        ValueError: There is no calibration data, or it is not finite.
    """
    with edited(source, target) as (edit, prepared):
        groups = _groups(edit, include, exclude)
        draw = np.random.default_rng(0)
        if groups:
            for seen in watch(prepared, [group.norm.output[0] for group in groups], feeds):
                for group in groups:
                    group.add(seen[group.norm.output[0]], draw)
        return tuple(_smooth(edit, group, alpha, narrow) for group in groups)


def _groups(edit: GraphEdit, include: Sequence[str], exclude: Sequence[str]) -> list[_Group]:
    """LayerNorms whose output nothing reads but linear layers."""
    by_node = {layer.node.name: layer for layer in linears(edit)}
    graph_outputs = {value.name for value in edit.model.graph.output}
    groups = []
    for node in edit.nodes:
        if node.op_type != "LayerNormalization" or node.output[0] in graph_outputs:
            continue
        readers = edit.readers.get(node.output[0], [])
        layers = [by_node[one.name] for one in readers if one.name in by_node]
        own = all(name in edit.weights for name in node.input[1:])
        meant = any(is_meant(module_path(one.node.name), include, exclude) for one in layers)
        if len(layers) != len(readers) or not own or not meant or any(one.given != node.output[0] for one in layers):
            continue
        width = edit.weights[node.input[1]].dims[0]
        empty = np.zeros((0, width), dtype=np.float32)
        groups.append(_Group(node, layers, np.full(width, np.inf), np.full(width, -np.inf), empty, np.zeros(0)))
    return groups


def scales(inputs: Floats, weights: Floats, alpha: float) -> Floats:
    """``max|X_j|^alpha / max|W_j|^(1 - alpha)``; 1 where either is 0.

    Args:
        inputs: largest absolute value of each channel, (K,).
        weights: the same of each row of the weights, (K,).
        alpha: 0 leaves all to the weights' ranges, 1 all to the inputs'.
    """
    usable = (inputs > 0) & (weights > 0)
    found: Floats = np.where(usable, np.where(usable, inputs, 1) ** alpha / np.where(usable, weights, 1) ** (1 - alpha), 1.0)
    return found


def _smooth(edit: GraphEdit, group: _Group, alpha: Smooth, narrow: bool) -> Smoothed:
    weight = np.concatenate([layer.matrix(edit) for layer in group.layers], axis=1).astype(np.float32)  # (K, N)
    largest = np.maximum(np.abs(group.low), np.abs(group.high))
    heaviest = np.abs(weight).max(axis=1)
    wanted = group.rows @ weight
    power = float(np.square(wanted, dtype=np.float64).sum()) or 1.0

    def error(s: Floats) -> float:
        given = rounded_input(group.rows / s, float((group.low / s).min()), float((group.high / s).max()))
        found = given.astype(np.float32) @ rounded_weight(weight * s[:, None], narrow).astype(np.float32)
        return float(np.square(found - wanted, dtype=np.float64).sum()) / power

    before = error(np.ones_like(largest))
    tried = {a: error(scales(largest, heaviest, a)) for a in (ALPHAS if alpha == "auto" else (float(alpha),))}
    best = min(tried, key=lambda a: tried[a])
    taken = best if alpha != "auto" or tried[best] < LEAST_GAIN * before else None
    if taken is not None:
        s = scales(largest, heaviest, taken)
        for place in range(1, len(group.norm.input)):
            set_input(edit, group.norm, place, edit.array(group.norm.input[place]) / s)
        for layer in group.layers:
            layer.put(edit, layer.matrix(edit) * s[:, None])
    return Smoothed(
        module_path(group.norm.name),
        tuple(module_path(layer.node.name) for layer in group.layers),
        taken,
        before,
        tried[best] if taken is not None else before,
        outliers(largest),
    )


def outliers(largest: Floats) -> tuple[tuple[int, float], ...]:
    """Channels whose largest absolute value is many times the median channel's, the largest first, with that ratio."""
    middle = float(np.median(largest)) or 1.0
    order = np.argsort(-largest)[:LISTED]
    return tuple((int(i), float(largest[i] / middle)) for i in order if largest[i] >= OUTLIER * middle)
