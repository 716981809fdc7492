"""What cutting a recipe's model costs, tower by tower and axis by axis: for ``mmcompress inspect --sensitivity``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tabulate import tabulate

from mmcompress import registry
from mmcompress.context import Context
from mmcompress.data.examples import Examples
from mmcompress.data.sources import load_data, load_source
from mmcompress.errors import DataError, RecipeError, one_of
from mmcompress.measure.sensitivity import CutPoint, Sensitivity, grid, together
from mmcompress.model import CompressedModel, load
from mmcompress.passes.prune import Prune
from mmcompress.progress import SILENT, Reporter
from mmcompress.pruning.cutting import Cutting, hold_out
from mmcompress.pruning.target import RATIOS
from mmcompress.pruning.units import Axis
from mmcompress.recipe import Recipe, load_recipe, make_recipe
from mmcompress.tasks.base import Task

DEFAULT_CRITERION = "activation"


def sensitivity(
    recipe: str | Path | Recipe | Mapping[str, Any],
    *,
    ratios: Sequence[float] | None = None,
    axes: Sequence[str] | None = None,
    criterion: str | None = None,
    samples: int = 512,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Cuts copies of a recipe's model, one tower along one axis at a time, and scores each right after the cut.

    The examples are training examples (calibration examples where there are none), never those of ``data.eval``: ratios that are
    chosen on the examples that the result is judged by make it look better than it is. Of them ``samples``, at most half, are
    scored; the criterion reads the others.

    Args:
        recipe: a YAML file, a recipe, or a recipe as plain data: its model, task, data and seed are used.
        ratios: shares to cut, above 0 and below 1; 0.125 to 0.875 where left out.
        axes: such as ``ffn``; all that stock transformers reloads where left out.
        criterion: its name; that of the recipe's first prune pass where left out, else ``activation``.
        samples: 16 or more.

    Returns:
        Plain data: ``metric``, ``quality`` of the uncut model and ``curves``, a list with ``tower``, ``axis`` and ``points``;
        differences are paired, cut model minus uncut model, with their 95% interval.

    Raises:
        DataError: the recipe has neither train nor calibration examples, or fewer than two.
        RecipeError: a ratio, axis or criterion that does not exist, or nothing that could be cut.
    """
    plan = _as_recipe(recipe)
    shares = _checked(ratios if ratios else RATIOS)
    name = criterion or next((step.criterion for step in plan.passes if isinstance(step, Prune)), DEFAULT_CRITERION)
    if name not in registry.names("criteria"):
        raise RecipeError("criterion: " + one_of("criterion", name, registry.names("criteria")))
    examples = _examples(plan)
    model = load(plan.model, trust_remote_code=plan.trust_remote_code)
    plan.task.fits(model.family.abilities, model.family.name)
    jobs = _jobs(model, plan, _axes(model, axes, name), name)
    task = cast(Task, plan.task)
    scoring, held = hold_out(examples, samples, plan.seed)
    context = Context(task=task, train=scoring, seed=plan.seed, device="auto", reporter=reporter)
    measured = Sensitivity(model, context, scoring, held)
    curves: list[dict[str, Any]] = []
    steps = [(cutting, group, ratio) for cutting, group in jobs for ratio, _ in grid(model, cutting, group, shares)]
    for cutting, group, ratio in reporter.track(steps, "cutting and scoring", len(steps)):
        tower = "+".join(group)
        if not curves or (curves[-1]["tower"], curves[-1]["axis"]) != (tower, cutting.axis):
            curves.append({"tower": tower, "axis": cutting.axis, "points": []})
        curves[-1]["points"] += [_plain(point) for point in measured.curve(cutting, group, [ratio])]
    return {
        "model": plan.model,
        "task": task.type,
        "data": held.name,
        "synthetic": held.synthetic or plan.model.startswith("bundled:"),
        "criterion": name,
        "metric": measured.metric,
        "lower_is_better": measured.lower_is_better,
        "quality": measured.quality.model_dump(),
        "parameters": model.parameters(),
        "curves": curves,
    }


