"""Mixed precision for `quantize`: which layers must stay in float for the task's metric to stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from mmcompress.context import Context
from mmcompress.data.examples import Examples
from mmcompress.measure.quality import changes
from mmcompress.model import CompressedModel
from mmcompress.passes._keeping import Keeping, Sensitivity, Work
from mmcompress.quantization.arrangements import ARRANGEMENTS
from mmcompress.quantization.ptq import quantize_static_int8
from mmcompress.quantization.schemes import FIXED
from mmcompress.quantization.switchboard import Switchboard
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.tasks.base import Scores

HELD = 1024
"""Training examples that the metric is taken over."""
FEW = 32
"""Calibration examples that layers are compared on, one by one."""

Layer = tuple[str, str]
"""A component and one of its layers."""


class _Switched:
    """A ``Predict`` with some layers in int8; components that are not to be int8 run in float."""

    runtime = "onnxruntime"

    def __init__(self, boards: Mapping[str, Switchboard], rest: OnnxPredict | None, components: Iterable[str]) -> None:
        self.boards, self.rest, self.components = boards, rest, tuple(components)
        self.int8: set[Layer] = set()

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        board = self.boards.get(component)
        if board is not None:
            return board(inputs, [layer for layer in board.layers if (component, layer) in self.int8])
        if self.rest is None:
            raise ValueError(f"{component}: is no component of this model")
        return self.rest(component, inputs)

    def cache(self, component: str) -> Mapping[str, tuple[int, int]]:
        board = self.boards.get(component)
        if board is not None:
            return board.cache()
        return {} if self.rest is None else self.rest.cache(component)


def leave_float(
    works: Mapping[str, Work],
    others: Mapping[str, Path],
    keeping: Keeping,
    max_drop: float,
    sensitivity: Sensitivity,
    model: CompressedModel,
    context: Context,
) -> dict[str, Any]:
    """Finds the fewest of the most sensitive layers that must stay float, and excludes them.

    Layers are sorted by how far their component's output moves when they alone are int8, or by what the metric then loses. How
    many of the first ones stay float is found by bisection: the fewest with which the metric falls by no more than the limit.

    Args:
        works: the components that are going to be int8; their ``exclude`` and ``done`` are added to.
        others: float files of the other components.
        max_drop: in points.
        sensitivity: what layers are sorted by.

    Returns:
        What was found, for the report.
    """
    task = context.need_task("quantize")
    metric = next(iter(task.metrics))
    held = _held(context)
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        boards = {name: _board(work, keeping, Path(scratch) / f"{name}.onnx") for name, work in works.items()}
        rest = _opened(others, Path(scratch) / "others")
    distances = {
        (name, layer): distance
        for name, board in boards.items()
        for layer, distance in board.distances(_first(works[name].feeds(), FEW)).items()
    }
    predict = _Switched(boards, rest, (*boards, *others))

    def scored(int8: Iterable[Layer]) -> Scores:
        predict.int8 = set(int8)
        return task.evaluate(predict, model.processor, held, context.reporter)

    baseline = scored(())

    def lost(int8: Iterable[Layer]) -> tuple[float, float, float]:
        """What the metric loses with these layers in int8, with its interval, in points."""
        change = changes(scored(int8), baseline, task.lower_is_better)[metric]
        found = (change.difference, change.low, change.high)
        if metric not in task.lower_is_better:
            found = (-change.difference, -change.high, -change.low)
        return 100 * found[0], 100 * found[1], 100 * found[2]

    alone: dict[Layer, tuple[float, float, float]] = {}
    if sensitivity == "metric":
        for one in distances:
            context.reporter.note(f"{metric} with layer {len(alone) + 1} of {len(distances)} alone in int8")
            alone[one] = lost([one])
    ranked = sorted(distances, key=lambda one: (-alone[one][0] if alone else 0.0, -distances[one]))
    tried: dict[int, float] = {}

    def drop(kept: int) -> float:
        """In points, with the first so many layers in float."""
        if kept not in tried:
            context.reporter.note(f"{metric} with {kept} of {len(ranked)} layers in float")
            tried[kept] = lost(ranked[kept:])[0]
        return tried[kept]

    kept = fewest(len(ranked), lambda count: drop(count) <= max_drop)
    for name, layer in ranked[:kept]:
        works[name].exclude.append(f"re:^{re.escape(layer)}$")
    for name, work in works.items():
        work.done["distances"] = {layer: distances[name, layer] for layer in boards[name].layers}
        if alone:
            work.done["drops"] = {layer: alone[name, layer] for layer in boards[name].layers}
    return {
        "metric": metric,
        "max_drop": max_drop,
        "sensitivity": sensitivity,
        "examples": len(held),
        "tried": [{"float": count, "drop": value} for count, value in sorted(tried.items())],
        "float": [{"component": name, "layer": layer, "distance": distances[name, layer]} for name, layer in ranked[:kept]],
        "layers": len(ranked),
    }


def fewest(most: int, enough: Callable[[int], bool]) -> int:
    """The smallest count up to ``most`` that is enough, by bisection; ``most`` itself counts as enough unasked.

    Args:
        enough: whether a count is; what is more than enough is, too.
    """
    if enough(0):
        return 0
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _board(work: Work, keeping: Keeping, target: Path) -> Switchboard:
    """The fixed placement's layers with switches."""
    plain = ARRANGEMENTS[FIXED["int8-static"]]
    quantize_static_int8(
        work.ready,
        target,
        keeping.ranges(work.ready, work.feeds()),
        quantize_conv=plain.conv,
        include=keeping.include,
        exclude=keeping.exclude,
        reduce_range=keeping.narrow,
    )
    return Switchboard(work.ready, target)


def _opened(files: Mapping[str, Path], folder: Path) -> OnnxPredict | None:
    if not files:
        return None
    folder.mkdir()
    for name, path in files.items():
        (folder / f"{name}.onnx").symlink_to(path.resolve())
        data = path.with_name(f"{path.name}_data")
        if data.exists():
            (folder / data.name).symlink_to(data.resolve())
    return OnnxPredict(folder, names=tuple(files))


def _first(feeds: Iterable[Mapping[str, np.ndarray]], count: int) -> list[dict[str, np.ndarray]]:
    """The first rows of batches."""
    found: list[dict[str, np.ndarray]] = []
    for batch in feeds:
        rows = max(len(values) for values in batch.values())
        found.append({name: values[:count] for name, values in batch.items()})
        count -= min(rows, count)
        if count <= 0:
            break
    return found


def _held(context: Context) -> Examples:
    """Training examples in an order of their own, so that most of them are not those that ranges are taken from."""
    train = context.need_train("quantize: max_drop")
    if len(train) <= HELD:
        return train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(context.seed + 1))
    return train.take(sorted(order[:HELD].tolist()))
