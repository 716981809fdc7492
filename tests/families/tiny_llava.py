"""Tiny LLaVA models: CLIP with Llama as LLaVA 1.5 has it, SigLIP with Qwen2 as LLaVA-Interleave has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmcompress.families.llava import FAMILY
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor
from tests.families.tiny_smolvlm import text_config, tokenizer, wide_awake
from tests.tiny import COLOURS

WORDS = ["USER", "ASSISTANT", ":", "what", "colour", "is", "this", "?", "Describe", "the", "image", ".", "\n"]
VOCABULARY = ["<unk>", "<pad>", "</s>", "<image>", *WORDS, "a", "photo", "of", "square", "picture", *COLOURS]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}{% for line in message['content'] %}"
    "{% if line['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA 1.5's own, but for its loss mask."""
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def _made(
    vision: dict[str, Any], text: dict[str, Any], images: Any, extra: int, seed: int, factor: float, **changes: Any
) -> CompressedModel:
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config={**VISION, "image_size": 16, "patch_size": 4, **vision},
        text_config=text_config(VOCABULARY, "</s>", **text),
        image_token_index=VOCABULARY.index("<image>"),
        image_seq_length=16,
        **changes,
    )
    module = wide_awake(LlavaForConditionalGeneration(config), factor, 3.0)
    facts = {
        "processor_class": "LlavaProcessor",
        "patch_size": 4,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": extra,
        "image_token": "<image>",
    }
    files = {"processor_config.json": json.dumps(facts)}
    words = tokenizer(VOCABULARY, TEMPLATE, "</s>")
    return CompressedModel(module, Processor(words, images, 256, None, FAMILY, config, None, files), FAMILY, "tiny")


def llava(seed: int = 0) -> CompressedModel:
    """CLIP with Llama; the features are those behind the last layer but one, without the class token."""
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return _made({"model_type": "clip_vision_model", "projection_dim": 32}, {}, images, 1, seed, 4.0)


def interleave(seed: int = 2) -> CompressedModel:
    """SigLIP without its pooling head, all positions of its last layer; Qwen2 with biases, tied."""
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    text = {"model_type": "qwen2", "tie_word_embeddings": True}
    seen = {"model_type": "siglip_vision_model", "vision_use_head": False}
    whole = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "tie_word_embeddings": True}
    model = _made(seen, text, images, 0, seed, 8.0, **whole)
    with torch.no_grad():
        for layer in model.module.model.language_model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.bias.normal_()
    return model


MODELS: dict[str, Callable[[], CompressedModel]] = {"llava": llava, "llava-interleave": interleave}
TASKS = {"llava": "image-to-text", "llava-interleave": "visual-question-answering"}
