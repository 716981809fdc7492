"""Trains the model to do as a teacher does: mostly the model that the run began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmcompress.context import Context
from mmcompress.passes.base import Pass
from mmcompress.training.settings import DistillationSettings

if TYPE_CHECKING:
    from mmcompress.families.base import Family
    from mmcompress.model import CompressedModel


class Distill(DistillationSettings, Pass):
    """Knowledge distillation, with the task's own loss beside it. The teacher is asked once for each picture and text."""

    changes: ClassVar[Literal["weights", "files"]] = "weights"
    uses: ClassVar[tuple[str, ...]] = ("train",)

    name: Literal["distill"] = Field("distill", alias="pass", description="The pass's name.")

    def check_against(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        """What is wrong with ``freeze`` for a model of these towers."""
        return self.freeze_mistakes(family.towers)

    def run(self, model: CompressedModel, context: Context) -> tuple[CompressedModel, dict[str, Any]]:
        """Trains a copy of the model.

        Raises:
            DataError: no task, no training examples, a picture that does not decode, or no baseline to learn from.
            ModelError: the teacher cannot be loaded, or reads other pictures or texts than the student.
            RecipeError: ``freeze`` does not fit the model.
            TrainingError: a loss or a gradient is not finite.
        """
        from mmcompress.training.loop import train
        from mmcompress.training.objective import distillation

        objective = distillation(self, model, context, "distill")
        new = model.clone()
        return new, train(new, context, self, objective, "distill")


PASS = Distill
