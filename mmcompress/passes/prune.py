"""Cuts whole units (FFN neurons, layers, heads, residual width) and leaves a smaller stock model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from mmcompress import registry
from mmcompress.context import Context
from mmcompress.errors import RecipeError, one_of
from mmcompress.passes.base import Pass
from mmcompress.pruning.units import Axis, Scope, Shares, axis_mistake

if TYPE_CHECKING:
    from mmcompress.families.base import Family
    from mmcompress.model import CompressedModel

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Prune(Pass):
    """Structured pruning. Follow it with `distill` or `finetune`: pruning and recovery are one thing."""

    changes: ClassVar[Literal["weights", "files"]] = "weights"

    name: Literal["prune"] = Field("prune", alias="pass", description="The pass's name.")
    axis: Axis = Field(
        "ffn",
        description="What is cut: `ffn` hidden units of the feed-forward layers, `depth` whole layers, `width` the residual "
        "width together with whole heads, `heads` attention heads alone (only decoders with grouped queries have a config key "
        "for it; elsewhere allow_custom). `mmcompress inspect <model>` shows what each tower has.",
    )
    ratio: Share | dict[str, Share] = Field(
        description="Share of the units to cut, 0 to under 1: one number for all towers that have the axis, or a number for each "
        "tower by name. A tower with 0 or none stays as it is.",
    )
    criterion: str = Field(
        "magnitude",
        description="How units are ranked, by name; `mmcompress list criteria` shows all. Those that look at "
        "examples, such as taylor, read data.train.",
    )
    samples: int = Field(
        512, ge=8, le=100_000, description="Training examples that the criterion looks at, where it looks at any, 8 to 100000."
    )
    batch_size: int = Field(64, ge=2, le=65_536, description="Examples in one batch while scoring, 2 to 65536.")
    scope: Scope = Field(
        "layer",
        description="`layer` cuts the same share in every layer; `tower` ranks units over all layers of a tower, so that widths "
        "differ, which no stock config can say: allow_custom. For ffn and heads only.",
    )
    round_to: int = Field(
        8,
        ge=1,
        le=1024,
        description="Kept FFN widths are multiples of this many units, 1 to 1024: kernels are fast on multiples of 8.",
    )
    allow_custom: bool = Field(
        False, description="Allow a result that stock transformers cannot load; mmcompress and ONNX runtimes still do."
    )

    @property
    def uses(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the criterion here
        """The splits that the pass reads."""
        return ("train",) if registry.stated("criteria", self.criterion, "needs_data", False) else ()

    @field_validator("criterion")
    @classmethod
    def _known_criterion(cls, value: str) -> str:
        if value not in registry.names("criteria"):
            raise ValueError(one_of("criterion", value, registry.names("criteria")))
        return value

    @field_validator("ratio")
    @classmethod
    def _cuts_something(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        if not any(value.values() if isinstance(value, dict) else [value]):
            raise ValueError("would cut nothing; at least one ratio must be above 0")
        return value

    @model_validator(mode="after")
    def _stock_or_allowed(self) -> Self:
        if self.scope == "tower" and self.axis not in ("ffn", "heads"):
            raise ValueError(
                f"scope: tower ranks units over layers, and {self.axis} is one choice for the tower; leave scope out"
            )
        axes = registry.stated("criteria", self.criterion, "axes", (self.axis,))
        if self.axis not in axes:
            raise ValueError(f"criterion: {axis_mistake(self.criterion, self.axis, axes)}")
        if self.allow_custom:
            return self
        otherwise = "or set allow_custom: true, and only mmcompress and ONNX runtimes load the result"
        if self.scope == "tower":
            raise ValueError(
                f"scope: tower gives layers of differing widths, which no stock config can say; use scope: layer, {otherwise}"
            )
        return self

    def _shares(self, sizes: Mapping[str, Mapping[str, Any]]) -> Shares:
        having = [tower for tower, axes in sizes.items() if self.axis in axes] or list(sizes)
        ratios = self.ratio if isinstance(self.ratio, dict) else dict.fromkeys(having, self.ratio)
        return Shares(self.axis, ratios, self.round_to, self.scope)

    def _unlike(self, family: Family, shares: Shares) -> list[str]:
        """What the family cannot do: shapes without a stock config, towers cut apart that share a size."""
        wrong = []
        cut = shares.towers()
        if not self.allow_custom and self.axis in family.axes and self.axis not in family.stock_axes:
            instead = "use axis: width, or " if self.axis == "heads" and "width" in family.stock_axes else ""
            wrong.append(
                f"axis: {self.axis} alone leaves a shape that no stock config of the family {family.name} can say; {instead}set "
                "allow_custom: true, and only mmcompress and ONNX runtimes load the result"
            )
        together = family.cut_together(self.axis)
        if any(tower in together for tower in cut) and len({shares.ratios.get(tower, 0.0) for tower in together}) > 1:
            wrong.append(f"ratio: the towers {' and '.join(together)} share their {self.axis}; give all of them the same ratio")
        return wrong

    def check_against(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        """What cannot be cut in a model of these sizes: unknown towers and axes, shares that round to nothing or to all."""
        shares = self._shares(sizes)
        return [*self._unlike(family, shares), *shares.mistakes(family.towers, sizes)]

    def plan(self, sizes: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
        """The towers' sizes after the pass; with scope `tower` the mean over the layers."""
        return self._shares(sizes).plan(sizes)

    def run(self, model: CompressedModel, context: Context) -> tuple[CompressedModel, dict[str, Any]]:
        """Scores, cuts and rebuilds a copy of the model.

        Raises:
            RecipeError: the settings do not fit the model.
            DataError: the criterion needs examples, and there are none.
            ModelError: the result would need a custom model.
            TrainingError: scores are not numbers.
        """
        from mmcompress.families.base import count, tower_parameters
        from mmcompress.pruning import cut
        from mmcompress.pruning.criteria.base import Probe
        from mmcompress.training.device import pick_device

        before = cut.sizes(model)
        shares = self._shares(before)
        mistakes = self.check_against(model.family, cut.smallest(before))
        if mistakes:
            raise RecipeError("prune: " + "; ".join(mistakes))
        criterion = registry.find("criteria", self.criterion).CRITERION()
        counts = {t: count(p) for t, p in tower_parameters(model.family, model.module).items()}
        new = context.copy_of(model)
        probe = Probe(new, context.seed, samples=self.samples, batch_size=self.batch_size, reporter=context.reporter)
        probe.warnings = context.warnings
        if criterion.needs_data:
            probe.task, probe.examples = context.need_task("prune"), context.need_train("prune")
            probe.device = pick_device(context.device)
        facts: dict[str, Any] = {}
        if self.axis == "depth":
            facts["kept_layers"] = cut.prune_layers(new, shares, criterion, probe)
        else:
            facts |= cut.prune_units(new, shares, criterion, probe)
        cut.rebuild(new, self.allow_custom)
        after = cut.sizes(new)
        facts["sizes"] = {tower: {"before": before[tower], "after": after[tower]} for tower in model.family.towers}
        parameters = {t: count(p) for t, p in tower_parameters(new.family, new.module).items()}
        facts["parameters"] = {tower: {"before": old, "after": parameters[tower]} for tower, old in counts.items()}
        return new, facts


PASS = Prune
