"""A tiny SigLIP 2 for pictures of any shape; positions are a grid of 4 x 4."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Siglip2Config, Siglip2Model, Siglip2Tokenizer
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from mmcompress.families.siglip2 import FAMILY
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor
from tests.families import tiny_siglip

LENGTH = 32
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", ".", *"abcdefghijklmnopqrstuvwxyz"]


def config() -> Siglip2Config:
    """As `tiny_siglip.config`, with patches of 4 x 4, and texts of letters."""
    text = {k: v for k, v in tiny_siglip.config().text_config.to_dict().items() if k != "model_type"}
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    text |= {**ids, "vocab_size": len(PIECES), "max_position_embeddings": LENGTH}
    seen = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
    return Siglip2Config(text_config=text, vision_config={**seen, "num_patches": 16, "patch_size": 4})


def siglip2(seed: int = 0) -> CompressedModel:
    """Random weights; scale and bias as the paper starts them."""
    torch.manual_seed(seed)
    made = config()
    module = Siglip2Model(made).eval()
    with torch.no_grad():
        module.logit_scale.fill_(2.302585)
        module.logit_bias.fill_(-10.0)
    images = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16)
    words = Siglip2Tokenizer({piece: i for i, piece in enumerate(PIECES)}, [], model_max_length=LENGTH)
    processor = Processor(words, images, LENGTH, None, FAMILY, made)
    return CompressedModel(module, processor, FAMILY, "tiny")


MODELS: dict[str, Callable[[], CompressedModel]] = {"siglip2": siglip2}
TASKS = {"siglip2": "image-text-retrieval"}
