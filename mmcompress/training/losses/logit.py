"""Softened logits (Hinton): KL of the teacher's and the student's answers for each example, at temperature 2.

Shapes: B examples, U distinct texts (the classes), D embedding width, T positions of an answer, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mmcompress.families.base import Batch, Outputs
from mmcompress.training.losses.base import Loss
from mmcompress.training.similarity import binary_divergence, divergence, own_similarities, pairwise

IGNORED = -100


class Logit(Loss):
    """Hinton et al. 2015 (arXiv 1503.02531), ``tau^2 KL(softmax(z_t / tau) || softmax(z / tau))``.

    tau^2 keeps the gradient's size as tau varies. Over embeddings z is ``s I T^T`` with each model's own logit scale s, for
    each picture over the texts of its batch: it is for classification, where they are the classes. Unlike `relational` it
    does not ask which picture suits a class best, and tau above 1 gives weight to how the teacher orders the wrong classes.

    Over answers z are the next token's logits, at the positions where the task's loss falls (Distil-Whisper,
    arXiv 2311.00430, equation 2), or the classes'. For classifiers with soft targets, whose classes stand each for itself, and
    for models with a bias (SigLIP), it is the binary KL of each class, summed.
    """

    needs = frozenset()

    def __init__(self, student_sizes: Mapping[str, int], teacher_sizes: Mapping[str, int], temperature: float = 2.0) -> None:
        super().__init__(student_sizes, teacher_sizes)
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """The mean over examples or positions, in nats times tau^2."""
        if student.logits is None or teacher.logits is None:
            ours, theirs = own_similarities(student), own_similarities(teacher)
            apart = binary_divergence if pairwise(student, teacher) else divergence
            return apart(theirs / self.temperature, ours / self.temperature) * self.temperature**2
        ours, theirs = student.logits.float() / self.temperature, teacher.logits.float() / self.temperature
        labels = batch["labels"]
        if labels.is_floating_point():
            return binary_divergence(theirs, ours) * self.temperature**2
        if labels.dim() > 1:
            counted = labels != IGNORED
            ours, theirs = ours[counted], theirs[counted]
        return divergence(theirs, ours) * self.temperature**2


LOSS = Logit
