"""Batches and the loss that dual-encoder tasks share.

Shapes: B pictures, U distinct texts, S text length, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from mmcompress.families.base import Outputs
from mmcompress.processor import Processor


def batch_of(rows: list[dict[str, Any]], texts: list[str], target: list[int], processor: Processor) -> dict[str, torch.Tensor]:
    """Puts a training batch together; a row's ``pixel_values`` (C, H, W) are used where it has them, else its ``image``."""
    if rows and all("pixel_values" in row for row in rows):
        pixels = torch.stack([row["pixel_values"] for row in rows])
    else:
        pixels = processor.pixels([row["image"] for row in rows])
    return {"pixel_values": pixels, **processor.tokens(texts), "target": torch.tensor(target)}


def contrastive_loss(outputs: Outputs, target: torch.Tensor) -> torch.Tensor:
    """The symmetric InfoNCE loss of CLIP (Radford et al. 2021, figure 3) with several pictures to a text.

    From pictures to texts it is the cross-entropy of the right text. From texts to pictures the target is spread evenly over
    the pictures of a text (as in SupCon, Khosla et al. 2020); texts without a picture in the batch are no queries. With
    one picture a text it is CLIP's loss.

    Args:
        outputs: embeds ``vision`` (B, D) and ``text`` (U, D).
        target: (B,), the row of each picture's text.
    """
    images = F.normalize(outputs.embeds["vision"].float(), dim=-1)
    texts = F.normalize(outputs.embeds["text"].float(), dim=-1)
    logits = outputs.logit_scale.float() * images @ texts.T
    to_text = F.cross_entropy(logits, target)
    positives = F.one_hot(target, logits.shape[1]).T.float()
    asked = positives.sum(1) > 0
    spread = positives[asked] / positives[asked].sum(1, keepdim=True)
    to_image = F.cross_entropy(logits.T[asked], spread)
    return (to_text + to_image) / 2
