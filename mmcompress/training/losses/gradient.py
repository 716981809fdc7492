"""Gradient distillation (CLIP-KD): the contrastive loss pulls the student's embeddings as it pulls the teacher's.

Shapes: B pictures, U distinct texts, D_s and D_t embedding widths.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from mmcompress.families.base import Batch, Outputs, seen_tower
from mmcompress.training.losses.base import Projections, TowerLoss
from mmcompress.training.similarity import unit


class Gradient(TowerLoss):
    """GD of CLIP-KD (arXiv 2307.12732): ``1/N sum_k |dL/dv_t,k - dL/dv_s,k|^2``, summed over both towers.

    L is the contrastive loss of each model with its own scale, v its unit embeddings, the student's after a learned projection
    where the widths differ. With z the logits and G = dL/dz the gradients are ``s G T`` for pictures and ``s G^T I`` for
    texts. It falls with the square of the batch, as L is a mean. The authors' code (`src/open_clip/loss.py`, commit e151019)
    takes both directions of L apart, the mean over the D numbers of an embedding as well, and divides by the scale where the
    paper multiplies; hence their weight of 1e8.
    For models with a bias (SigLIP) it is our extension: L is SigLIP's loss, the mean over pictures.
    """

    def __init__(self, student_sizes: Mapping[str, int], teacher_sizes: Mapping[str, int]) -> None:
        super().__init__(student_sizes, teacher_sizes)
        self.project = Projections(student_sizes, teacher_sizes)

    def shares(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        """Each tower's squared distance, 0 or more."""
        seen = seen_tower(student.embeds)
        projected = {tower: self.project(tower, embeds) for tower, embeds in student.embeds.items()}
        ours, theirs = _pulls(student, projected, seen, batch), _pulls(teacher, teacher.embeds, seen, batch)
        return {tower: (pull - theirs[tower]).square().sum(-1).mean() for tower, pull in ours.items()}


def _pulls(outputs: Outputs, embeds: Mapping[str, torch.Tensor], seen: str, batch: Batch) -> dict[str, torch.Tensor]:
    """The gradients of the contrastive loss at a model's unit embeddings, (B, D) and (U, D), without autograd."""
    pictures, texts, scale = unit(embeds[seen]), unit(embeds["text"]), outputs.logit_scale.float()
    logits = scale * pictures @ texts.T
    right = F.one_hot(batch["target"], len(texts)).to(logits.dtype)
    if outputs.logit_bias is not None:
        slope = ((logits + outputs.logit_bias.float()).sigmoid() - right) / len(pictures)
    else:
        slope = (_slope(logits, right) + _slope(logits.T, right.T).T) / 2
    return {seen: scale * slope @ texts, "text": scale * slope.T @ pictures}


def _slope(logits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The gradient of the mean cross-entropy over the rows that have a right column; the others are no queries."""
    count = right.sum(-1, keepdim=True)
    asked = count > 0
    wanted = right / count.clamp(min=1)
    return torch.where(asked, logits.softmax(-1) - wanted, 0.0) / asked.sum()


LOSS = Gradient
