"""What a training loop minimises: parts with names, so that a part that goes wrong can be named.

Shapes: B examples, U distinct texts, D embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from mmcompress import registry
from mmcompress.context import Context
from mmcompress.errors import RecipeError
from mmcompress.families.base import Batch, Outputs
from mmcompress.model import CompressedModel
from mmcompress.tasks.base import Task
from mmcompress.training.inside import INSIDE, shapes_of
from mmcompress.training.losses.base import Loss, Shapes, TowerLoss
from mmcompress.training.settings import TASK_LOSS, DistillationSettings, Weights, counts
from mmcompress.training.teacher import Teacher, embedding_sizes, find_teacher


class Objective(nn.Module, ABC):
    """A sum of weighted losses. Its own parameters are trained along with the model."""

    needs: frozenset[str] = frozenset()
    """What it needs of the model's forward pass besides its outputs: ``hidden``, ``attentions``, ``masked``."""

    def start(self, device: torch.device, precision: str) -> None:
        """Called once before the first step, after the seed was set."""
        self.to(device)

    def stop(self) -> None:
        """Called once after the last step."""

    @abstractmethod
    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        """For each part its weighted loss, shape (); the batch's ``index`` (B,) says which examples it is made of."""

    def facts(self) -> dict[str, Any]:
        """Numbers for the report that may differ between repetitions."""
        return {}


class TaskObjective(Objective):
    """The task's own loss."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        """One part, ``task``."""
        return {TASK_LOSS: self.task.loss(outputs, dict(batch))}


class DistillObjective(Objective):
    """The task's loss and losses against a teacher, each with its weight; a weight of 0 leaves its loss out."""

    def __init__(self, task: Task, weights: Weights, student: CompressedModel, teacher: Teacher | None) -> None:
        """Builds the losses.

        Args:
            weights: for each loss's name its weight, or one for each tower, `task` among them.
            student: the model that will be trained; its embeddings' widths are what the losses are made for.
            teacher: None where no loss needs one.
        """
        super().__init__()
        self.task, self.teacher = task, teacher
        self.weights = {name: weight for name, weight in weights.items() if counts(weight)}
        losses = [registry.find("losses", name).LOSS for name in self.weights if name != TASK_LOSS]
        self.needs = frozenset(need for loss in losses for need in loss.needs) - {"embeddings"}
        self._family = student.family
        self._shapes = shapes_of(student, "student", embedding_sizes(student), self.needs)
        self.losses = nn.ModuleDict()

    def start(self, device: torch.device, precision: str) -> None:
        """Builds the losses (their projections start from the run's seed) and moves the teacher to the device."""
        theirs = Shapes("teacher", {})
        if self.teacher is not None:
            theirs = shapes_of(self.teacher.model, "teacher", self.teacher.sizes, self.needs)
        for name in self.weights:
            if name != TASK_LOSS:
                self.losses[name] = registry.find("losses", name).LOSS.build(self._shapes, theirs)
        if self.teacher is not None:
            self.teacher.start(device, precision)
        self.to(device)

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        """A part for each loss."""
        inside = self.needs & INSIDE
        if self.teacher is None:
            teacher = Outputs(logit_scale=outputs.logit_scale.detach())
        else:
            teacher = self.teacher.look_inside(batch, inside) if inside else self.teacher(batch)
        if inside:
            outputs.masks = self._family.token_masks(batch)
        parts = {
            name: weighed(cast(Loss, loss), self.weights[name], outputs, teacher, batch) for name, loss in self.losses.items()
        }
        weight = self.weights.get(TASK_LOSS)
        if isinstance(weight, (int, float)):
            parts[TASK_LOSS] = weight * self.task.loss(outputs, dict(batch))
        return parts

    def stop(self) -> None:
        """Has the teacher store what it was asked."""
        if self.teacher is not None:
            self.teacher.stop()

    def facts(self) -> dict[str, Any]:
        """How long the teacher took, and for how many pictures and texts it was asked."""
        return self.teacher.facts() if self.teacher is not None else {}


def weighed(loss: Loss, weight: float | Mapping[str, float], student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
    """A loss times its weight, or the sum of its towers' parts with a weight each; a tower without one does not count."""
    if not isinstance(weight, Mapping):
        return weight * cast(torch.Tensor, loss(student, teacher, batch))
    shares = cast(TowerLoss, loss).shares(student, teacher, batch)
    return torch.stack([share * weight.get(tower, 0.0) for tower, share in shares.items()]).sum()


def distillation(settings: DistillationSettings, student: CompressedModel, context: Context, what: str) -> DistillObjective:
    """The objective that a recipe describes, its teacher loaded and checked if a loss needs one.

    Args:
        student: the model before training.
        what: the pass's name, for messages.

    Raises:
        DataError: no task, no training examples, or no baseline to learn from.
        ModelError: the teacher cannot be loaded, or reads other pictures or texts than the student.
        RecipeError: a loss compares what the task's models do not give.
    """
    task, examples = context.need_task(what), context.need_train(what)
    wrong = settings.loss_mistakes(student.family.towers)
    if wrong:
        raise RecipeError(f"{what}: " + "; ".join(wrong))
    weights = settings.weights(task)
    used = {name: registry.find("losses", name).LOSS for name, weight in weights.items() if counts(weight) and name != TASK_LOSS}
    for name, loss in used.items():
        if "embeddings" in loss.needs and "embeddings" not in task.needs:
            fitting = [n for n in registry.names("losses") if "embeddings" not in registry.find("losses", n).LOSS.needs]
            raise RecipeError(
                f"{what}: losses: {name} compares embeddings, and models for the task {task.type} give none; "
                f"allowed: {', '.join(fitting)}"
            )
    teacher = None
    if any(loss.needs_teacher for loss in used.values()):
        variants = settings.augment.variants if settings.augment is not None else 1
        room = round(settings.teacher_cache_gb * 1e9)
        teacher = find_teacher(settings.teacher, student, context, len(examples), variants, room)
    return DistillObjective(task, weights, student, teacher)
