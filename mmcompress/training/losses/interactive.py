"""Interactive contrastive learning (CLIP-KD): the student's pictures against the teacher's texts, and the reverse.

Shapes: B pictures, U distinct texts, D_s and D_t embedding widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from mmcompress.families.base import Batch, Outputs, seen_tower
from mmcompress.training.losses.base import Projections, TowerLoss
from mmcompress.training.similarity import contrastive, matching, pairwise, similarities

START_SCALE = 1 / 0.07
MOST = math.log(100)
START_BIAS = -10.0


class Interactive(TowerLoss):
    """ICL of CLIP-KD (arXiv 2307.12732): InfoNCE with the other model's embeddings as the keys.

    ``1/2 [NCE(s I T_t^T) + NCE(s T I_t^T)]``, I and T the student's unit embeddings (projected where the widths differ). A
    text that several pictures share has several right pictures. s is a scale of the loss's own, learned along from 1/0.07 and
    at most 100, as in the authors' code; there it is used as it is, here its logarithm is learned, as CLIP does. The part of
    a tower is that of the student's embeddings of it.

    For models with a bias (SigLIP) it is our extension: SigLIP's loss of every pair in the place of NCE, summed over the
    teacher's side, its mean over the student's, with a bias of the loss's own, learned along from -10.
    """

    def __init__(self, student_sizes: Mapping[str, int], teacher_sizes: Mapping[str, int]) -> None:
        super().__init__(student_sizes, teacher_sizes)
        self.project = Projections(student_sizes, teacher_sizes)
        self.log_scale = nn.Parameter(torch.tensor(math.log(START_SCALE)))
        self.bias = nn.Parameter(torch.tensor(START_BIAS))

    def shares(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        """Half of each way, in nats."""
        scale = self.log_scale.clamp(max=MOST).exp()
        seen = seen_tower(student.embeds)
        right = F.one_hot(batch["target"], student.embeds["text"].shape[0]).bool()
        found = {}
        for tower, other, fits in ((seen, "text", right), ("text", seen, right.T)):
            logits = similarities(self.project(tower, student.embeds[tower]), teacher.embeds[other], scale)
            found[tower] = (matching(logits + self.bias, fits) if pairwise(student, teacher) else contrastive(logits, fits)) / 2
        return found


LOSS = Interactive
