"""Trains the model to do as a teacher does: mostly the model that the run began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmcompress.context import Context
from mmcompress.passes import _student
from mmcompress.passes._student import Student
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
    student: Student | None = Field(
        None,
        description="Whom to train: {depth: 6, ffn: 0.5, width: 0.75} cuts a student out of the model, depth being the layers "
        "that stay (a number, or a share), ffn and width the shares that stay, with a criterion (activation); one for all "
        "towers, or one for each such as {vision: {depth: 6}}. Or a hub id or a folder; one with only a config.json starts "
        "from the run's seed, with the teacher's processor. Left out: the model itself.",
    )
    pseudo_labels: PseudoLabels | None = Field(
        None,
        description="Train on what the teacher writes in the place of the data's own texts. For speech recognition transcripts, "
        "without the recordings where they are far from the data's own, as Distil-Whisper does; such as {max_wer: 10}. For "
        "captions and questions about pictures the teacher's answers: {}. Left out: the data's texts.",
    )

    def check_against(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        """What is wrong with ``freeze``, weights by tower and the student for a model of these towers and sizes."""
        wrong = [*self.freeze_mistakes(family.towers), *self.loss_mistakes(family.towers)]
        if self.student is not None and not isinstance(self.student, str):
            wrong += _student.mistakes(self.student, family, sizes)
        return wrong

    def replacement(self) -> str | None:
        """The student where it is a model of its own."""
        return self.student if isinstance(self.student, str) else None

    def plan_for(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
        """The sizes of the student."""
        if self.student is None or isinstance(self.student, str):
            return self.plan(sizes)
        return _student.plan(self.student, family, sizes)

    def run(self, model: CompressedModel, context: Context) -> tuple[CompressedModel, dict[str, Any]]:
        """Trains a copy of the model.

        Raises:
            DataError: no task, no training examples, a picture that does not decode, or no baseline to learn from.
            ModelError: the teacher cannot be loaded, or reads other pictures or texts than the student.
            RecipeError: ``freeze`` or ``student`` does not fit the model, or ``pseudo_labels`` the task.
            TrainingError: a loss or a gradient is not finite.
        """
        from mmcompress.training.loop import train
        from mmcompress.training.objective import distillation

        said: dict[str, Any] = {}
        student = model
        if isinstance(self.student, str):
            student = _student.replacement(self.student, model, self.teacher, context)
            context.need_task("distill").fits(student.family.abilities, student.family.name)
            said["student"] = {"source": self.student, "parameters": student.parameters()}
        elif self.student is not None:
            student, said["student"] = _student.inherit(self.student, model, context)
        if self.pseudo_labels is not None:
            from mmcompress.training.pseudo_labels import pseudo_labelled
            from mmcompress.training.teacher import find_teacher

            task, examples = context.need_task("distill"), context.need_train("distill")
            device = self.device if self.device != "auto" else context.device
            # Let go of below: the training loads its own, and two would take the memory of both.
            asked = find_teacher(self.teacher, student, context, len(examples)).model
            relabelled, found = pseudo_labelled(asked, task, examples, self.pseudo_labels, context.reporter, device)
            del asked
            context, said = replace(context, train=relabelled), {**said, "pseudo_labels": found}
        objective = distillation(self, student, context, "distill")
        new = student if self.student is not None else context.copy_of(model)
        return new, {**train(new, context, self, objective, "distill"), **said}


PASS = Distill
