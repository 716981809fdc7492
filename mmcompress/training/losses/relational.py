"""Contrastive relational distillation (CLIP-KD): KL between teacher's and student's in-batch similarities, both ways.

Shapes: B pictures, U distinct texts, D embedding width.
"""

from __future__ import annotations

import torch

from mmcompress.families.base import Batch, Outputs
from mmcompress.training.losses.base import Loss
from mmcompress.training.similarity import binary_divergence, divergence, own_similarities, pairwise


class Relational(Loss):
    """CRD of CLIP-KD (arXiv 2307.12732), as its authors' `src/open_clip/loss.py` (commit e151019) computes it.

    ``1/2 [KL(softmax(s_t I_t T_t^T) || softmax(s I T^T)) + the same from texts to pictures]``: each model with its own logit
    scale s, temperature 1, a mean over rows. It is 0 when the student's similarities are the teacher's, up to a constant a
    row. Its gradient is `affinity`'s, so that both together are one of them with twice the weight. For models with a bias
    (SigLIP) it is our extension: the binary KL of every pair, summed over texts, its mean over pictures.
    """

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """The mean of both ways, in nats."""
        ours, theirs = own_similarities(student), own_similarities(teacher)
        if pairwise(student, teacher):
            return binary_divergence(theirs, ours)
        return (divergence(theirs, ours) + divergence(theirs.T, ours.T)) / 2


LOSS = Relational
