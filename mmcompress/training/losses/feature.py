"""Feature distillation (CLIP-KD): mean squared distance of the student's and the teacher's unit embeddings.

Shapes: N pictures or texts of a tower, D_s and D_t embedding widths.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mmcompress.families.base import Batch, Outputs
from mmcompress.training.losses.base import Projections, TowerLoss
from mmcompress.training.similarity import unit


class Feature(TowerLoss):
    """FD of CLIP-KD (arXiv 2307.12732): over both towers, the sum of ``1/N sum_k |v_t,k - v_k|^2``.

    v are unit embeddings, the student's after a learned projection where the widths differ. A tower's share is
    ``2 - 2 cos``, so 0 to 4. CLIP-KD's code takes the mean over the D numbers of an embedding as well, so that its weight of
    2000 is 2000 / D here: 4 at D = 512.
    """

    def __init__(self, student_sizes: Mapping[str, int], teacher_sizes: Mapping[str, int]) -> None:
        super().__init__(student_sizes, teacher_sizes)
        self.project = Projections(student_sizes, teacher_sizes)

    def shares(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        """0 to 4 for each tower."""
        return {
            tower: (unit(self.project(tower, embeds)) - unit(teacher.embeds[tower])).square().sum(-1).mean()
            for tower, embeds in student.embeds.items()
        }


LOSS = Feature
