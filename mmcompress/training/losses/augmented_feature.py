"""Augmented feature distillation (CLIP-KD): both models' embeddings, fused, must match as pictures and texts do.

Shapes: B pictures, U distinct texts, D_s and D_t embedding widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from mmcompress.families.base import Batch, Outputs, seen_tower
from mmcompress.training.losses.base import Loss
from mmcompress.training.losses.interactive import MOST, START_BIAS, START_SCALE
from mmcompress.training.similarity import contrastive, matching, pairwise, similarities, unit


class AugmentedFeature(Loss):
    """AFD of CLIP-KD (arXiv 2307.12732), as its authors' `src/open_clip/loss.py` (commit e151019) computes it.

    For each tower a learned linear map of ``[v_s, v_t]``, the student's and the teacher's unit embeddings side by side, to the
    student's width; then CLIP's loss of these, with a scale of the loss's own, learned along from 1/0.07 and at most 100. A
    text that several pictures share has several right pictures. For models with a bias (SigLIP) it is our extension: SigLIP's
    loss of every pair, with a bias learned along from -10.
    """

    def __init__(self, student_sizes: Mapping[str, int], teacher_sizes: Mapping[str, int]) -> None:
        super().__init__(student_sizes, teacher_sizes)
        self.fuse = nn.ModuleDict({tower: nn.Linear(size + teacher_sizes[tower], size) for tower, size in student_sizes.items()})
        self.log_scale = nn.Parameter(torch.tensor(math.log(START_SCALE)))
        self.bias = nn.Parameter(torch.tensor(START_BIAS))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """The mean of both ways, in nats."""
        seen = seen_tower(student.embeds)
        fused = {
            tower: self.fuse[tower](torch.cat([unit(embeds), unit(teacher.embeds[tower])], dim=-1))
            for tower, embeds in student.embeds.items()
        }
        right = F.one_hot(batch["target"], len(fused["text"])).bool()
        logits = similarities(fused[seen], fused["text"], self.log_scale.clamp(max=MOST).exp())
        if pairwise(student, teacher):
            return matching(logits + self.bias, right)
        return (contrastive(logits, right) + contrastive(logits.T, right.T)) / 2


LOSS = AugmentedFeature
