"""Cutting in rounds with recovery between them, under one learning rate schedule.

In every round the same share of what is there is cut, so that no single cut is deep; NVIDIA's Model-Optimizer advises the same
past a half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmcompress.context import Context
from mmcompress.model import CompressedModel
from mmcompress.pruning import cut
from mmcompress.pruning.allocate import spread
from mmcompress.pruning.cutting import Cutting
from mmcompress.pruning.units import Shares
from mmcompress.training.loop import train
from mmcompress.training.objective import DistillObjective, distillation
from mmcompress.training.settings import DistillationSettings

SEED_STEP = 1_000_003
"""Between the seeds of two rounds' trainings: with one seed all of them would see the same examples first."""
ADDED = (
    "steps",
    "examples_seen",
    "seconds",
    "data_seconds",
    "resumed_seconds",
    "teacher_seconds",
    "teacher_examples",
    "teacher_texts",
)


@dataclass(frozen=True)
class Round:
    """One cut on the way to the final sizes.

    Attributes:
        ratios: for each tower the share of what is there now that goes.
        kept: for each tower how many units stay, as ``units_of`` counts them.
    """

    ratios: Mapping[str, float]
    kept: Mapping[str, int]


def units_of(model: CompressedModel, shares: Shares) -> dict[str, int]:
    """For each tower that is cut how many units its share is taken of: a layer's, or all layers' where they are ranked as one."""
    found = {}
    for tower in shares.towers():
        if shares.axis == "depth":
            found[tower] = len(model.family.layers(model.module, tower))
            continue
        groups = cut.groups_of(model, tower, shares)
        block = groups[0].block  # a residual width goes in heads, which come first
        units = [group.size // block for group in groups if group.axis == shares.axis]
        found[tower] = sum(units) if shares.scope == "tower" else min(units)
    return found


def plan_rounds(shares: Shares, units: Mapping[str, int], rounds: int) -> list[Round]:
    """The cuts, one a round; rounds in which rounding leaves nothing to cut are left out."""
    kept = {tower: spread(size, shares.kept(tower, size), rounds, shares.step) for tower, size in units.items()}
    found, now = [], dict(units)
    for k in range(rounds):
        after = {tower: sizes[k] for tower, sizes in kept.items()}
        ratios = {tower: 1 - after[tower] / now[tower] for tower in after if after[tower] < now[tower]}
        if ratios:
            found.append(Round(ratios, after))
        now = after
    return found


def cut_and_recover(
    model: CompressedModel, context: Context, cutting: Cutting, shares: Shares, rounds: int, recovery: DistillationSettings
) -> dict[str, Any]:
    """Cuts ``model`` in place, round by round, and trains it after each cut.

    Args:
        rounds: over how many the cut is spread.
        recovery: its epochs and steps are those of all rounds together.

    Returns:
        Facts for the history: for each round the sizes, the losses and, for the axis ``depth``, the old numbers of the layers
        that stay.

    Raises:
        DataError: no task, no training examples, or no teacher.
        TrainingError: a score, a loss or a gradient is not finite.
    """
    context.need_task("prune")
    plan = plan_rounds(shares, units_of(model, shares), rounds)
    if context.baseline is None and recovery.teacher == "baseline":
        original = model.clone()
        context = replace(context, baseline=lambda: original)
    objective: DistillObjective | None = None
    layers: dict[str, list[int]] = {}
    told: list[dict[str, Any]] = []
    spent: dict[str, Any] = {}
    for k, one in enumerate(plan):
        context.reporter.say(f"  round {k + 1} of {len(plan)}: {_words(one)}")
        said = cutting.cut(model, replace(shares, ratios=one.ratios), context)
        for tower, kept in said.pop("kept_layers", {}).items():
            layers[tower] = [layers[tower][i] for i in kept] if tower in layers else kept
        own = replace(context, seed=context.seed + SEED_STEP * k, facts={})
        objective = _objective(objective, recovery, model, context)
        span = (k / len(plan), (k + 1) / len(plan))
        facts = train(model, own, _part(recovery, k, len(plan)), objective, "prune", span=span)
        context.trainings = own.trainings
        _add(spent, own.facts)
        losses = {name: facts[name] for name in ("steps", "examples", "first_loss", "final_loss", "final_losses")}
        done = {"sizes": cut.sizes(model), "parameters": model.parameters(), **losses, **said}
        told.append({**done, "kept_layers": dict(layers)} if layers else done)
    context.facts |= spent
    found: dict[str, Any] = {"rounds": told}
    return {**found, "kept_layers": layers} if layers else found


def _words(one: Round) -> str:
    return ", ".join(f"{tower} to {count}" for tower, count in one.kept.items() if tower in one.ratios)


def _objective(
    last: DistillObjective | None, recovery: DistillationSettings, model: CompressedModel, context: Context
) -> DistillObjective:
    """The losses for the student of this round's sizes. The teacher is loaded once, and remembers what it was asked."""
    if last is None:
        return distillation(recovery, model, context, "prune")
    return DistillObjective(context.need_task("prune"), recovery.weights(context.need_task("prune")), model, last.teacher)


def _part(recovery: DistillationSettings, k: int, parts: int) -> DistillationSettings:
    """The settings of one round: its share of the epochs, and of the steps where those are bounded."""
    steps = recovery.max_steps
    mine = None if steps is None else max(1, steps // parts + (k < steps % parts))
    return recovery.model_copy(update={"epochs": recovery.epochs / parts, "max_steps": mine})


def _add(total: dict[str, Any], facts: Mapping[str, Any]) -> None:
    """Adds up what several trainings took; of everything else the last one's counts."""
    for key, value in facts.items():
        total[key] = round(total.get(key, 0) + value, 3) if key in ADDED else value
    if total.get("seconds"):
        total["examples_per_second"] = round(total["examples_seen"] / total["seconds"], 2)
