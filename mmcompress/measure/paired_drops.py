"""Two models under many conditions: how much each loses to each, and how much more the second one loses.

Everything comes from one bootstrap of the examples: a resample draws the same examples for both models under all conditions, so
that differences of differences, and ratios of sums over conditions, are paired.

Shapes: N examples, R resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmcompress.measure.statistics import LEVEL, difference_interval, mean_interval, ratio, ratio_statistics, resampled_sums
from mmcompress.report.schema_robustness import Condition, Degree, Estimate, Verdict

CLEAR = 0.05


@dataclass(frozen=True, eq=False)
class Scored:
    """One model under one condition.

    Attributes:
        values: (N,), what each example contributes to the metric.
        kept: (N,), which examples these are, rising.
        weights: (N,), how much each counts; None for all the same.
        clusters: (N,), which of them stand or fall together; None for each by itself.
    """

    values: np.ndarray
    kept: np.ndarray
    weights: np.ndarray | None = None
    clusters: np.ndarray | None = None


Key = tuple[int, Hashable]
"""0 for the baseline or 1 for the compressed model, and the condition."""


@dataclass(frozen=True)
class Sample:
    """A quantity on the examples as they are, and on each resample, (R,)."""

    value: float
    drawn: np.ndarray

    def __sub__(self, other: Sample) -> Sample:
        return Sample(self.value - other.value, self.drawn - other.drawn)

    def __truediv__(self, other: Sample) -> Sample:
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = self.drawn / other.drawn
        return Sample(self.value / other.value if other.value else float("nan"), drawn)

    def times(self, factor: float) -> Sample:
        """Multiplied with a number."""
        return Sample(factor * self.value, factor * self.drawn)

    def estimate(self, n: int) -> Estimate:
        """With the percentile interval. Where no resample differs among n examples, it is as wide as that of two models that
        agree on all of them (`statistics.difference_interval`).
        """
        drawn = self.drawn[np.isfinite(self.drawn)]
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(drawn) else (self.value, self.value)
        if low == high:
            none = np.zeros(n)
            below, above = difference_interval(none, none)
            low, high = self.value + below, self.value + above
        return Estimate(value=self.value, low=float(low), high=float(high))

    def p(self) -> float:
        """Two-sided, of zero: twice the smaller share of resamples on either side of it, zero itself counting for both."""
        above, below = int((self.drawn >= 0).sum()), int((self.drawn <= 0).sum())
        return float(min(1.0, 2 * (min(above, below) + 1) / (len(self.drawn) + 1)))


def mean(samples: Sequence[Sample]) -> Sample:
    """The mean of several quantities."""
    return Sample(float(np.mean([s.value for s in samples])), np.mean([s.drawn for s in samples], axis=0))


def total(samples: Sequence[Sample]) -> Sample:
    """Their sum."""
    return mean(samples).times(len(samples))


class Drops:
    """Two models' metric under conditions, on the examples that all of them could score."""

    def __init__(self, scored: Mapping[Key, Scored], clean: Hashable, lower_is_better: bool, seed: int = 0) -> None:
        """Draws the resamples.

        Args:
            scored: both models under the clean and all other conditions.
            clean: the name of the clean condition.

        Raises:
            ValueError: no example was scored under all conditions, or a model was not under one.
        """
        self.clean, self.lower_is_better = clean, lower_is_better
        self.names = list(dict.fromkeys(name for _, name in scored))
        lacking = [name for name in [clean, *self.names] if not all((who, name) in scored for who in (0, 1))]
        if lacking:
            raise ValueError(f"both models are needed under every condition; one lacks {lacking[0]}")
        common = scored[0, clean].kept
        for one in scored.values():
            common = np.intersect1d(common, one.kept)
        self.n = len(common)
        if not self.n:
            raise ValueError("no example was scored under all conditions")
        self._values: dict[Key, np.ndarray] = {}
        self._weights: dict[Key, np.ndarray | None] = {}
        columns = []
        for key, one in scored.items():
            at = np.searchsorted(one.kept, common)
            self._values[key] = one.values[at]
            self._weights[key] = None if one.weights is None else one.weights[at]
            columns.append(ratio_statistics(self._values[key], self._weights[key]))
        first = scored[0, clean]
        self.clusters = None if first.clusters is None else first.clusters[np.searchsorted(first.kept, common)]
        whole = np.concatenate(columns, axis=1)
        sums = resampled_sums(whole, seed, clusters=self.clusters)
        full = whole.sum(axis=0, keepdims=True)
        self._samples = {
            key: Sample(float(ratio(full[:, 2 * k : 2 * k + 2])[0]), ratio(sums[:, 2 * k : 2 * k + 2]))
            for k, key in enumerate(scored)
        }

    def metric(self, who: int, name: Hashable) -> Estimate:
        """A model's metric under a condition, with the interval of a single mean."""
        key = (who, name)
        low, high = mean_interval(self._values[key], weights=self._weights[key], clusters=self.clusters)
        return Estimate(value=self._samples[key].value, low=low, high=high)

    def drop(self, who: int, name: Hashable) -> Sample:
        """How much worse a model is than on clean examples."""
        return self.fall(who, self.clean, name)

    def fall(self, who: int, before: Hashable, after: Hashable) -> Sample:
        """How much worse a model is under the second of two conditions."""
        a, b = self._samples[who, before], self._samples[who, after]
        return b - a if self.lower_is_better else a - b

    def extra(self, name: Hashable) -> Sample:
        """How much more of it the second model loses than the first."""
        return self.drop(1, name) - self.drop(0, name)

    def mean_extra(self, names: Sequence[Hashable]) -> Sample:
        """The same on average over several conditions."""
        return mean([self.extra(name) for name in names])

    def errors(self, who: int, names: Sequence[Hashable]) -> Sample:
        """The sum over conditions of a model's error: the metric that counts mistakes, or one minus the one that does not."""
        found = total([self._samples[who, name] for name in names])
        return found if self.lower_is_better else Sample(len(names) - found.value, len(names) - found.drawn)

    def error_ratio(self, names: Sequence[Hashable]) -> Sample | None:
        """Corruption error (Hendrycks and Dietterich 2019, section 4.2); None where the first model makes no error."""
        theirs = self.errors(0, names)
        return None if theirs.value <= 0 else self.errors(1, names) / theirs

    def drop_ratio(self, names: Sequence[Hashable]) -> Sample | None:
        """Relative corruption error (the same section); None where the first model does not clearly lose anything, as a ratio
        to nothing says nothing.
        """
        theirs = total([self.drop(0, name) for name in names])
        if theirs.estimate(self.n).low <= 0:
            return None
        return total([self.drop(1, name) for name in names]) / theirs

    def degree(self, name: Hashable, severity: float, strength: str = "") -> Degree:
        """One condition with all of its numbers."""
        return Degree(
            severity=severity,
            strength=strength,
            baseline=self.metric(0, name),
            final=self.metric(1, name),
            baseline_drop=self.drop(0, name).estimate(self.n),
            final_drop=self.drop(1, name).estimate(self.n),
            extra=self.extra(name).estimate(self.n),
        )


def judged(conditions: list[Condition]) -> list[Condition]:
    """The same with p-values adjusted, and the verdicts that follow from them."""
    adjusted = holm([c.p for c in conditions])
    return [
        c.model_copy(update={"p_adjusted": p, "verdict": _verdict(p, c.extra.value)})
        for c, p in zip(conditions, adjusted, strict=True)
    ]


def _verdict(p: float, extra: float) -> Verdict:
    if p >= CLEAR or extra == 0:
        return "no clear difference"
    return "loses more" if extra > 0 else "loses less"


def holm(ps: Sequence[float]) -> list[float]:
    """P-values adjusted for several tests (Holm 1979): the chance of one or more false alarms stays below the level."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    found, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        found[i] = worst
    return found
