"""Maths that the losses share: cosine similarities between pictures and texts, and distances between distributions.

Shapes: B pictures, U distinct texts, D embedding width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmcompress.families.base import Outputs, seen_tower


def unit(embeds: torch.Tensor) -> torch.Tensor:
    """Rows at length 1 in float32: products of bf16 embeddings are too coarse for a softmax at scale 100."""
    return F.normalize(embeds.float(), dim=-1)


def similarities(vision: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scaled cosine similarities (B, U) of pictures (B, D) and texts (U, D), neither normalised."""
    return scale.float() * (unit(vision) @ unit(text).T)


def own_similarities(outputs: Outputs) -> torch.Tensor:
    """A model's logits (B, U) of pictures or recordings against texts: with its own scale, and its bias where it has one."""
    found = similarities(outputs.embeds[seen_tower(outputs.embeds)], outputs.embeds["text"], outputs.logit_scale)
    return found if outputs.logit_bias is None else found + outputs.logit_bias.float()


def cross_entropy(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean over rows of ``-sum_j p_j log q_j``, p and q the softmax of the teacher's and the student's logits, shape ()."""
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean over rows of the Kullback-Leibler divergence KL(p || q), in nats; arguments as in `cross_entropy`."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def contrastive(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Cross-entropy where a row may have several right columns, over which its target is spread evenly.

    With one right column it is InfoNCE. Several are averaged outside of the logarithm, as in SupCon's L_out (Khosla et al.
    2020). Rows without a right column are no queries.

    Args:
        logits: (N, M).
        positives: (N, M), True where a column is right for a row.
    """
    asked = positives.any(-1)
    target = positives[asked].float()
    return F.cross_entropy(logits[asked], target / target.sum(-1, keepdim=True))


def binary_divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """For models that judge each pair or class by itself: the mean over rows of the summed ``KL(Bernoulli || Bernoulli)``.

    The chances are the sigmoids of the teacher's and the student's logits, both (N, M); in nats.
    """
    right = teacher.sigmoid()
    there = right * (F.logsigmoid(teacher) - F.logsigmoid(student))
    absent = (1 - right) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (there + absent).sum(-1).mean()


def pairwise(student: Outputs, teacher: Outputs) -> bool:
    """Whether both models judge each pair by itself (SigLIP), so that losses take their sigmoid form."""
    return student.logit_bias is not None and teacher.logit_bias is not None


def matching(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """The sigmoid form of `contrastive`: ``-sum_j log sigmoid(z_ij l_ij)``, its mean over rows, z 1 where right and -1 elsewhere.

    SigLIP (Zhai et al. 2023, arXiv 2303.15343, algorithm 1). Arguments as in `contrastive`.
    """
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum(1).mean()
