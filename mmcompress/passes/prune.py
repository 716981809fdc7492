"""Cuts whole units (FFN neurons, layers, heads, residual width) and leaves a smaller stock model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from mmcompress import registry
from mmcompress.context import Context
from mmcompress.errors import RecipeError, one_of
from mmcompress.passes.base import Pass
from mmcompress.pruning.target import Target
from mmcompress.pruning.units import Axis, Heads, Scope, Shares, axis_mistake
from mmcompress.training.settings import DistillationSettings

if TYPE_CHECKING:
    from mmcompress.families.base import Family
    from mmcompress.model import CompressedModel
    from mmcompress.pruning.cutting import Cutting

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Recovery(DistillationSettings):
    """How the model is trained after each cut: the keys of `distill`, with epochs and steps over all rounds together."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Prune(Pass):
    """Structured pruning. Follow it with `distill` or `finetune`, or give it `recovery`: pruning and recovery are one thing."""

    changes: ClassVar[Literal["weights", "files"]] = "weights"

    name: Literal["prune"] = Field("prune", alias="pass", description="The pass's name.")
    axis: Axis = Field(
        "ffn",
        description="What is cut: `ffn` hidden units of the feed-forward layers, `depth` whole layers, `width` the residual "
        "width together with the attention heads, `heads` these alone (only decoders with grouped queries have a config "
        "key for it; elsewhere allow_custom). `mmcompress inspect <model>` shows what each tower has.",
    )
    ratio: Share | dict[str, Share] | Literal["auto"] = Field(
        description="Share of the units to cut, 0 to under 1: one number for all towers that have the axis, or a number for each "
        "tower by name. A tower with 0 or none stays as it is. auto: what cuts of each tower cost in the task's headline metric "
        "is measured on training examples, and the cheapest ratios that meet `target` are taken; with allow_custom, FFN units "
        "and heads are ranked over all layers of a tower.",
    )
    target: Target | None = Field(
        None,
        description="For ratio: auto, how small the model is to become: one of parameters, flops, latency_ms, disk_bytes, "
        "such as {parameters: 0.6}; below 1 it is a share of the model as it comes into the pass. Beside it: towers, ratios, "
        "samples.",
    )
    rounds: int = Field(
        1,
        ge=1,
        le=100,
        description="Over how many rounds the cut is spread, 1 to 100, with training after each; units are scored anew.",
    )
    recovery: Recovery | None = Field(
        None,
        description="Training after each cut, with the keys of `distill`: epochs and max_steps are those of all rounds together, "
        "and all rounds share one learning rate schedule. Its defaults where rounds is above 1; none where rounds is 1.",
    )
    criterion: str = Field(
        "magnitude",
        description="How units are ranked, by name; `mmcompress list criteria` shows all. Those that look at "
        "examples, such as taylor, read data.train.",
    )
    samples: int = Field(
        512,
        ge=8,
        le=100_000,
        description="Training examples that the criterion and `reconstruct` look at, where they look at any, 8 to 100000.",
    )
    reconstruct: bool = Field(
        False,
        description="For ffn and heads: whether weights and biases of the layers that read the units that stay are fitted by "
        "least squares, on `samples` training examples, to give what they gave with all units. Takes the place of what a "
        "criterion such as flap does to biases.",
    )
    batch_size: int = Field(64, ge=2, le=65_536, description="Examples in one batch while scoring, 2 to 65536.")
    scope: Scope = Field(
        "layer",
        description="`layer` cuts the same share in every layer; `tower` ranks units of one shape over all layers of a tower, so "
        "that widths differ, which no stock config can say: allow_custom. For ffn and heads only.",
    )
    heads: Heads = Field(
        "fewer",
        description="What goes with axis: width. `fewer`: whole heads, at constant head size. `narrower`: channels of every "
        "head, whose number stays; the finer choice in a tower of few heads.",
    )
    round_to: int = Field(
        8,
        ge=1,
        le=1024,
        description="Kept FFN widths, and sizes of narrower heads, are multiples of this many units, 1 to 1024: kernels are fast "
        "on multiples of 8.",
    )
    allow_custom: bool = Field(
        False, description="Allow a result that stock transformers cannot load; mmcompress and ONNX runtimes still do."
    )

    @property
    def uses(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the criterion here
        """The splits that the pass reads."""
        return ("train",) if self._reads_examples or self.reconstruct or self.ratio == "auto" or self.training else ()

    @property
    def _reads_examples(self) -> bool:
        return bool(registry.stated("criteria", self.criterion, "needs_data", False))

    @property
    def training(self) -> Recovery | None:
        """How the pass trains, if it does."""
        return self.recovery or (Recovery.model_validate({}) if self.rounds > 1 else None)

    @field_validator("criterion")
    @classmethod
    def _known_criterion(cls, value: str) -> str:
        if value not in registry.names("criteria"):
            raise ValueError(one_of("criterion", value, registry.names("criteria")))
        return value

    @field_validator("ratio")
    @classmethod
    def _cuts_something(cls, value: float | dict[str, float] | Literal["auto"]) -> float | dict[str, float] | Literal["auto"]:
        if value != "auto" and not any(value.values() if isinstance(value, dict) else [value]):
            raise ValueError("would cut nothing; at least one ratio must be above 0")
        return value

    @model_validator(mode="after")
    def _auto_has_a_target(self) -> Self:
        if self.ratio == "auto" and self.target is None:
            raise ValueError("ratio: auto needs a target, such as target: {parameters: 0.6}")
        if self.ratio != "auto" and self.target is not None:
            raise ValueError("target: is for ratio: auto; with ratios that are given the size follows from them")
        most = self.recovery.max_steps if self.recovery else None
        if most is not None and most < self.rounds:
            raise ValueError(
                f"recovery.max_steps: {most} steps are too few for {self.rounds} rounds; each trains for one at least"
            )
        return self

    @model_validator(mode="after")
    def _stock_or_allowed(self) -> Self:
        if self.scope == "tower" and self.axis not in ("ffn", "heads"):
            raise ValueError(
                f"scope: tower ranks units over layers, and {self.axis} is one choice for the tower; leave scope out"
            )
        if self.reconstruct and self.axis not in ("ffn", "heads"):
            raise ValueError(
                f"reconstruct: fits what reads units of ffn and heads; a cut of {self.axis} leaves nothing to fit; leave it out"
            )
        if self.heads == "narrower" and self.axis != "width":
            raise ValueError(f"heads: narrower is for axis: width; with axis: {self.axis} leave it out")
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

    @property
    def cutting(self) -> Cutting:
        """How is cut, all but how much."""
        from mmcompress.pruning.cutting import Cutting

        per_layer = self.ratio == "auto" and self.allow_custom and self.axis in ("ffn", "heads")
        scope: Scope = "tower" if per_layer else self.scope
        how = (self.round_to, scope, self.allow_custom, self.samples, self.batch_size, self.heads, self.reconstruct)
        return Cutting(self.axis, self.criterion, *how)

    def _shares(self, sizes: Mapping[str, Mapping[str, Any]]) -> Shares:
        having = [tower for tower, axes in sizes.items() if self.axis in axes] or list(sizes)
        alike = 0.0 if self.ratio == "auto" else self.ratio
        ratios = alike if isinstance(alike, dict) else dict.fromkeys(having, alike)
        return Shares(self.axis, ratios, self.round_to, self.scope, self.heads)

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

    def trains(self) -> bool:
        """Whether it recovers in between or at the end."""
        return self.recovery is not None or self.rounds > 1

    def check_against(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        """What cannot be cut in a model of these sizes: unknown towers and axes, shares that round to nothing or to all."""
        shares = self._shares(sizes)
        wrong = [*self._unlike(family, shares), *shares.mistakes(family.towers, sizes), *self._unreachable(family, sizes)]
        if self.training is not None:
            of_training = [*self.training.freeze_mistakes(family.towers), *self.training.loss_mistakes(family.towers)]
            wrong += [f"recovery.{text}" for text in of_training]
        return wrong

    def _unreachable(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        """What ``ratio: auto`` cannot decide: towers that are not there, axes whose sizes no config says."""
        if self.target is None:
            return []
        named = self.target.towers or []
        wrong = ["target.towers: " + one_of("tower", t, family.towers) for t in named if t not in family.towers]
        if self.axis in family.axes and self.axis not in family.stock_axes:
            wrong.append(
                f"ratio: auto finds what a cut saves from the family's configs, and none says {self.axis} alone; give a number"
            )
        having = [tower for tower in family.towers if self.axis in sizes.get(tower, {})]
        lacking = [t for t in named if t in family.towers and t not in having]
        if lacking or not having:
            wrong.append(f"axis: {self.axis} cannot be cut in {', '.join(lacking) or 'any tower'}; towers that have it: {having}")
        joint = family.cut_together(self.axis)
        if named and len({t in named for t in joint}) > 1:
            wrong.append(f"target.towers: the towers {' and '.join(joint)} share their {self.axis}; name all of them or none")
        return wrong

    def settled(self, family: Family, config: Any) -> tuple[Prune, str]:
        """The pass with ratios that a plan without weights may take, and what was assumed for it; see `mmcompress check`.

        Raises:
            RecipeError: the target cannot be reached.
        """
        from mmcompress.pruning.auto import Shapes, uniform

        if self.target is None:
            return self, ""
        ratios, assumed = uniform(Shapes(family, config, self.cutting, self.target))
        return self.model_copy(update={"ratio": ratios, "target": None}), assumed

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

        before = cut.sizes(model)
        mistakes = self.check_against(model.family, cut.smallest(before))
        if mistakes:
            raise RecipeError("prune: " + "; ".join(mistakes))
        counts = {t: count(p) for t, p in tower_parameters(model.family, model.module).items()}
        facts: dict[str, Any] = {}
        shares = self._decide(model, context, facts) if self.target else self._shares(before)
        new = context.copy_of(model)
        training = self.training
        if training is not None:
            from mmcompress.pruning.rounds import cut_and_recover

            facts |= cut_and_recover(new, context, self.cutting, shares, self.rounds, training)
        else:
            facts |= self.cutting.cut(new, shares, context)
        after = cut.sizes(new)
        facts["sizes"] = {tower: {"before": before[tower], "after": after[tower]} for tower in model.family.towers}
        parameters = {t: count(p) for t, p in tower_parameters(new.family, new.module).items()}
        facts["parameters"] = {tower: {"before": old, "after": parameters[tower]} for tower, old in counts.items()}
        return new, facts

    def _decide(self, model: CompressedModel, context: Context, facts: dict[str, Any]) -> Shares:
        """The shares that meet the target, with what was measured put into ``facts``."""
        from mmcompress.pruning.auto import choose_ratios

        if model.custom:
            raise RecipeError("prune: ratio: auto finds what a cut saves from configs, and this model's shapes are custom")
        if self.target is None:
            raise RecipeError("prune: ratio: auto needs a target")
        chosen = choose_ratios(model, context, self.cutting, self.target)
        facts["auto"] = chosen.facts
        context.facts |= chosen.timing
        context.reporter.say("  ratios: " + ", ".join(f"{tower} {ratio:.3f}" for tower, ratio in chosen.ratios.items()))
        return self.cutting.shares(chosen.ratios)


PASS = Prune
