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
from mmcompress.training.losses.base import Loss, Projections
from mmcompress.training.similarity import contrastive, similarities

START_SCALE = 1 / 0.07
MOST = math.log(100)


class Interactive(Loss):
    """ICL of CLIP-KD (arXiv 2307.12732): InfoNCE with the other model's embeddings as the keys.

    ``1/2 [NCE(s I T_t^T) + NCE(s T I_t^T)]``, I and T the student's unit embeddings (projected where the widths differ). A
    text that several pictures share has several right pictures. s is a scale of the loss's own, learned along from 1/0.07 and
    at most 100, as in the authors' code; there it is used as it is, here its logarithm is learned, as CLIP does.
    """

    def __init__(self, student_sizes: Mapping[str, int], teacher_sizes: Mapping[str, int]) -> None:
        super().__init__(student_sizes, teacher_sizes)
        self.project = Projections(student_sizes, teacher_sizes)
        self.log_scale = nn.Parameter(torch.tensor(math.log(START_SCALE)))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """The mean of both ways, in nats."""
        scale = self.log_scale.clamp(max=MOST).exp()
        seen = seen_tower(student.embeds)
        pictures = self.project(seen, student.embeds[seen])
        texts = self.project("text", student.embeds["text"])
        right = F.one_hot(batch["target"], texts.shape[0]).bool()
        to_text = contrastive(similarities(pictures, teacher.embeds["text"], scale), right)
        to_picture = contrastive(similarities(texts, teacher.embeds[seen], scale), right.T)
        return (to_text + to_picture) / 2


LOSS = Interactive
