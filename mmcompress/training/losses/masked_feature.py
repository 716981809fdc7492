"""Masked feature distillation (CLIP-KD): the student sees a quarter of a picture, and must embed it as the teacher the whole.

Shapes: N pictures or texts of a tower, D_s and D_t embedding widths.
"""

from __future__ import annotations

import torch

from mmcompress.families.base import Batch, Outputs, seen_tower
from mmcompress.training.losses.feature import Feature


class MaskedFeature(Feature):
    """MFD of CLIP-KD (arXiv 2307.12732): `feature`, but the student's pictures are masked at the ratio 0.75; texts are not.

    Vision transformers read the patches that stay alone, as in MAE (arXiv 2111.06377); in other towers masked squares are
    zero. It costs the student a second forward and backward pass over the pictures, shorter where patches are left out.
    """

    needs = frozenset({"embeddings", "masked"})

    def shares(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        """0 to 4 for each tower."""
        seen = seen_tower(student.embeds)
        swapped = Outputs({**student.embeds, seen: student.masked[seen]}, student.logit_scale)
        return super().shares(swapped, teacher, batch)


LOSS = MaskedFeature