def _as_recipe(recipe: str | Path | Recipe | Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return make_recipe(recipe) if isinstance(recipe, Mapping) else load_recipe(recipe)


def _checked(ratios: Sequence[float]) -> list[float]:
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise RecipeError(f"--ratio {ratio:g}: allowed: above 0 and below 1")
    return sorted(set(ratios))


def _examples(recipe: Recipe) -> Examples:
    """Training examples, or else calibration examples.

    Raises:
        DataError: there are none, or too few to score on some and to judge units by others.
    """
    which = next((w for w in ("train", "calibration") if getattr(recipe.data, w) is not None), None)
    if which is None:
        raise DataError(
            "sensitivity is measured on data.train (or data.calibration), which the recipe does not have; data.eval is not used: "
            "ratios that are chosen on it would make the report's quality a leak"
        )
    source = getattr(recipe.data, which)
    found = load_source(source, which, recipe.seed) if source.from_ is None else load_data(recipe.data, recipe.seed)[which]
    found.narrow(recipe.task.roles, recipe.task.type, recipe.task.optional)
    if len(found) < 2:
        raise DataError(f"{found.name}: has {len(found)} example; sensitivity needs at least 2")
    return found


def _axes(model: CompressedModel, axes: Sequence[str] | None, criterion: str) -> list[Axis]:
    stock = [axis for axis in model.family.axes if axis in model.family.stock_axes]
    for axis in axes or ():
        if axis not in stock:
            raise RecipeError("--axis: " + one_of("axis", axis, stock))
    chosen = [axis for axis in stock if not axes or axis in axes]
    able = registry.stated("criteria", criterion, "axes", chosen)
    return cast(list[Axis], [axis for axis in chosen if axis in able])


def _jobs(model: CompressedModel, recipe: Recipe, axes: Sequence[Axis], criterion: str) -> list[tuple[Cutting, tuple[str, ...]]]:
    """What is measured: how it is cut, and which towers together."""
    first = next((step for step in recipe.passes if isinstance(step, Prune)), None)
    like = Prune.model_validate({"pass": "prune", "ratio": 0.5}) if first is None else first
    found = []
    for axis in axes:
        having = [tower for tower in model.family.towers if axis in model.family.tower_axes(tower)]
        cutting = Cutting(axis, criterion, like.round_to, samples=like.samples, batch_size=like.batch_size)
        cutting = replace(cutting, reconstruct=like.reconstruct and axis in ("ffn", "heads"))
        found += [(cutting, group) for group in together(model.family, axis, having)]
    if model.custom or not found:
        why = "its shapes are custom" if model.custom else f"criterion {criterion} and these axes leave nothing to cut"
        raise RecipeError(f"sensitivity of {recipe.model}: {why}")
    return found


def _plain(point: CutPoint) -> dict[str, Any]:
    return {
        "ratio": point.ratio,
        "share": point.share,
        "kept": point.kept,
        "parameters": point.parameters,
        **point.quality.model_dump(include={"value", "low", "high"}),
        "difference": point.change.difference,
        "difference_low": point.change.low,
        "difference_high": point.change.high,
        "verdict": point.change.verdict,
    }


def render_sensitivity(found: Mapping[str, Any]) -> str:
    """The same as text."""
    quality = found["quality"]
    direction = ", lower is better" if found["lower_is_better"] else ""
    lines = [
        f"{found['model']} on {quality['n']} examples of {found['data']}{' (synthetic)' if found['synthetic'] else ''}: "
        f"{found['metric']}{direction} {100 * quality['value']:.2f} uncut",
        f"each line cuts one tower alone, by {found['criterion']}, and scores right after the cut, before any training",
        "",
    ]
    rows = [
        [
            curve["tower"],
            curve["axis"],
            f"{p['ratio']:g}",
            p["kept"],
            f"{p['parameters'] / found['parameters']:.3f}",
            f"{100 * p['value']:.2f}",
            f"{100 * p['difference']:+.2f}",
            f"{100 * p['difference_low']:+.2f} to {100 * p['difference_high']:+.2f}",
        ]
        for curve in found["curves"]
        for p in curve["points"]
    ]
    headers = ["tower", "axis", "ratio", "kept", "parameters left", found["metric"], "points", "95% interval"]
    return "\n".join([*lines, tabulate(rows, headers=headers, disable_numparse=True)])
