"""Whether a recipe fits, what it will do and about what that will cost, found without loading weights."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from mmcompress.config import check_config, family_of, load_config
from mmcompress.errors import RecipeError
from mmcompress.families.base import Family
from mmcompress.measure.size import shape_cost
from mmcompress.passes.base import Pass
from mmcompress.recipe import Recipe
from mmcompress.training.settings import TrainingSettings

FLOAT_BYTES = 4
TRAINING_COPIES = 4
"""Weights, gradients and the two moments of AdamW."""


@dataclass
class PlannedStep:
    """One step's estimates.

    Attributes:
        flops: of one example through all components, 2 per multiply-add.
        memory_bytes: of weights, gradients and optimizer states while the step runs; activations are not counted.
        assumed: what was taken for what a run would measure.
        seconds: very rough, from the speed of one matrix product on this machine now; None where it cannot be told.
    """

    step: str
    parameters: int
    disk_bytes: int
    flops: int
    memory_bytes: int
    seconds: float | None
    sizes: dict[str, dict[str, int]]
    assumed: str = ""


@dataclass
class _Fitted:
    """A pass and what it is given.

    Attributes:
        config: of the model before the pass, but for its sizes.
        sizes: after the pass.
        assumed: what was taken for what a run would measure.
    """

    step: Pass
    family: Family
    config: PretrainedConfig
    sizes: dict[str, dict[str, int]]
    assumed: str


def fit(recipe: Recipe) -> None:
    """Tries each pass on what the passes before it leave, by the model's config alone.

    Raises:
        RecipeError: a pass does not fit the model (an unknown tower, a ratio that leaves nothing) or this machine (a package is
            missing), each with its key.
        ModelError: the model's config cannot be read.
    """
    _fitted(recipe, *_model(recipe, recipe.model, recipe.trust_remote_code))


def _fitted(recipe: Recipe, config: PretrainedConfig, family: Family, sizes: dict[str, dict[str, int]]) -> list[_Fitted]:
    """The passes on a model."""
    found, mistakes = [], []
    for i, step in enumerate(recipe.passes):
        other = step.replacement()
        if other is not None:
            config, family, sizes = _model(recipe, other)
        wrong = step.check_against(family, sizes)
        if wrong:
            mistakes += [f"passes.{i} ({step.name}): {text}" for text in wrong]
            continue
        try:
            step, assumed = step.settled(family, family.resized_config(config, sizes))
        except RecipeError as e:
            mistakes.append(f"passes.{i} ({step.name}): {str(e).removeprefix(step.name + ': ')}")
            continue
        sizes = step.plan_for(family, sizes)
        found.append(_Fitted(step, family, config, sizes, assumed))
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return found


def _model(
    recipe: Recipe, name: str, trust_remote_code: bool = False
) -> tuple[PretrainedConfig, Family, dict[str, dict[str, int]]]:
    """A model's config, family and sizes, checked as `load` does."""
    config = load_config(name, trust_remote_code=trust_remote_code)
    family = family_of(config, name)
    check_config(config, family, name)
    recipe.task.fits(family.abilities, family.name)
    return config, family, {tower: dict(axes) for tower, axes in family.config_sizes(config).items()}


def plan(recipe: Recipe, train_examples: int | None = None) -> list[PlannedStep]:
    """Estimates for the baseline and every pass.

    Args:
        train_examples: how many training examples there are, where that is known.

    Raises:
        RecipeError: see `fit`.
        ModelError: see `fit`.
    """
    config, family, sizes = _model(recipe, recipe.model, recipe.trust_remote_code)
    fitted = _fitted(recipe, config, family, sizes)
    parameters, flops = shape_cost(family, config)
    found = [PlannedStep("baseline", parameters, parameters * FLOAT_BYTES, flops, parameters * FLOAT_BYTES, None, sizes)]
    weight_bytes: float = FLOAT_BYTES
    rate = _flops_per_second()
    for i, one in enumerate(fitted):
        step, before = one.step, found[-1].parameters
        parameters, flops = shape_cost(one.family, one.family.resized_config(one.config, one.sizes))
        settings: object = step
        training = settings if isinstance(settings, TrainingSettings) else getattr(step, "training", None)
        trains = training is not None
        taught = step.name in ("distill", "qat") or (trains and step.name == "prune")
        weight_bytes = step.weight_bytes() or weight_bytes
        disk = round(parameters * weight_bytes)
        memory = before * FLOAT_BYTES * (TRAINING_COPIES + (1 if taught else 0) if trains else 2)
        # Rounds of pruning train models of all sizes from the old to the new one.
        trained = (flops + found[-1].flops) // 2 if step.name == "prune" else flops
        seconds = _seconds(training, trained, found[0].flops if taught else 0, train_examples, rate) if training else None
        found.append(PlannedStep(f"{i + 1}-{step.name}", parameters, disk, flops, memory, seconds, one.sizes, one.assumed))
    return found


def _seconds(settings: TrainingSettings, flops: int, teacher_flops: int, examples: int | None, rate: float) -> float | None:
    if settings.max_steps is not None:
        seen: float = settings.max_steps * settings.batch_size
    elif examples is not None:
        seen = settings.epochs * examples
    else:
        return None
    # A backward pass costs about two forward passes.
    return float(seen * (3 * flops + teacher_flops) / rate)


def _flops_per_second() -> float:
    """Speed of a float32 matrix product here and now, times a half: layers are smaller and do more than multiply."""
    a = torch.randn(768, 768)
    a @ a
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    return 0.5 * 5 * 2 * 768**3 / (time.perf_counter() - start)
