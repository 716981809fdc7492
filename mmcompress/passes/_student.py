"""The student of `distill`: cut out of the model that the pass is given, or a checkpoint or config of the user's.

Importable without torch, so that recipes are checked fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from mmcompress import registry
from mmcompress.context import Context
from mmcompress.errors import ModelError, RecipeError, one_of
from mmcompress.passes.prune import Prune

if TYPE_CHECKING:
    from mmcompress.families.base import Family
    from mmcompress.model import CompressedModel

Sizes = Mapping[str, Mapping[str, int]]
Kept = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Layers = Annotated[int, Field(ge=1)]


class Shape(BaseModel):
    """How much of the model a student keeps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: Layers | Kept | None = Field(None, description="Layers that stay: their number, or a share above 0 and below 1.")
    ffn: Kept | None = Field(None, description="Share of the feed-forward layers' hidden units that stays.")
    width: Kept | None = Field(None, description="Share of the residual width, in whole heads, that stays.")
    criterion: str = Field(
        "activation",
        description="How units are ranked; `mmcompress list criteria` shows all. Layers are always spaced as far as can be.",
    )

    @field_validator("criterion")
    @classmethod
    def _ranks_units(cls, value: str) -> str:
        known = [n for n in registry.names("criteria") if set(registry.stated("criteria", n, "axes", ("ffn",))) - {"depth"}]
        if value not in known:
            raise ValueError(one_of("criterion", value, known))
        return value

    @model_validator(mode="after")
    def _smaller(self) -> Shape:
        if self.depth is None and self.ffn is None and self.width is None:
            raise ValueError("says nothing to make smaller; allowed: depth, ffn, width")
        return self


def _kind(value: Any) -> str:
    """Which of the three forms a value is meant to be, so that a mistake in it is told once."""
    if isinstance(value, str):
        return ":name"
    each = isinstance(value, Mapping) and bool(value) and all(isinstance(v, (Mapping, Shape)) for v in value.values())
    return ":towers" if each else ":shape"


Student = Annotated[
    Annotated[Shape, Tag(":shape")]
    | Annotated[dict[str, Shape], Tag(":towers")]
    | Annotated[str, Field(min_length=1), Tag(":name")],
    Discriminator(_kind),
]
"""One shape for all towers, a shape for each, or a model's name."""


def mistakes(student: Shape | dict[str, Shape], family: Family, sizes: Sizes) -> list[str]:
    """What cannot be cut as it is asked for in a model of these sizes, a sentence each."""
    found, passes = _passes(student, family, sizes)
    if found:
        return found
    for step in passes:
        found += [f"student: {text}" for text in step.check_against(family, sizes)]
        sizes = step.plan(sizes)
    return found


def plan(student: Shape | dict[str, Shape], family: Family, sizes: Sizes) -> dict[str, dict[str, int]]:
    """The student's sizes."""
    for step in _passes(student, family, sizes)[1]:
        sizes = step.plan(sizes)
    return {tower: dict(axes) for tower, axes in sizes.items()}


def inherit(
    student: Shape | dict[str, Shape], model: CompressedModel, context: Context
) -> tuple[CompressedModel, dict[str, Any]]:
    """Cuts a student out of a copy of the model: its best units, ranked in the whole model, then its spaced layers.

    Returns:
        The student, and facts for the history.

    Raises:
        RecipeError: the shape does not fit the model.
        DataError: the criterion needs examples, and there are none.
        ModelError: no stock config has these shapes.
    """
    from mmcompress.pruning.cut import sizes, smallest

    now, parameters = smallest(sizes(model)), model.parameters()  # the model itself is cut where it may be consumed
    wrong = mistakes(student, model.family, now)
    if wrong:
        raise RecipeError("distill: " + "; ".join(wrong))
    facts: dict[str, Any] = {}
    new = model
    for step in _passes(student, model.family, now)[1]:
        new, said = step.run(new, context)
        context = replace(context, consume=True)
        facts |= {key: said[key] for key in said if key == "kept_layers"}
    after = sizes(new)
    facts["sizes"] = {tower: {"before": now[tower], "after": after[tower]} for tower in model.family.towers}
    facts["parameters"] = {"before": parameters, "after": new.parameters()}
    return new, facts


def _passes(student: Shape | dict[str, Shape], family: Family, sizes: Sizes) -> tuple[list[str], list[Prune]]:
    """What is wrong, and the prunings that make the student; towers that are cut alike are cut together."""
    each = isinstance(student, dict)
    shapes = student if isinstance(student, dict) else dict.fromkeys(family.towers, student)
    wrong = ["student: " + one_of("tower", tower, family.towers) for tower in shapes if tower not in family.towers]
    passes = []
    for axis in ("ffn", "width", "depth"):
        asked = [tower for tower, shape in shapes.items() if getattr(shape, axis) is not None and tower in sizes]
        having = [tower for tower in asked if axis in sizes[tower]]
        # A shape for all towers means those that can be cut that way; a shape for one means that one.
        if asked and not having and not each:
            wrong.append(f"student: {axis} cannot be cut in the family {family.name}; it has: {', '.join(family.axes)}")
        if each:
            wrong += [
                f"student: {axis} cannot be cut in the {tower} tower; it has: {', '.join(sizes[tower])}"
                for tower in asked
                if tower not in having
            ]
        ratios: dict[str, dict[str, float]] = {}
        for tower in having:
            size, kept = sizes[tower][axis], getattr(shapes[tower], axis)
            if isinstance(kept, int) and kept > size:
                wrong.append(f"student: depth: the {tower} tower has {size} layers, fewer than the {kept} that are to stay")
            elif kept != size:
                criterion = "spacing" if axis == "depth" else shapes[tower].criterion
                ratios.setdefault(criterion, {})[tower] = 1 - kept / size if isinstance(kept, int) else 1 - kept
        for criterion, own in ratios.items():
            passes.append(Prune.model_validate({"axis": axis, "ratio": own, "criterion": criterion}))
    return wrong, passes


def replacement(name: str, model: CompressedModel, teacher: str, context: Context) -> CompressedModel:
    """A student of the user's: a checkpoint, or a folder with no more than a config, whose weights start from the run's seed.

    A student without weights gets the teacher's processor.

    Args:
        name: a hub id or a folder.
        model: what the pass was given.
        teacher: as the recipe names it, ``baseline`` for the model that the run began with.

    Raises:
        ModelError: it cannot be loaded, or its config builds no model.
    """
    import copy

    import torch

    from mmcompress.config import DAMAGE, check_config, family_of, load_config, one_line, resolve
    from mmcompress.model import load
    from mmcompress.processor import check_processor, load_processor

    where = resolve(name)
    if not isinstance(where, Path) or any(where.glob("*.safetensors")) or any(where.glob("*.bin")):
        student = load(name)
        student.onnx = None
        return student
    config = load_config(name)
    family = family_of(config, name)
    check_config(config, family, name)
    processor = copy.copy(model.processor if teacher == "baseline" else load_processor(resolve(teacher)))
    processor.family, processor.config, processor.max_length = family, config, family.text_limit(config)
    check_processor(processor, config, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        try:
            module = family.model_class()(config).eval()
        except DAMAGE as e:
            raise ModelError(f"model {name}: no model can be built from its config: {one_line(e)}") from e
    return type(model)(module, processor, family, name)
