"""Tiny SmolVLM and Idefics3 models: two layers a tower, four query heads on two key/value heads, sub-images of 16 x 16."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from mmcompress.families.smolvlm import FAMILY
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor
from tests.tiny import COLOURS

SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
PLACES = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
WORDS = ["User", "Assistant", ":", "what", "colour", "is", "this", "?", "Describe", "the", "image", ".", "\n", "\n\n"]
VOCABULARY = [*SPECIAL, *PLACES, *WORDS, "a", "photo", "of", "square", "picture", *COLOURS]
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""SmolVLM's own."""


def tokenizer(
    words: list[str] = VOCABULARY, template: str = TEMPLATE, end: str = "<end_of_utterance>"
) -> PreTrainedTokenizerFast:
    """Whole words and line breaks."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    spaces = pre_tokenizers.Split(Regex(" +"), "removed")
    made.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split(Regex(r"\n+|\w+|[^\w\s]+"), "isolated")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token=end,
        additional_special_tokens=[word for word in words if word.startswith("<") and word not in ("<unk>", "<pad>", end)],
        model_max_length=256,
    )
    fast.chat_template = template
    return fast


def text_config(words: list[str], end: str, **changes: Any) -> dict[str, Any]:
    """A decoder of two layers with grouped queries, its head size smaller than its width over its heads."""
    return {
        "model_type": "llama",
        "vocab_size": len(words),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": words.index("<pad>"),
        "bos_token_id": None,
        "eos_token_id": words.index(end),
        **changes,
    }


def wide_awake(module: PreTrainedModel, factor: float = 6.0, seen: float | None = None) -> PreTrainedModel:
    """Weights large enough that answers depend on pictures and prompts, and are not one token again and again.

    Args:
        factor: what the decoder's weights are multiplied by.
        seen: what all others are; the same where None.
    """
    tied = module.lm_head.weight if module.config.tie_word_embeddings else None  # large ones would only repeat their own token
    read = {id(part) for part in module.get_decoder().modules()}
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d, nn.Embedding)) and part.weight is not tied:
                part.weight.mul_(factor if seen is None or id(part) in read else seen)
    return module.eval()


def _made(stock: Any, config_class: Any, images: Any, tied: bool, seed: int) -> CompressedModel:
    torch.manual_seed(seed)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = config_class(
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        text_config=text_config(VOCABULARY, "<end_of_utterance>", tie_word_embeddings=tied),
        image_token_id=VOCABULARY.index("<image>"),
        scale_factor=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    module = wide_awake(stock(config))
    family = FAMILY.of(config)
    files = {"processor_config.json": json.dumps({"processor_class": "Idefics3Processor", "image_seq_len": 4})}
    pictures = images(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return CompressedModel(module, Processor(tokenizer(), pictures, 256, None, family, config, None, files), family, "tiny")


def smolvlm(seed: int = 0) -> CompressedModel:
    """With the head tied to the embeddings, as SmolVLM-256M and 500M have it."""
    return _made(SmolVLMForConditionalGeneration, SmolVLMConfig, SmolVLMImageProcessorPil, True, seed)


def idefics3(seed: int = 0) -> CompressedModel:
    """With a head of its own, as Idefics3-8B has it."""
    return _made(Idefics3ForConditionalGeneration, Idefics3Config, Idefics3ImageProcessorPil, False, seed)


MODELS: dict[str, Callable[[], CompressedModel]] = {"smolvlm": smolvlm, "idefics3": idefics3}
TASKS = {"smolvlm": "image-to-text", "idefics3": "visual-question-answering"}
