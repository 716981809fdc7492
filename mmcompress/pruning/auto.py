"""``ratio: auto``: from a target to a share for each tower, by what each share costs in the task's headline metric.

Shapes: T towers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from mmcompress.context import Context
from mmcompress.errors import RecipeError
from mmcompress.families.base import Family
from mmcompress.measure.sensitivity import CutPoint, Sensitivity, time_calls, together
from mmcompress.measure.size import shape_cost
from mmcompress.model import CompressedModel
from mmcompress.pruning.allocate import Choice, allocate, envelope, interpolate
from mmcompress.pruning.cutting import Cutting, hold_out
from mmcompress.pruning.target import Target
from mmcompress.pruning.units import kept_count

Sizes = Mapping[str, Mapping[str, int]]
TRIES = 8


def cut_towers(family: Family, axis: Any, target: Target, sizes: Sizes) -> list[str]:
    """The towers that the target may cut: those it names, else all that have the axis."""
    having = [tower for tower in family.towers if axis in sizes.get(tower, {})]
    return [t for t in having if target.towers is None or t in target.towers]


@dataclass(frozen=True)
class Shapes:
    """What a model costs at other sizes, found from shapes alone.

    Attributes:
        config: of the model as it comes into the pass.
    """

    family: Family
    config: PretrainedConfig
    cutting: Cutting
    target: Target

    @property
    def sizes(self) -> dict[str, dict[str, int]]:
        """As they are."""
        return self.family.config_sizes(self.config)

    def groups(self) -> list[tuple[str, ...]]:
        """The towers that are cut, those that share a size together."""
        return together(self.family, self.cutting.axis, cut_towers(self.family, self.cutting.axis, self.target, self.sizes))

    def size(self, group: Sequence[str]) -> int:
        """How many units there are in a layer of a group's towers."""
        return self.cutting.shares({}).units(self.sizes[group[0]])

    def ratios(self, kept: Mapping[tuple[str, ...], int]) -> dict[str, float]:
        """For each tower the ratio that leaves so many units."""
        return {tower: 1 - count / self.size(group) for group, count in kept.items() for tower in group}

    def cost(self, kept: Mapping[tuple[str, ...], int]) -> tuple[int, int]:
        """Parameters and FLOPs with so many units kept."""
        plan = self.cutting.shares(self.ratios(kept)).plan(self.sizes)
        return shape_cost(self.family, self.family.resized_config(self.config, plan))

    def amount(self, kept: Mapping[tuple[str, ...], int]) -> float:
        """What the target counts, with so many units kept."""
        return self.target.amount(*self.cost(kept))

    def options(self, group: Sequence[str], most: float) -> list[int]:
        """All numbers of units that may stay, from all of them down to where the share ``most`` is cut."""
        size, step = self.size(group), self.cutting.shares({}).step
        least = max(kept_count(size, most, step), min(step, size))
        return [size, *(n for n in range(step * ((size - 1) // step), least - 1, -step))]

    def curve(self, group: tuple[str, ...], kept: Sequence[int]) -> list[float]:
        """What the target counts with only this group cut, less what it counts uncut.

        Parameters and FLOPs are polynomials in the number of units, of degree 1 for FFN units, heads and layers and of degree
        2 for the width: three sizes give all others.
        """
        picked = sorted({kept[0], kept[len(kept) // 2], kept[-1]})
        amounts = [self.amount({group: n}) for n in picked]
        return [_lagrange(n, picked, amounts) - amounts[-1] for n in kept]


def _lagrange(at: int, places: Sequence[int], values: Sequence[float]) -> float:
    """The value at ``at`` of the polynomial through the points (Lagrange's form)."""
    total = 0.0
    for i, x in enumerate(places):
        weight = 1.0
        for j, other in enumerate(places):
            if j != i:
                weight *= (at - other) / (x - other)
        total += weight * values[i]
    return total


@dataclass(frozen=True)
class Chosen:
    """What was decided.

    Attributes:
        ratios: for each tower the share to cut; towers that stay as they are have 0.
        facts: for the history, the same in every repetition but where latency is the target.
        timing: for the report.
    """

    ratios: dict[str, float]
    facts: dict[str, Any]
    timing: dict[str, Any]


def choose_ratios(model: CompressedModel, context: Context, cutting: Cutting, target: Target) -> Chosen:
    """Measures what each tower's cuts cost, and chooses the cheapest combination that meets the target.

    The loss of a combination is taken to be the sum of its towers' losses, each the running maximum of what was measured, with
    straight lines between. The combination is then cut and scored once, so that the history says how far that was right.

    Raises:
        DataError: there are no training examples.
        RecipeError: the target cannot be reached, or is already.
    """
    shapes = Shapes(model.family, model.module.config, cutting, target)
    before = target.amount(*shape_cost(model.family, model.module.config))
    timed = target.kind == "latency_ms"
    if not timed:
        _check_reach(shapes, before)
    scoring, held = hold_out(context.need_train("prune"), target.samples, context.seed)
    found = Sensitivity(model, context, scoring, held, timed)
    if timed:
        before = float(found.latency_ms or 0.0)
    groups = shapes.groups()
    curves: dict[tuple[str, ...], list[CutPoint]] = {}
    for group in context.reporter.track(groups, "measuring what cuts cost", len(groups)):
        curves[group] = list(found.curve(cutting, group, target.ratios))
    curves = {group: points for group, points in curves.items() if points}
    limit = target.limit(before)
    if not curves or limit >= before:
        raise RecipeError(already_there(target, before))
    kept, predicted = _solve(shapes, found, curves, before, limit)
    ratios = {tower: round(ratio, 6) for tower, ratio in shapes.ratios(kept).items()}
    new, quality, change = found.cut(cutting, {t: r for t, r in ratios.items() if r > 0})
    loss = sum(_loss_at(found, curves[g], 1 - n / shapes.size(g)) for g, n in kept.items() if g in curves)
    sign = 1 if found.lower_is_better else -1
    goal: dict[str, Any] = {"kind": target.kind, "limit": limit, "before": before, "predicted": predicted}
    facts = {
        "target": goal,
        "metric": found.metric,
        "lower_is_better": found.lower_is_better,
        "examples": quality.n,
        "ratios": ratios,
        "before": _numbers(found.quality.model_dump()),
        "predicted_difference": round(sign * loss, 6) + 0.0,
        "measured": {**_numbers(quality.model_dump()), **_numbers({f"difference{k}": v for k, v in _ends(change)})},
        "curves": {"+".join(group): [_point(p) for p in points] for group, points in curves.items()},
    }
    reached = time_calls(new) if timed else target.amount(new.parameters(), shapes.cost(kept)[1])
    goal["reached"] = reached
    if reached > limit * (1 + 1e-9):
        context.warnings.append(
            f"prune: the target was at most {target.words(limit)} ({target.kind}), {target.words(predicted)} was predicted, and "
            f"it came to {target.words(reached)}."
        )
    return Chosen(ratios, facts, {"latency_before_ms": before, "latency_cut_ms": reached} if timed else {})


def _ends(change: Any) -> list[tuple[str, float]]:
    return [("", change.difference), ("_low", change.low), ("_high", change.high)]


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}


def _point(point: CutPoint) -> dict[str, Any]:
    found = {"ratio": point.ratio, "share": point.share, "kept": point.kept, "parameters": point.parameters}
    found |= {"value": point.quality.value, **{f"difference{k}": v for k, v in _ends(point.change)}}
    return _numbers(found if point.latency_ms is None else {**found, "latency_ms": point.latency_ms})


def _loss_at(found: Sensitivity, points: Sequence[CutPoint], share: float) -> float:
    return interpolate(share, [0.0, *(p.share for p in points)], [0.0, *envelope([found.loss(p.change) for p in points])])


def _check_reach(shapes: Shapes, before: float) -> None:
    """That the target is below what the model has, and not below what the largest cut leaves; before anything is measured."""
    target = shapes.target
    if target.limit(before) >= before:
        raise RecipeError(already_there(target, before))
    most = {group: shapes.options(group, max(target.ratios))[-1] for group in shapes.groups()}
    least = shapes.amount(most)
    if least > target.limit(before):
        raise RecipeError(out_of_reach(shapes, before, least, list(most)))


def already_there(target: Target, before: float) -> str:
    """The message where nothing is to be cut."""
    return (
        f"prune: target.{target.kind}: {target.words(target.limit(before))} at most is asked for, and the model that comes into "
        f"the pass has {target.words(before)}: nothing would be cut; lower it (a number below 1 is a share)"
    )


def out_of_reach(shapes: Shapes, before: float, least: float, groups: Sequence[Sequence[str]]) -> str:
    """The message where even the largest cut leaves too much."""
    target = shapes.target
    towers = ", ".join(t for group in groups for t in group)
    return (
        f"prune: target.{target.kind}: {target.words(target.limit(before))} at most is asked for, of {target.words(before)}; "
        f"cutting {max(target.ratios):g} of {shapes.cutting.axis} (the largest of target.ratios) in {towers} leaves "
        f"{target.words(least)} ({least / before:.3f} of it), which is the least that can be reached; raise the target, or cut "
        "another axis in a pass before this one"
    )


def _solve(
    shapes: Shapes,
    found: Sensitivity,
    curves: Mapping[tuple[str, ...], Sequence[CutPoint]],
    before: float,
    limit: float,
) -> tuple[dict[tuple[str, ...], int], float]:
    """How many units stay in each group, and what the target is predicted to come to.

    The towers' costs are taken to add up; where they do not quite, the budget is tightened until the whole model fits.
    """
    timed = shapes.target.kind == "latency_ms"
    choices: dict[str, list[Choice]] = {}
    for group, points in curves.items():
        kept = shapes.options(group, points[-1].share)
        shares = [1 - n / shapes.size(group) for n in kept]
        costs = _times(points, shares, before) if timed else shapes.curve(group, kept)
        choices["+".join(group)] = [
            Choice(n, share, cost, _loss_at(found, points, share)) for n, share, cost in zip(kept, shares, costs, strict=True)
        ]
    names = {"+".join(group): group for group in curves}

    def total(picked: Mapping[str, Choice]) -> float:
        if timed:
            return before + sum(c.cost for c in picked.values())
        return shapes.amount({names[name]: c.kept for name, c in picked.items()})

    least = total({name: min(own, key=lambda c: c.cost) for name, own in choices.items()})
    budget = limit - before
    for _ in range(TRIES):
        picked = allocate(choices, budget)
        if picked is None:
            break
        amount = total(picked)
        if amount <= limit * (1 + 1e-9):
            return {names[name]: c.kept for name, c in picked.items()}, amount
        budget -= amount - limit
    raise RecipeError(out_of_reach(shapes, before, least, list(curves)))


def _times(points: Sequence[CutPoint], shares: Sequence[float], before: float) -> list[float]:
    """Timings at other shares, less that of the uncut model; a gentler cut is taken to be no faster than a deeper one."""
    measured = [0.0, *((p.latency_ms or before) - before for p in points)]
    falling = [float(v) for v in np.minimum.accumulate(measured)]
    return [interpolate(share, [0.0, *(p.share for p in points)], falling) for share in shares]


def uniform(shapes: Shapes) -> tuple[dict[str, float], str]:
    """One ratio for all towers that meets the target, for plans that are made without weights, and what is assumed.

    Raises:
        RecipeError: the target cannot be reached, or is already.
    """
    said = (
        "one ratio for all towers, the least that meets the target; the run measures what each tower loses and gives each its own"
    )
    if shapes.target.kind == "latency_ms":
        if shapes.target.value >= 1:
            return {}, "milliseconds are known only once they are measured, so nothing is taken to be cut here"
        said += "; latency is taken to fall as FLOPs do"
        like = shapes.target.model_copy(update={"latency_ms": None, "flops": shapes.target.value})
        shapes = replace(shapes, target=like)
    target, groups = shapes.target, shapes.groups()
    before = shapes.amount({})
    if target.limit(before) >= before:
        raise RecipeError(already_there(target, before))
    options = {group: shapes.options(group, max(target.ratios)) for group in groups}

    def at(share: float) -> dict[tuple[str, ...], int]:
        # In each tower the gentlest size that cuts at least the share, or the smallest there is.
        return {g: next((n for n in own if 1 - n / own[0] >= share - 1e-9), own[-1]) for g, own in options.items()}

    shares = sorted({1 - n / own[0] for own in options.values() for n in own})
    if shapes.amount(at(shares[-1])) > target.limit(before):
        raise RecipeError(out_of_reach(shapes, before, shapes.amount(at(shares[-1])), groups))
    low, high = 0, len(shares) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if shapes.amount(at(shares[middle])) <= target.limit(before) else (middle + 1, high)
    return shapes.ratios(at(shares[low])), said
