"""Tiny dual encoders put together from one vision and one text encoder: every kind of vision encoder and of text encoder once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    DeiTConfig,
    PretrainedConfig,
    ResNetConfig,
    RobertaConfig,
    SiglipVisionConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mmcompress.families.vision_text_dual_encoder import FAMILY
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor
from tests import tiny

SEEN: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
}
READ: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": len(tiny.WORDS),
    # RoBERTa's positions begin after the padding's number.
    "max_position_embeddings": 17,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": len(tiny.WORDS) - 1,
}


def resnet_config(**changes: Any) -> ResNetConfig:
    """Two stages of bottlenecks."""
    sizes: dict[str, Any] = {"hidden_sizes": [64, 128], "depths": [2, 2], "embedding_size": 16, "hidden_size": 128}
    return ResNetConfig(**{**sizes, "image_size": 16, **changes})


def dual(vision: PretrainedConfig, text: PretrainedConfig, seed: int = 0) -> CompressedModel:
    """Both with random weights, and running statistics that are not those of an untouched BatchNorm."""
    torch.manual_seed(seed)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=24)
    module = VisionTextDualEncoderModel(config).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None:
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    images = ViTImageProcessorPil(size={"height": 16, "width": 16})
    family = FAMILY.of(config)
    return CompressedModel(module, Processor(tiny.tokenizer(), images, 16, None, family, config), family, "tiny")


MODELS: dict[str, Callable[[], CompressedModel]] = {
    "vit-bert": partial(dual, ViTConfig(**SEEN), BertConfig(**READ)),
    "resnet-bert": partial(dual, resnet_config(), BertConfig(**READ)),
    "deit-roberta": partial(dual, DeiTConfig(**SEEN), RobertaConfig(**READ)),
    "siglip-vision-clip-text": partial(dual, SiglipVisionConfig(**SEEN), CLIPTextConfig(**READ)),
    "clip-vision-bert": partial(dual, CLIPVisionConfig(**SEEN), BertConfig(**READ)),
}
TASKS = dict.fromkeys(MODELS, "image-text-retrieval")
