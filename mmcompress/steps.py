"""Applying one step of a run to what the steps before it left: by the main process, and by those that train beside it."""

from __future__ import annotations

import logging
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mmcompress import processes
from mmcompress.context import Context
from mmcompress.data.examples import KINDS, Examples
from mmcompress.data.sources import load_data, load_source
from mmcompress.logs import silence_libraries
from mmcompress.measure import energy
from mmcompress.model import CompressedModel, load
from mmcompress.progress import SILENT, Reporter
from mmcompress.recipe import Recipe
from mmcompress.run_folder import TRAINING


def step_names(recipe: Recipe) -> list[str]:
    """The folders of a run's steps in ``steps/``, the baseline's first."""
    return ["00-baseline", *(f"{i:02d}-{step.name}" for i, step in enumerate(recipe.passes, 1))]


def load_examples(recipe: Recipe) -> dict[str, Examples]:
    """The splits of a recipe's data with the columns that its task reads.

    Raises:
        DataError: a split cannot be read, or lacks a column.
    """
    data = load_data(recipe.data, recipe.seed)
    for examples in data.values():
        examples.narrow(recipe.task.roles, recipe.task.type, recipe.task.optional)
    outside = load_outside(recipe)
    return data if outside is None else {**data, "ood": outside}


def load_outside(recipe: Recipe) -> Examples | None:
    """The media of ``data.ood``, or None where the recipe has none.

    Raises:
        DataError: it cannot be read, or has no column of the media that the task reads.
    """
    if recipe.data.ood is None:
        return None
    found = load_source(recipe.data.ood, "ood", recipe.seed)
    found.narrow({role: what for role, what in recipe.task.roles.items() if role in KINDS}, recipe.task.type)
    return found


def apply_step(
    recipe: Recipe, folder: Path, data: dict[str, Examples], i: int, last: int, work: Path, reporter: Reporter
) -> tuple[CompressedModel, dict[str, Any]]:
    """Applies pass ``i`` to the model that step ``last`` left in a run's folder.

    Args:
        work: an empty folder for scratch files.

    Returns:
        The new model, which may have files in ``work``, and what is noted of the step.
    """
    names = step_names(recipe)
    before = load(folder / "steps" / names[last])
    context = Context(
        task=recipe.task,
        train=data.get("train"),
        calibration=data.get("calibration"),
        baseline=lambda: load(folder / "steps" / names[0]),
        seed=recipe.seed * 1000 + i,
        workdir=work,
        checkpoints=folder / TRAINING / names[i],
        reporter=reporter,
        consume=True,
    )
    start = time.monotonic()
    step = recipe.passes[i - 1]
    with nullcontext() if step.trains() else processes.alone(), energy.Meter() as meter:
        after = step.apply(before, context=context)
    # Of a step that went on from a checkpoint, only the part that ran now is known: that is no number to show.
    if meter.joules is None or "resumed_seconds" in context.facts:
        context.facts["energy"] = meter.counters.reason or "a step that was resumed"
    else:
        context.facts["joules"] = round(meter.joules, 1)
    seconds = time.monotonic() - start + context.facts.get("resumed_seconds", 0.0)
    return after, {"seconds": seconds, "warnings": context.warnings, "facts": context.facts}


def follow(recipe: Recipe, folder: Path) -> bool:
    """What a process that is not the main one does: it trains when that one does, and waits in between.

    What it makes is thrown away: the main process has the same.

    Returns:
        Whether the run met its gates.
    """
    silence_libraries()
    logging.disable(logging.WARNING)
    data: dict[str, Examples] = {}
    while not isinstance(message := processes.told(), bool):
        data = data or load_examples(recipe)
        i, last = message
        with tempfile.TemporaryDirectory(prefix="mmcompress-") as work:
            apply_step(recipe, folder, data, i, last, Path(work), SILENT)
    return message
