"""A tiny ViLT with random weights, made offline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViltConfig, ViltForQuestionAnswering
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from mmcompress.families.vilt import FAMILY
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "is", "it", "what", "which", "how", "many", "colour", "color"),
    *("square", "picture", "this", "of", "?", "red", "green", "blue", "yellow", "purple", "white", "##s"),
]
ANSWERS = ("red", "green", "blue", "yellow", "purple", "white", "yes", "no", "2")


def tokenizer() -> PreTrainedTokenizerFast:
    """A BERT tokenizer, as ViLT's checkpoints have it."""
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=16, **names)


def config(**changes: Any) -> ViltConfig:
    """Two layers of three heads; pictures whose shorter side is 16, in patches of 8."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
    sizes |= {"image_size": 16, "patch_size": 8, "vocab_size": len(WORDS), "max_position_embeddings": 16, "pad_token_id": 0}
    return ViltConfig(**{**sizes, **changes}, id2label=dict(enumerate(ANSWERS)), label2id={a: i for i, a in enumerate(ANSWERS)})


def vilt(seed: int = 0, **changes: Any) -> CompressedModel:
    """A tiny ViLT whose answers depend on words, patches and places: fresh weights of 0.02 would hardly look at the picture."""
    torch.manual_seed(seed)
    module = ViltForQuestionAnswering(config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.5 if "embeddings" in name or "cls_token" in name else 0.2 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
    images = ViltImageProcessorPil(size={"shortest_edge": 16}, size_divisor=8)
    processor = Processor(tokenizer(), images, max_length=16, family=FAMILY, config=module.config)
    return CompressedModel(module, processor, FAMILY, "tiny")


MODELS: dict[str, Callable[[], CompressedModel]] = {"vilt": vilt}
TASKS: dict[str, str] = {"vilt": "visual-question-answering"}
