"""Trains the model to do as a teacher does: mostly the model that the run began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmcompress.context import Context
from mmcompress.passes.base import Pass
from mmcompress.training.settings import DistillationSettings, PseudoLabels

if TYPE_CHECKING:
    from mmcompress.families.base import Family
    from mmcompress.model import CompressedModel


class Distill(DistillationSettings, Pass):
    """Knowledge distillation, with the task's own loss beside it. The teacher is asked once for each picture and text."""

    changes: ClassVar[Literal["weights", "files"]] = "weights"
    uses: ClassVar[tuple[str, ...]] = ("train",)

    name: Literal["distill"] = Field("distill", alias="pass", description="The pass's name.")
    pseudo_labels: PseudoLabels | None = Field(
        None,
        description="For speech recognition: train on the transcripts that the teacher writes, without the recordings where they "
        "are far from the data's own, as Distil-Whisper does; such as {max_wer: 10}. Left out: the data's transcripts.",
    )

    def check_against(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        """What is wrong with ``freeze`` and with weights by tower for a model of these towers."""
        return [*self.freeze_mistakes(family.towers), *self.loss_mistakes(family.towers)]

    def run(self, model: CompressedModel, context: Context) -> tuple[CompressedModel, dict[str, Any]]:
        """Trains a copy of the model.

        Raises:
            DataError: no task, no training examples, a picture that does not decode, or no baseline to learn from.
            ModelError: the teacher cannot be loaded, or reads other pictures or texts than the student.
            RecipeError: ``freeze`` does not fit the model, or ``pseudo_labels`` the task.
            TrainingError: a loss or a gradient is not finite.
        """
        from mmcompress.training.loop import train
        from mmcompress.training.objective import distillation

        said: dict[str, Any] = {}
        if self.pseudo_labels is not None:
            from mmcompress.training.pseudo_labels import relabel
            from mmcompress.training.teacher import find_teacher

            task, examples = context.need_task("distill"), context.need_train("distill")
            device = self.device if self.device != "auto" else context.device
            # Let go of below: the training loads its own, and two would take the memory of both.
            asked = find_teacher(self.teacher, model, context, len(examples)).model
            relabelled, found = relabel(asked, task, examples, self.pseudo_labels.max_wer, context.reporter, device)
            del asked
            context, said = replace(context, train=relabelled), {"pseudo_labels": found}
        objective = distillation(self, model, context, "distill")
        new = context.copy_of(model)
        return new, {**train(new, context, self, objective, "distill"), **said}


PASS = Distill
