"""Softened logits (Hinton): KL of the teacher's and the student's answers for each picture, at temperature 2.

Shapes: B pictures, U distinct texts (the classes), D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mmcompress.families.base import Batch, Outputs
from mmcompress.training.losses.base import Loss
from mmcompress.training.similarity import divergence, similarities


class Logit(Loss):
    """Hinton et al. 2015 (arXiv 1503.02531), over the texts that each picture is compared with.

    ``tau^2 KL(softmax(z_t / tau) || softmax(z / tau))`` with ``z = s I T^T`` and each model's own logit scale s; tau^2 keeps
    the gradient's size as tau varies. Only from pictures to texts: it is for classification, where the texts of a batch
    are the classes. Unlike `relational` it does not ask which picture suits a class best, and tau above 1 gives weight to
    how the teacher orders the wrong classes.
    """

    def __init__(self, student_sizes: Mapping[str, int], teacher_sizes: Mapping[str, int], temperature: float = 2.0) -> None:
        super().__init__(student_sizes, teacher_sizes)
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """The mean over pictures, in nats times tau^2."""
        ours = similarities(student.embeds["vision"], student.embeds["text"], student.logit_scale)
        theirs = similarities(teacher.embeds["vision"], teacher.embeds["text"], teacher.logit_scale)
        return divergence(theirs / self.temperature, ours / self.temperature) * self.temperature**2


LOSS = Logit
