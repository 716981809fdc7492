"""What cutting costs in the task's headline metric, tower by tower, right after the cut and before any recovery.

Every cut is of a copy of the uncut model, and both are scored on the same examples, so that differences are paired.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mmcompress.context import Context
from mmcompress.data.examples import Examples
from mmcompress.families.base import Family
from mmcompress.measure.quality import changes, qualities
from mmcompress.model import CompressedModel
from mmcompress.pruning.criteria.base import Criterion
from mmcompress.pruning.cutting import Cutting, remembered
from mmcompress.pruning.units import Axis, Shares, kept_count
from mmcompress.report.schema import Change, Quality
from mmcompress.runtimes.base import Predict
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.base import Scores

REUSE_BYTES = 500_000_000
"""Outputs of the uncut model are kept for as long as all of them fit in this."""
WARM_UP, CALLS = 3, 20

Outputs_ = dict[str, np.ndarray]


@dataclass(frozen=True)
class CutPoint:
    """One cut of one tower, or of several that share a size.

    Attributes:
        ratio: as it was asked for.
        share: of the units that was cut, after rounding.
        kept: how many units of a layer (or layers, or heads) stay; with scope ``tower`` the mean over the layers.
        parameters: of the whole model after the cut.
        quality: of the headline metric.
        change: paired, against the uncut model.
        latency_ms: of one example through all components; None where it was not timed.
    """

    ratio: float
    share: float
    kept: int
    parameters: int
    quality: Quality
    change: Change
    latency_ms: float | None = None


def together(family: Family, axis: Axis, towers: Sequence[str]) -> list[tuple[str, ...]]:
    """The towers in groups that are cut alike: mostly each by itself."""
    joint = tuple(t for t in family.cut_together(axis) if t in towers)
    return [*([joint] if joint else []), *((t,) for t in towers if t not in joint)]


@dataclass
class Sensitivity:
    """Scores a model and copies of it that are cut.

    Attributes:
        model: uncut; stays as it is.
        context: gives the task, the device, the seed and the reporter.
        scoring: examples that criteria read.
        held: other examples, which the metric is taken over.
        timed: whether latency is measured as well.
    """

    model: CompressedModel
    context: Context
    scoring: Examples
    held: Examples
    timed: bool = False
    latency_ms: float | None = None
    _known: dict[tuple[str, bytes], Outputs_] = field(default_factory=dict)
    _judges: dict[Cutting, Criterion | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        task = self.context.need_task("sensitivity")
        self.metric = next(iter(task.metrics))
        self.lower_is_better = self.metric in task.lower_is_better
        predict = _Recording(TorchPredict(self.model, self.context.device), self._known)
        self.baseline = self._evaluate(predict, self.model)
        self.model.module.to("cpu")
        self.quality = qualities(self.baseline)[self.metric]
        if self.timed:
            self.latency_ms = time_calls(self.model)

    def cut(self, cutting: Cutting, ratios: Mapping[str, float]) -> tuple[CompressedModel, Quality, Change]:
        """A cut copy, its metric and the paired difference to the uncut model."""
        # The scores are the same whatever is cut: the criterion is asked once for each group of units.
        if cutting not in self._judges:
            self._judges[cutting] = remembered(cutting.find())
        judge = self._judges[cutting]
        model = self.model.clone()
        cutting.cut(model, cutting.shares(ratios), self.context, judge, self.scoring)
        same = frozenset(_unchanged(self.model, model))
        scores = self._evaluate(_Reusing(TorchPredict(model, self.context.device), self._known, same), model)
        model.module.to("cpu")
        task = self.context.need_task("sensitivity")
        change = changes(scores, self.baseline, task.lower_is_better)[self.metric]
        return model, qualities(scores)[self.metric], change

    def curve(self, cutting: Cutting, towers: Sequence[str], ratios: Sequence[float]) -> Iterator[CutPoint]:
        """The cuts of one group of towers, by rising share; ratios that round to nothing, to all or to the same are left out."""
        for ratio, kept in grid(self.model, cutting, towers, ratios):
            model, quality, change = self.cut(cutting, dict.fromkeys(towers, ratio))
            size = tower_size(self.model, cutting.axis, towers)
            latency = time_calls(model) if self.timed else None
            yield CutPoint(ratio, 1 - kept / size, kept, model.parameters(), quality, change, latency)

    def loss(self, change: Change) -> float:
        """How much worse the metric is, whichever way is better."""
        return change.difference if self.lower_is_better else -change.difference

    def _evaluate(self, predict: Predict, model: CompressedModel) -> Scores:
        task = self.context.need_task("sensitivity")
        return task.evaluate(predict, model.processor, self.held, self.context.reporter)


def tower_size(model: CompressedModel, axis: Axis, towers: Sequence[str]) -> int:
    """How many units the axis counts in towers that are cut alike."""
    return Shares(axis, {}).units(model.family.config_sizes(model.module.config)[towers[0]])


def grid(model: CompressedModel, cutting: Cutting, towers: Sequence[str], ratios: Sequence[float]) -> list[tuple[float, int]]:
    """For each ratio that cuts something, and not all, the number of units that stay; each number once."""
    size, step = tower_size(model, cutting.axis, towers), cutting.shares({}).step
    found: dict[int, float] = {}
    for ratio in sorted(ratios):
        kept = kept_count(size, ratio, step)
        if 0 < kept < size:
            found.setdefault(kept, ratio)
    return [(ratio, kept) for kept, ratio in found.items()]


def time_calls(model: CompressedModel) -> float:
    """The median time of one example through all components in torch on the CPU of this process, in milliseconds."""
    parts = model.family.components(model.module)
    calls = [(parts[c.component], c) for c in model.family.calls(model.module, 1)]
    found = []
    with torch.inference_mode():
        for _ in range(WARM_UP + CALLS):
            began = time.perf_counter()
            for part, call in calls:
                inputs = [call.inputs[name] for name in part.inputs]
                for _ in range(call.times):
                    part.module(*inputs)
            found.append(1000 * (time.perf_counter() - began))
    return statistics.median(found[WARM_UP:])


def _unchanged(before: CompressedModel, after: CompressedModel) -> list[str]:
    """The components whose weights a cut left as they were: with a dual encoder those of the other tower."""
    old, new = before.family.components(before.module), after.family.components(after.module)
    found = []
    for name, part in new.items():
        ours, theirs = part.module.state_dict(), old[name].module.state_dict()
        same = ours.keys() == theirs.keys() and all(
            v.shape == theirs[k].shape and torch.equal(v.cpu(), theirs[k].cpu()) for k, v in ours.items()
        )
        if same and not part.decoder:
            found.append(name)
    return found


class _Asking:
    """A ``Predict`` in front of another one."""

    def __init__(self, inner: TorchPredict, known: dict[tuple[str, bytes], Outputs_]) -> None:
        self.inner, self.known = inner, known
        self.runtime, self.components = inner.runtime, inner.components

    def cache(self, component: str) -> Mapping[str, tuple[int, int]]:
        return self.inner.cache(component)

    def key(self, component: str, inputs: Mapping[str, np.ndarray]) -> tuple[str, bytes]:
        """What a component was asked."""
        digest = hashlib.blake2b(digest_size=16)
        for name in self.inner.parts[component].inputs:
            values = np.ascontiguousarray(inputs[name])
            digest.update(f"{name}{values.dtype}{values.shape}".encode())
            digest.update(values.data)
        return component, digest.digest()


class _Recording(_Asking):
    """Remembers what components without a cache of tokens answered."""

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> Outputs_:
        found = self.inner(component, inputs)
        if not self.inner.parts[component].decoder:
            size = sum(v.nbytes for outputs in self.known.values() for v in outputs.values())
            if size + sum(v.nbytes for v in found.values()) <= REUSE_BYTES:
                self.known[self.key(component, inputs)] = found
        return found


class _Reusing(_Asking):
    """Answers for components that are as they were from what they answered before."""

    def __init__(self, inner: TorchPredict, known: dict[tuple[str, bytes], Outputs_], same: frozenset[str]) -> None:
        super().__init__(inner, known)
        self.same = same

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> Outputs_:
        known = self.known.get(self.key(component, inputs)) if component in self.same else None
        return known if known is not None else self.inner(component, inputs)
