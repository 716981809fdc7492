"""LLaVA: a CLIP or SigLIP vision tower, a projector of two layers, a Llama-like decoder (Liu et al. 2023, arXiv 2304.08485).

The features are those of an inner layer of the vision tower (``vision_feature_layer``, mostly the last but one), so that its
last layer is often there for nothing.

Shapes: B examples, C x H x W a picture, T image tokens, S positions of the vision tower, W width of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PretrainedConfig, PreTrainedModel

from mmcompress.errors import ModelError
from mmcompress.families._vlm import VISION, VisionLanguage
from mmcompress.families.base import Batch, Component
from mmcompress.processor import Processor

VISION_TYPES = ("clip_vision_model", "siglip_vision_model")


class VisionComponent(nn.Module):
    """Pictures to vectors in the decoder's width: what transformers.js calls ``vision_encoder``.

    Layers behind the last one whose output is read are not run.
    """

    def __init__(self, vision_tower: nn.Module, projector: nn.Module, states: Sequence[int], skip: int) -> None:
        """Args:
        states: which hidden states are the features: 0 before the first layer, i behind the i-th.
        skip: how many positions in front (CLIP's class token) are left out.
        """
        super().__init__()
        self.vision_tower = vision_tower
        self.multi_modal_projector = projector
        self.states, self.skip = tuple(states), skip

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, C, H, W) -> (B, T, W)."""
        tower = cast(Any, self.vision_tower)
        state = tower.embeddings(pixel_values)
        if hasattr(tower, "pre_layrnorm"):
            state = tower.pre_layrnorm(state)
        found = [state]
        for layer in tower.encoder.layers[: max(self.states)]:
            found.append(layer(found[-1], None))
        features = torch.cat([found[i][:, self.skip :] for i in self.states], dim=-1)
        return (self.multi_modal_projector(features),)


class Llava(VisionLanguage):
    """LlavaForConditionalGeneration of stock transformers."""

    name = "llava"
    model_types = ("llava",)
    media = MappingProxyType({"image": ("pixel_values",)})
    plain_prompt = "USER: <image>\n{} ASSISTANT:"
    vision_inputs = ("pixel_values",)

    def of(self, config: PretrainedConfig) -> Self:
        super().of(config)
        vision = cast(Any, config).vision_config
        if vision.model_type not in VISION_TYPES or getattr(vision, "tie_last_hidden_states", False):
            raise ModelError(
                f"vision_config.model_type: found {vision.model_type!r}; llava models are handled with a vision tower of: "
                f"{', '.join(VISION_TYPES)}, whose hidden states are those before the last norm"
            )
        layers = vision.num_hidden_layers
        for number in _listed(config):
            if not -layers - 1 <= number <= layers:
                raise ModelError(f"vision_feature_layer: found {number}; allowed: {-layers - 1} to {layers} ({layers} layers)")
        return self

    def model_class(self) -> type[PreTrainedModel]:
        return cast(type[PreTrainedModel], LlavaForConditionalGeneration)

    def parts(self, module: PreTrainedModel) -> tuple[Any, nn.Module, Any]:
        inner = cast(Any, module).model
        return inner.vision_tower, inner.multi_modal_projector, inner.language_model

    def drop_layers(self, module: PreTrainedModel, tower: str, keep: Sequence[int]) -> None:
        if tower == "vision":
            _move_features(module.config, len(self.layers(module, tower)), keep)
        super().drop_layers(module, tower, keep)

    def resized_config(self, config: PretrainedConfig, sizes: Mapping[str, Mapping[str, int]]) -> PretrainedConfig:
        new = super().resized_config(config, sizes)
        # Which layers will go is not known yet: the features stay behind as many layers as there can be.
        _move_features(new, cast(Any, config).vision_config.num_hidden_layers, range(sizes["vision"]["depth"]))
        return new

    def vision_component(self, module: PreTrainedModel) -> Component:
        vision, connector, _ = self.parts(module)
        count = len(self._layers(module, "vision"))
        states = [_from_front(number, count) for number in _listed(module.config)]
        part = VisionComponent(vision, connector, states, _skipped(module.config))
        batch = {0: "batch_size"}
        axes = {"pixel_values": batch, "image_features": batch}
        return Component(VISION, "vision", part, self.vision_inputs, ("image_features",), axes)

    def vision_example(self, config: PretrainedConfig, batch_size: int, generator: torch.Generator, images: int) -> Batch:
        vision = cast(Any, config).vision_config
        size = (batch_size, vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}

    def image_tokens(self, config: PretrainedConfig, media: Mapping[str, Any]) -> list[int]:
        return [_tokens(config)] * len(media["pixel_values"])

    def image_text(self, processor: Processor, media: Mapping[str, Any]) -> str:
        config = cast(PretrainedConfig, processor.config)
        token: str = processor.tokenizer.convert_ids_to_tokens(cast(Any, config).image_token_id)
        return token * _tokens(config)


def _listed(config: PretrainedConfig) -> list[int]:
    """``vision_feature_layer`` as a list."""
    found = cast(Any, config).vision_feature_layer
    return [found] if isinstance(found, int) else list(found)


def _from_front(number: int, layers: int) -> int:
    """A number of a hidden state counted from the front: there is one more of them than layers."""
    return number if number >= 0 else layers + 1 + number


def _move_features(config: PretrainedConfig, layers: int, keep: Sequence[int]) -> None:
    """Lets ``vision_feature_layer`` point behind the same layers, or the last before them that stays, once others are gone.

    Numbers that were counted from the end still are: -2 becomes -1 where the layer that was there for nothing goes.
    """
    moved = []
    for number in _listed(config):
        state = sum(i < _from_front(number, layers) for i in keep)
        moved.append(state if number >= 0 else state - len(keep) - 1)
    single = isinstance(cast(Any, config).vision_feature_layer, int)
    cast(Any, config).vision_feature_layer = moved[0] if single else moved


def _skipped(config: PretrainedConfig) -> int:
    """Positions in front that the strategy ``default`` leaves out: one, a class token or not."""
    return int(cast(Any, config).vision_feature_select_strategy == "default")


def _tokens(config: PretrainedConfig) -> int:
    """T: the patches, CLIP's class token among them, less what the strategy leaves out."""
    vision = cast(Any, config).vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return int(patches + (vision.model_type == "clip_vision_model") - _skipped(config))


FAMILY = Llava()
