"""Batches and the loss that dual-encoder tasks share.

Shapes: B pictures, U distinct texts, S text length, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from mmcompress.data.examples import KINDS
from mmcompress.families.base import Outputs, seen_tower
from mmcompress.processor import Processor


def batch_of(rows: list[dict[str, Any]], texts: list[str], target: list[int], processor: Processor) -> dict[str, torch.Tensor]:
    """Puts a training batch together; a row's prepared ``inputs`` are used where it has them, else its picture or recording."""
    return {**processor.stack(media_of(rows, processor)), **processor.tokens(texts), "target": torch.tensor(target)}


def media_of(rows: list[dict[str, Any]], processor: Processor) -> list[dict[str, torch.Tensor]]:
    """Each row's media as tensors: prepared ones where all rows have them."""
    if rows and all("inputs" in row for row in rows):
        return [row["inputs"] for row in rows]
    kind = next(kind for kind in KINDS if kind in rows[0])
    return processor.media(kind, [row[kind] for row in rows])


def contrastive_loss(outputs: Outputs, target: torch.Tensor) -> torch.Tensor:
    """The symmetric InfoNCE loss of CLIP (Radford et al. 2021, figure 3) with several pictures to a text; SigLIP's for models
    with a bias (`sigmoid_loss`).

    From pictures to texts it is the cross-entropy of the right text. From texts to pictures the target is spread evenly over
    the pictures of a text (as in SupCon, Khosla et al. 2020); texts without a picture in the batch are no queries. With
    one picture a text it is CLIP's loss.

    Args:
        outputs: embeds ``text`` (U, D) and of the other tower, ``vision`` or ``audio``, (B, D).
        target: (B,), the row of each picture's or recording's text.
    """
    images = F.normalize(outputs.embeds[seen_tower(outputs.embeds)].float(), dim=-1)
    texts = F.normalize(outputs.embeds["text"].float(), dim=-1)
    logits = outputs.logit_scale.float() * images @ texts.T
    if outputs.logit_bias is not None:
        return sigmoid_loss(logits + outputs.logit_bias.float(), target)
    to_text = F.cross_entropy(logits, target)
    positives = F.one_hot(target, logits.shape[1]).T.float()
    asked = positives.sum(1) > 0
    spread = positives[asked] / positives[asked].sum(1, keepdim=True)
    to_image = F.cross_entropy(logits.T[asked], spread)
    return (to_text + to_image) / 2


def sigmoid_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """SigLIP's loss (Zhai et al. 2023, arXiv 2303.15343, algorithm 1): every pair by itself is right or wrong.

    The sum over the texts of ``-log sigmoid(z_ij l_ij)``, its mean over pictures; ``z_ij`` is 1 where text j is picture i's and
    -1 elsewhere. A text that several pictures share is right for each of them.

    Args:
        logits: (B, U), scaled and with the bias.
        target: (B,), the row of each picture's text.
    """
    sign = 2 * F.one_hot(target, logits.shape[1]).to(logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum(1).mean()
