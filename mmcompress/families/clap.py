"""CLAP (Wu et al. 2023, LAION): a Swin tower over log-mel spectrograms (HTSAT) and a RoBERTa, compared by cosine similarity.

Shapes: B examples, T frames of a spectrogram, F mel bands, S tokens, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from torch import nn
from transformers import ClapModel, PretrainedConfig, PreTrainedModel

from mmcompress.data.audio import Audio, resample
from mmcompress.errors import ModelError
from mmcompress.families._dual import AXES, DualEncoder
from mmcompress.families._encoders import Encoder, TextTransformer
from mmcompress.families.base import Combined, Component, UnitGroup

if TYPE_CHECKING:
    from mmcompress.processor import Processor


class Htsat(Encoder):
    """CLAP's audio tower: four stages of shifted-window layers, each stage twice as wide as the one before.

    One config key, ``mlp_ratio``, sets the FFN width of all of them, as a multiple of the stage's width.
    """

    axes = ("ffn",)
    inputs = ("input_features",)

    def layers(self, encoder: nn.Module) -> nn.ModuleList:
        return nn.ModuleList([layer for stage in cast(Any, encoder).audio_encoder.layers for layer in stage.blocks])

    def unit_groups(self, encoder: nn.Module, tower: str, axis: str, prefix: str) -> list[UnitGroup]:
        groups = []
        for s, stage in enumerate(cast(Any, encoder).audio_encoder.layers):
            for i, layer in enumerate(stage.blocks):
                name, root = f"{prefix}.audio_encoder.layers.{s}.blocks.{i}.intermediate.dense", layer.intermediate.dense
                groups.append(UnitGroup(tower, axis, name, root, root.out_features))
        return groups if axis == "ffn" else []

    def shrink(self, encoder: nn.Module, config: PretrainedConfig) -> bool:
        roots = [cast(nn.Linear, group.root) for group in self.unit_groups(encoder, "audio", "ffn", "")]
        shapes = {(root.in_features, root.out_features) for root in roots}
        least, width = min(shapes)
        ratio = ratio_for(least, width)
        cast(Any, config).mlp_ratio = ratio
        return all(int(ratio * dim) == out for dim, out in shapes)

    def sizes(self, config: PretrainedConfig) -> dict[str, int]:
        """The FFN width of the first stage; the others follow in proportion."""
        audio = cast(Any, config)
        return {"ffn": int(audio.mlp_ratio * audio.patch_embeds_hidden_size)}

    def resize(self, config: PretrainedConfig, sizes: Mapping[str, int]) -> None:
        audio = cast(Any, config)
        audio.mlp_ratio = ratio_for(audio.patch_embeds_hidden_size, sizes["ffn"])

    def example(self, config: PretrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        audio = cast(Any, config)
        # The stock extractor makes 1001 frames of its 10 seconds, where the model has room for 1024.
        shape = (batch_size, 1, most_frames(config) * 1001 // 1024, audio.num_mel_bins)
        return {"input_features": torch.randn(shape, generator=generator)}

    def run(
        self, encoder: nn.Module, *inputs: torch.Tensor, hidden: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        pooled, states = super().run(encoder, *inputs, hidden=hidden)
        # After each stage (B, C, height, width) -> (B, S, C); stages differ in both.
        return pooled, tuple(state.flatten(2).transpose(1, 2) for state in states)


def ratio_for(dim: int, out: int) -> float:
    """The ``mlp_ratio`` that makes transformers' ``int(mlp_ratio * dim)`` give ``out``, in spite of rounding."""
    ratio = out / dim
    return ratio if int(ratio * dim) == out else math.nextafter(ratio, math.inf)


def most_frames(config: PretrainedConfig) -> int:
    """How many frames of a spectrogram the audio tower has room for; fewer are stretched."""
    audio = cast(Any, config)
    return int(audio.spec_size * (audio.spec_size // audio.num_mel_bins))


AUDIO, TEXT = Htsat(), TextTransformer()


class Clap(DualEncoder):
    """ClapModel of stock transformers, without feature fusion."""

    name = "clap"
    model_types = ("clap",)
    towers = ("audio", "text")
    axes = MappingProxyType(
        {**AXES, "ffn": "hidden units of the feed-forward layers; sets mlp_ratio (audio), intermediate_size (text)"}
    )
    abilities = frozenset({"audio", "embeddings"})
    media = MappingProxyType({"audio": ("input_features",)})
    media_shapes_vary = True
    output_names = MappingProxyType({"audio": "audio_embeds", "text": "text_embeds"})

    def of(self, config: PretrainedConfig) -> Self:
        if cast(Any, config).audio_config.enable_fusion:
            raise ModelError(
                "clap: audio_config.enable_fusion is true: models with feature fusion read four random crops of a recording, "
                "which is not supported; allowed: unfused ones, such as laion/clap-htsat-unfused"
            )
        return self

    def model_class(self) -> type[PreTrainedModel]:
        return cast(type[PreTrainedModel], ClapModel)

    def description(self, tower: str) -> Encoder:
        return AUDIO if tower == "audio" else TEXT

    def projection(self, module: PreTrainedModel, tower: str) -> nn.Module:
        return cast(nn.Module, module.audio_projection if tower == "audio" else module.text_projection)

    def scale(self, module: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
        # One scale for each direction; their geometric mean trains both, and is either where they are equal, as they start.
        return ((module.logit_scale_a + module.logit_scale_t) / 2).exp(), None

    def combined(self, module: PreTrainedModel) -> Combined:
        scale, text_scale = (float(value.exp()) for value in (module.logit_scale_a.detach(), module.logit_scale_t.detach()))
        return Combined("audio_model", "text_model", "audio", scale, text_scale)

    def components(self, module: PreTrainedModel) -> dict[str, Component]:
        found = super().components(module)
        part = found["audio_model"]
        axes = {**part.dynamic_axes, "input_features": {**part.dynamic_axes["input_features"], 2: "frames"}}
        return {**found, part.name: replace(part, dynamic_axes=axes)}

    def prepare_media(self, processor: Processor, kind: str, items: list[Any]) -> list[dict[str, torch.Tensor]]:
        """The stock feature extractor, but of recordings that are too long the middle, where it takes a random part."""
        extractor: Any = processor.feature_extractor
        if extractor.truncation != "rand_trunc":
            raise ValueError(
                f"preprocessor_config.json: truncation: found {extractor.truncation!r}; "
                "allowed: 'rand_trunc' (models without fusion)"
            )
        rate = int(extractor.sampling_rate)
        samples = [_middle(resample(item, rate), int(extractor.nb_max_samples)) for item in items]
        # One by one: the extractor takes several of different lengths, but a list of arrays of one length for one array.
        found = [extractor([one], sampling_rate=rate, return_tensors="pt")["input_features"][0] for one in samples]
        for features in found if processor.config is not None else []:
            frames, bands = features.shape[-2:]
            audio = cast(Any, processor.config).audio_config
            if frames > most_frames(audio) or bands != audio.num_mel_bins:
                raise ValueError(
                    f"the feature extractor gives {frames} frames of {bands} mel bands; the model takes up to "
                    f"{most_frames(audio)} of {audio.num_mel_bins} (preprocessor_config.json and config.json must agree)"
                )
        return [{"input_features": features.float()} for features in found]


def _middle(audio: Audio, most: int) -> np.ndarray:
    """At most ``most`` samples, from the middle of the recording."""
    start = max(0, (len(audio.samples) - most) // 2)
    return audio.samples[start : start + most].astype(np.float64)


FAMILY = Clap()
