"""Tiny Whispers with random weights: one of one language, one of two with the start tokens of published models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from mmcompress.families.whisper import FAMILY
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor
from tests import tiny

SPECIAL = ["<pad>", "<|startoftranscript|>", "<|endoftext|>", "<unk>"]
PROMPT = ["<|en|>", "<|de|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>"]
TEXT = ["a", "square", *tiny.COLOURS, "one", "two", "three"]
SECONDS, RATE, MELS = 1, 16_000, 16


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Whole words."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<|startoftranscript|>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        extra_special_tokens=[word for word in words if word in PROMPT],
        model_max_length=24,
    )


def whisper(seed: int = 0, words: list[str] | None = None, **changes: Any) -> CompressedModel:
    """Three encoder and two decoder layers, two heads of 16; windows of one second."""
    words = words or [*SPECIAL, *TEXT]
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(words),
        "num_mel_bins": MELS,
        "d_model": 32,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 48,
        "max_source_positions": SECONDS * 50,
        "max_target_positions": 24,
        # Wide enough that random models write different words for different sounds.
        "init_std": 0.5,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2, "begin_suppress_tokens": None}
    config = WhisperConfig(**{**sizes, **ids, **changes})
    module = WhisperForConditionalGeneration(config).eval()
    # Random models would write little else.
    module.generation_config.suppress_tokens = [i for i, word in enumerate(words) if word in SPECIAL and word != "<|endoftext|>"]
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=SECONDS, sampling_rate=RATE)
    processor = Processor(
        tokenizer(words),
        feature_extractor=extractor,
        family=FAMILY,
        config=config,
        generation=module.generation_config,
    )
    return CompressedModel(module, processor, FAMILY, "tiny")


def whisper_of_two_languages(seed: int = 0, language: str | None = "en", **changes: Any) -> CompressedModel:
    """The same with a language, a task and a token for no time stamps in front of each transcript; some words are forbidden."""
    words = [*SPECIAL, *TEXT, *PROMPT]  # what is behind no time stamps is a time stamp to stock generate
    numbers = {word: i for i, word in enumerate(words)}
    model = whisper(seed, words, **changes)
    settings = {
        "is_multilingual": True,
        "lang_to_id": {word: numbers[word] for word in ("<|en|>", "<|de|>")},
        "task_to_id": {word: numbers[f"<|{word}|>"] for word in ("transcribe", "translate")},
        "no_timestamps_token_id": numbers["<|notimestamps|>"],
        "suppress_tokens": [numbers["<unk>"], *(numbers[word] for word in PROMPT), numbers["purple"]],
        "begin_suppress_tokens": [numbers["square"], numbers["<|endoftext|>"]],
        "task": "transcribe",
    }
    if language is not None:
        settings["language"] = language
    ids = {key: getattr(model.module.config, key) for key in ("pad_token_id", "bos_token_id", "decoder_start_token_id")}
    model.module.generation_config = GenerationConfig(**ids, eos_token_id=2, **settings)
    model.processor.generation = model.module.generation_config
    return model


MODELS: dict[str, Callable[[], CompressedModel]] = {
    "whisper": whisper,
    "whisper-two-languages": whisper_of_two_languages,
}
TASKS = dict.fromkeys(MODELS, "automatic-speech-recognition")
