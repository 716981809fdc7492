"""A tiny SigLIP; the checkpoints of SigLIP 2 with a fixed resolution are the same architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmcompress.families.siglip import FAMILY
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor
from tests import tiny

LENGTH = 16


def config(use_head: bool = True, projection: int | None = 48) -> SiglipConfig:
    """Heads of 16; text embeddings as wide as the vision tower."""
    end = len(tiny.WORDS) - 1
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": end, "pad_token_id": 0}
    seen = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
    return SiglipConfig(
        text_config={
            **text,
            **ids,
            "vocab_size": len(tiny.WORDS),
            "max_position_embeddings": LENGTH,
            "projection_size": projection,
        },
        vision_config={**seen, "image_size": 16, "patch_size": 8, "vision_use_head": use_head},
    )


def siglip(seed: int = 0) -> CompressedModel:
    """Random weights; scale and bias as the paper starts them (10 and -10), rather than transformers' 1 and 0."""
    torch.manual_seed(seed)
    made = config()
    module = SiglipModel(made).eval()
    with torch.no_grad():
        module.logit_scale.fill_(2.302585)
        module.logit_bias.fill_(-10.0)
        module.vision_model.head.attention.in_proj_bias.normal_(0, 0.02)
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return CompressedModel(module, Processor(tiny.tokenizer(), images, LENGTH, None, FAMILY, made), FAMILY, "tiny")


MODELS: dict[str, Callable[[], CompressedModel]] = {"siglip": siglip}
TASKS = {"siglip": "zero-shot-image-classification"}
