"""The published configs that `families.py` builds with random weights, written out so that no download is needed.

Each comes from the hub repository named beside it; sizes that equal the config class's defaults are left to them.
`parameters` is what the published checkpoint has, and is checked after building.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import (
    BlipConfig,
    ClapConfig,
    CLIPConfig,
    PretrainedConfig,
    SiglipConfig,
    SmolVLMConfig,
    ViltConfig,
    WhisperConfig,
)


@dataclass(frozen=True)
class Published:
    """One published model.

    Attributes:
        hub: where its config and its number of parameters were read.
        architecture: the stock class of its checkpoint, for families with several heads.
        parameters: of the checkpoint; tied weights are counted once and buffers not (the hub's figure for BLIP, 247M, counts the
            tied word embeddings twice).
    """

    hub: str
    architecture: str
    parameters: int
    config: Callable[[], PretrainedConfig]


def _blip() -> BlipConfig:
    text = {
        "vocab_size": 30_524,
        "num_attention_heads": 12,
        "encoder_hidden_size": 768,
        "bos_token_id": 30_522,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sep_token_id": 102,
        "is_decoder": True,
    }
    return BlipConfig(text_config=text, vision_config={"image_size": 384, "patch_size": 16})


def _vilt() -> ViltConfig:
    return ViltConfig(
        num_labels=3129,
        max_position_embeddings=40,
        modality_type_vocab_size=2,
        image_size=384,
        patch_size=32,
        max_image_length=-1,
    )


def _whisper() -> WhisperConfig:
    return WhisperConfig(
        vocab_size=51_865,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        num_mel_bins=80,
        max_source_positions=1500,
        max_target_positions=448,
        decoder_start_token_id=50_258,
        bos_token_id=50_257,
        eos_token_id=50_257,
        pad_token_id=50_257,
    )


def _smolvlm() -> SmolVLMConfig:
    text = {
        "model_type": "llama",
        "vocab_size": 49_280,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 100_000.0, "rope_type": "default"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    return SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=4, image_token_id=49_190, pad_token_id=2, tie_word_embeddings=False
    )


PUBLISHED: dict[str, Published] = {
    "clip-vit-b-32": Published("openai/clip-vit-base-patch32", "CLIPModel", 151_277_313, CLIPConfig),
    "siglip-base": Published("google/siglip-base-patch16-224", "SiglipModel", 203_155_970, SiglipConfig),
    "blip-base": Published("Salesforce/blip-image-captioning-base", "BlipForConditionalGeneration", 223_971_644, _blip),
    "vilt-b-32": Published("dandelin/vilt-b32-finetuned-vqa", "ViltForQuestionAnswering", 117_588_537, _vilt),
    "whisper-base": Published("openai/whisper-base", "WhisperForConditionalGeneration", 72_593_920, _whisper),
    "clap-unfused": Published("laion/clap-htsat-unfused", "ClapModel", 153_492_890, ClapConfig),
    "smolvlm-256m": Published("HuggingFaceTB/SmolVLM-256M-Instruct", "SmolVLMForConditionalGeneration", 256_484_928, _smolvlm),
}
