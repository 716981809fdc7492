"""Tiny BLIP models of all three kinds with random weights, made offline."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizerFast, BlipConfig, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from mmcompress.families.blip import FAMILY
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor

# The order of a BERT vocabulary with what BLIP adds at its end.
WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "picture", "of", "square", "what", "which", "color"),
    *("colour", "is", "the", "this", "it", "?", ".", "red", "green", "blue", "yellow", "purple", "white", "yes", "no", "##s"),
    *("[DEC]", "[ENC]"),
]
PAD, CLS, SEP, DEC = (WORDS.index(word) for word in ("[PAD]", "[CLS]", "[SEP]", "[DEC]"))


def tokenizer() -> PreTrainedTokenizerFast:
    """A BERT tokenizer with BLIP's begin and encode tokens, as its checkpoints have it."""
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    made.decoder = decoders.WordPiece()
    return BertTokenizerFast(tokenizer_object=made, bos_token="[DEC]", additional_special_tokens=["[ENC]"], model_max_length=32)


def config(architecture: str, vision_width: int = 48, text_width: int = 48) -> BlipConfig:
    """Three vision layers and two text layers; pictures of 16 x 16 in 4 patches."""
    made = BlipConfig(
        text_config={
            "vocab_size": len(WORDS),
            "hidden_size": text_width,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "bos_token_id": DEC,
            "sep_token_id": SEP,
            "pad_token_id": PAD,
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": 16,
            "patch_size": 8,
            "initializer_range": 0.02,
        },
        image_text_hidden_size=16,
    )
    made.architectures = [architecture]
    return made


def blip(architecture: str, seed: int = 0, vision_width: int = 48, text_width: int = 48) -> CompressedModel:
    """A tiny BLIP whose answers depend on the picture and the place: fresh weights of 0.02 would say one word for ever."""
    torch.manual_seed(seed)
    made = config(architecture, vision_width, text_width)
    family = FAMILY.of(made)
    module = family.model_class()(made).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 1.0 if "position_embeddings" in name else 0.3 if parameter.dim() > 1 else 0.05
            parameter.add_(torch.randn_like(parameter) * spread)
    size = {"height": 16, "width": 16}
    processor = Processor(tokenizer(), BlipImageProcessorPil(size=size), max_length=32, family=family, config=module.config)
    return CompressedModel(module, processor, family, "tiny")


def captions() -> CompressedModel:
    """Text and vision towers of different widths."""
    return blip("BlipForConditionalGeneration", text_width=32)


def answers() -> CompressedModel:
    """All towers of one width: the decoder reads a question's states where the question encoder reads a picture's."""
    return blip("BlipForQuestionAnswering")


def matches() -> CompressedModel:
    """Text and vision towers of different widths."""
    return blip("BlipForImageTextRetrieval", text_width=32)


MODELS: dict[str, Callable[[], CompressedModel]] = {
    "blip-captions": captions,
    "blip-answers": answers,
    "blip-matches": matches,
}
TASKS: dict[str, str] = {
    "blip-captions": "image-to-text",
    "blip-answers": "visual-question-answering",
    "blip-matches": "image-text-matching",
}
