"""Where a model lost most against the baseline, and whether more than elsewhere, with a guard against looking at many slices.

Shapes: N examples that were scored, G clusters, S slices.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from mmcompress.measure.slicing import Group
from mmcompress.measure.statistics import difference_interval
from mmcompress.report.schema_behaviour import Estimate, Slice, Slices
from mmcompress.tasks.base import Scores

FEWEST = 20
"""Smaller slices are not tested: one example more or less would change what they say."""
WORST = 5
MOST_TOLD = 20
"""How many slices that are worse than the rest are listed beside the worst five."""
SURE = 0.01
"""The adjusted p-value below which a slice counts as worse than the rest."""
DRAWS = 9_999
MORE_DRAWS = 199_999
FEW_KINDS = 8


def worst_slices(scores: Scores, baseline: Scores, metric: str, lower_is_better: bool, found: list[Group]) -> Slices | None:
    """The five slices with the largest loss, and all that lost clearly more than the rest of the examples did.

    Each slice of at least 20 examples is tested one-sided for having lost more than the others; the p-values are adjusted by
    Holm (1979) for all slices that were tested, which holds whatever they have in common. Slices are ranked by the loss that
    is sure: the better end of a normal 95% interval of it.

    Args:
        found: the slices of all examples.

    Returns:
        None where the metric is not a mean over the examples, or the examples are not the same.
    """
    if metric not in scores.per_example or metric not in baseline.per_example:
        return None
    new, old = scores.per_example[metric], baseline.per_example[metric]
    if len(new) != len(old) or not found:
        return None
    sign = -1.0 if lower_is_better else 1.0
    weights = scores.weights.get(metric)
    w = np.ones(len(new)) if weights is None else weights
    gain = sign * (new - old)
    tested = [g for g in found if FEWEST <= int(g.members.sum()) <= len(new) - FEWEST]
    p = np.array([p_lost_more(gain, g.members, w, scores.clusters) for g in tested])
    adjusted = holm(p)
    p_of = {id(g): (float(a), float(b)) for g, a, b in zip(tested, p, adjusted, strict=True)}
    ranked = sorted(found, key=lambda g: (id(g) not in p_of, -_sure_loss(gain[g.members], w[g.members])))
    losing = [g for g in ranked if (gain[g.members] * w[g.members]).sum() < 0]
    told = [g for g in losing if id(g) in p_of and p_of[id(g)][1] < SURE][:MOST_TOLD]
    shown = list({id(g): g for g in [*told, *losing[:WORST]]}.values())
    listed = [_slice(g, scores, baseline, metric, p_of.get(id(g))) for g in sorted(shown, key=ranked.index)]
    return Slices(metric=metric, looked_at=len(found), tested=len(tested), worst=listed)


def _slice(g: Group, scores: Scores, baseline: Scores, metric: str, p: tuple[float, float] | None) -> Slice:
    new, old = scores.per_example[metric], baseline.per_example[metric]
    one, two = scores.weights.get(metric), baseline.weights.get(metric)
    inside, outside = g.members, ~g.members
    pair = None if one is None or two is None else (one[inside], two[inside])
    clusters = None if scores.clusters is None else scores.clusters[inside]
    low, high = difference_interval(new[inside], old[inside], weights=pair, clusters=clusters)
    before, after = _mean(old, two, inside), _mean(new, one, inside)
    n = int(inside.sum())
    rest = _mean(new, one, outside) - _mean(old, two, outside) if outside.any() else None
    return Slice(
        by=g.by,
        name=g.name,
        n=n,
        before=before,
        after=after,
        change=Estimate(value=after - before, low=low, high=high, n=n),
        rest=rest,
        p_value=None if p is None else p[0],
        p_adjusted=None if p is None else p[1],
        small=n < FEWEST,
        worse_than_rest=p is not None and p[1] < SURE,
    )


def _mean(values: np.ndarray, weights: np.ndarray | None, members: np.ndarray) -> float:
    if weights is None:
        return float(values[members].mean())
    return float((values * weights)[members].sum() / weights[members].sum())


def _sure_loss(gain: np.ndarray, weights: np.ndarray) -> float:
    mean = float((gain * weights).sum() / weights.sum())
    share = weights / weights.sum()
    # Half an example of no change is put in, so that one lost example of one is no sure loss.
    spread = float(np.sqrt((np.square(share) * (np.square(gain - mean) + 0.5 / len(gain))).sum()))
    return -(mean + 1.96 * spread)


def holm(p: np.ndarray) -> np.ndarray:
    """p-values adjusted for their number so that the chance of any false alarm is kept (Holm 1979): (S,)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)) if len(p) else p[order]
    found = np.empty(len(p))
    found[order] = np.minimum(stepped, 1.0)
    return found


def p_lost_more(gain: np.ndarray, members: np.ndarray, weights: np.ndarray, clusters: np.ndarray | None = None) -> float:
    """The one-sided p-value of the members having a lower mean gain than the others by chance.

    Gains of few kinds (right or wrong before and after) that count the same and stand alone: by permutation of who is a
    member, drawn 9,999 times, and more often where that does not resolve it. Else: Welch's t of two weighted means with
    cluster-robust variances.

    Args:
        gain: shape (N,), what each example gained; negative for a loss.
        members: shape (N,), bool.
        weights: shape (N,).
        clusters: shape (N,), which examples stand or fall together. Where the members are of one cluster, or the others are,
            it is this cluster that is asked about, and its examples count by themselves.
    """
    if clusters is not None and min(len(np.unique(clusters[members])), len(np.unique(clusters[~members]))) < 2:
        clusters = None
    kinds, counts = np.unique(gain, return_counts=True)
    if len(kinds) == 1:
        return 1.0
    alone = clusters is None or len(np.unique(clusters)) in (1, len(gain))
    if alone and len(kinds) <= FEW_KINDS and (weights == weights[0]).all():
        rng = np.random.default_rng(0)
        total, size = float(gain[members].sum()), int(members.sum())
        for draws in (DRAWS, MORE_DRAWS):
            drawn = rng.multivariate_hypergeometric(counts, size, size=draws, method="marginals") @ kinds
            as_low = int((drawn <= total + 1e-9).sum())
            if as_low >= 10:
                break
        return (as_low + 1) / (draws + 1)
    return _welch(gain, members, weights, np.arange(len(gain)) if alone or clusters is None else clusters)


def _welch(gain: np.ndarray, members: np.ndarray, weights: np.ndarray, clusters: np.ndarray) -> float:
    groups = np.unique(clusters, return_inverse=True)[1].reshape(-1)
    difference, influence, freedom = 0.0, np.zeros(int(groups.max()) + 1), []
    for sign, part in ((1.0, members), (-1.0, ~members)):
        share = weights[part] / weights[part].sum()
        mean = float((share * gain[part]).sum())
        difference += sign * mean
        np.add.at(influence, groups[part], sign * share * (gain[part] - mean))
        freedom.append(len(np.unique(groups[part])) - 1)
    spread = float(np.sqrt(np.square(influence).sum()))
    if spread < 1e-12:
        return 1.0 if difference >= -1e-12 else 0.0
    return float(stats.t.cdf(difference / spread, min(freedom)))
