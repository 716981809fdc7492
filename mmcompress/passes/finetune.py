"""Trains the model further on the task's own loss, such as to recover from pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmcompress.context import Context
from mmcompress.passes.base import Pass
from mmcompress.training.settings import TrainingSettings

if TYPE_CHECKING:
    from mmcompress.families.base import Family
    from mmcompress.model import CompressedModel


class Finetune(TrainingSettings, Pass):
    """Fine-tuning. Where the model that the run began with is at hand, `distill` mostly recovers more."""

    changes: ClassVar[Literal["weights", "files"]] = "weights"
    uses: ClassVar[tuple[str, ...]] = ("train",)

    name: Literal["finetune"] = Field("finetune", alias="pass", description="The pass's name.")

    def check_against(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        """What is wrong with ``freeze`` for a model of these towers."""
        return self.freeze_mistakes(family.towers)

    def run(self, model: CompressedModel, context: Context) -> tuple[CompressedModel, dict[str, Any]]:
        """Trains a copy of the model.

        Raises:
            DataError: no task, no training examples, or a picture that does not decode.
            RecipeError: ``freeze`` does not fit the model.
            TrainingError: a loss or a gradient is not finite.
        """
        from mmcompress.training.loop import train
        from mmcompress.training.objective import TaskObjective

        objective = TaskObjective(context.need_task("finetune"))
        new = context.copy_of(model)
        return new, train(new, context, self, objective, "finetune")


PASS = Finetune
