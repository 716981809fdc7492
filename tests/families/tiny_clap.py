"""A tiny CLAP without feature fusion: two stages of a Swin tower over short spectrograms, and a RoBERTa."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

from mmcompress.families.clap import FAMILY
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor
from tests import tiny


def config() -> ClapConfig:
    """Spectrograms of up to 256 frames of 16 bands; FFN widths of 64 and 128 in the audio tower's two stages."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": len(tiny.WORDS) - 1}
    heard = {"depths": [2, 2], "num_attention_heads": [2, 4], "patch_embeds_hidden_size": 16, "hidden_size": 32}
    return ClapConfig(
        text_config={**text, **ids, "vocab_size": len(tiny.WORDS), "max_position_embeddings": 17},
        audio_config={**heard, "num_hidden_layers": 2, "window_size": 4, "spec_size": 64, "num_mel_bins": 16},
        projection_dim=24,
    )


def extractor() -> ClapFeatureExtractor:
    """One second at 8 kHz, 251 frames."""
    return ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=8_000,
        hop_length=32,
        max_length_s=1,
        fft_window_size=256,
        frequency_max=4_000,
        truncation="rand_trunc",
        padding="repeatpad",
    )


def clap(seed: int = 0) -> CompressedModel:
    """Random weights, larger than transformers starts them, and running statistics about those of log-mel features."""
    torch.manual_seed(seed)
    made = config()
    module = ClapModel(made).eval()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() > 1:
                # At their own start (0.01) all recordings have about the same embedding.
                weight.normal_(0, 0.1)
            elif name.endswith("bias"):
                weight.normal_(0, 0.02)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None:
            part.running_mean.fill_(-30.0)
            part.running_var.fill_(400.0)
    processor = Processor(tiny.tokenizer(), None, 16, extractor(), FAMILY, made)
    return CompressedModel(module, processor, FAMILY, "tiny")


MODELS: dict[str, Callable[[], CompressedModel]] = {"clap": clap}
TASKS = {"clap": "zero-shot-audio-classification"}
