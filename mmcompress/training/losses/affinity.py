"""Affinity mimicking (TinyCLIP): the teacher's softmax over in-batch similarities as soft targets, both ways.

Shapes: B pictures, U distinct texts, D embedding width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmcompress.families.base import Batch, Outputs
from mmcompress.training.losses.base import Loss
from mmcompress.training.similarity import cross_entropy, own_similarities, pairwise


class Affinity(Loss):
    """TinyCLIP (arXiv 2309.12314), as its authors' `src/open_clip/clip_soft_loss.py` computes it.

    I and T are unit embeddings, s each model's own logit scale:
    ``1/2 [CE(softmax(s_t I_t T_t^T), softmax(s I T^T)) + the same from texts to pictures]``, CE a mean over rows. Its least
    value is the entropy of the teacher's rows, not 0: it differs from `relational` by that constant, and in no gradient.
    For models with a bias (SigLIP), which judge each pair by itself, it is our extension: the binary cross-entropy of every pair
    against the teacher's sigmoid, summed over texts, its mean over pictures.
    Texts that several pictures share are one column here, where the paper's batch would hold equal columns.
    """

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """The mean of both ways, in nats."""
        ours, theirs = own_similarities(student), own_similarities(teacher)
        if pairwise(student, teacher):
            return F.binary_cross_entropy_with_logits(ours, theirs.sigmoid(), reduction="none").sum(1).mean()
        return (cross_entropy(theirs, ours) + cross_entropy(theirs.T, ours.T)) / 2


LOSS = Affinity
